"""Prepares a job for the engine: which group does it, how long it may take, what its child reads.

`trace_request` is called on the engine's thread, all else on the one that calls `apply_async`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from celery import Celery

from ..core.model import Group, Tracing
from ..python_child import codec
from ..settings import ASYNCIO, PYTHON, TRACERS
from ..wire.python import Exchange
from .calls import CallJob
from .fast_path import FastPath
from .jobs import PoolJob
from .requests import deserialized_body
from .routes import Routes

__all__ = ("Admission", "WorkerLimits", "seconds")

#: A hundred years, in seconds: more counts as no limit, and would overflow clocks.
LONGEST = 100 * 365 * 86400.0


class WorkerLimits(NamedTuple):
    """The time limits of a worker, in seconds; None is none."""

    hard: float | None
    soft: float | None


class Admission:
    """Prepares the jobs of one worker.

    Arguments:
        app: the worker's app.
        routes: which group takes which task.
        groups: the groups of children that the worker has, by name.
        limits: the worker's own.
        hostname: the worker's node name.
    """

    def __init__(
        self,
        app: Celery,
        routes: Routes,
        groups: Mapping[str, Group],
        limits: WorkerLimits,
        hostname: str,
    ) -> None:
        # `app.tasks` takes a lock: not for each job.
        self._tasks = app.tasks
        self._routes = routes
        self._groups = groups
        self._limits = limits
        #: Also does what comes at the end of a job on it.
        self.fast_path = FastPath(app, hostname)

    def prepare(
        self, job: PoolJob, args: Sequence[Any], kwargs: Mapping[str, Any], hard: Any, soft: Any
    ) -> None:
        """Find the group, the limits and the request of `job`.

        Arguments:
            job: a job that is just made.
            args, kwargs: the arguments of the tracer or the callable.
            hard, soft: the limits that `apply_async` was given.

        Raises:
            Exception: no child can do the job, whatever the reason.
        """
        if isinstance(job, CallJob):
            job.timeout = seconds(hard, "timeout") or self._limits.hard
            job.soft_timeout = seconds(soft, "soft_timeout") or self._limits.soft
            job.prepare(args, kwargs, PYTHON in self._groups)
        else:
            self._prepare_task(job, hard, soft)

    def _prepare_task(self, job: PoolJob, hard: Any, soft: Any) -> None:
        """Find the group and the limits of `job`; and its request, unless its tracer makes that."""
        mapped = self._routes.find_mapped(job.arguments[2], self._groups)
        job.group = name = mapped or self._routes.find(job.task_name, self._groups)
        group = self._groups[name]
        self._limit(job, hard, soft, group.settings.timeout)
        if name in (PYTHON, ASYNCIO, TRACERS):
            job.request = codec.encode_task(job.task_id, job.arguments)
            return
        body = deserialized_body(job.callbacks.error_callback)
        stores_earlier = group.tells_progress or bool(self._tasks[job.task_name].track_started)
        fast = self.fast_path.request_for(job.arguments, stores_earlier, body)
        if fast is None:
            job.tracing = Tracing.ALWAYS
        else:
            job.tracing = Tracing.AT_END if fast.stores else Tracing.UNLESS_OK
            job.request, job.fast = fast.line, fast

    def trace_request(self, job: PoolJob) -> bytes:
        """Return what a tracer reads of `job`, which an external child has.

        Raises:
            Exception: as `codec.encode_task`.
        """
        facts = Exchange(
            pid=job.pid,
            throttle_max_retries=self._groups[job.group].settings.throttle_max_retries,
            tracked=bool(self._tasks[job.task_name].track_started),
        )
        return codec.encode_task(job.task_id, job.arguments, facts)

    def _limit(self, job: PoolJob, hard: Any, soft: Any, default: float | None) -> None:
        """Set the limits of `job`.

        The request's own come first, then the task's, the worker's, and for the hard one the
        group's (`default`).
        """
        own_hard, own_soft = job.arguments[2].get("timelimit") or (None, None)
        # Celery passes the limits that a task had when the worker started. The remote control
        # command `time_limit` changes them later, at the task.
        task = self._tasks[job.task_name]
        hard = seconds(hard if own_hard else task.time_limit, "the hard time limit")
        soft = seconds(soft if own_soft else task.soft_time_limit, "the soft time limit")
        job.timeout = hard or self._limits.hard or default
        job.soft_timeout = soft or self._limits.soft


def seconds(value: Any, name: str) -> float | None:
    """Return a time limit in seconds; None for no limit.

    Arguments:
        value: the limit in a message, a task or the configuration: a number, or what can be read
            as a number, for example text from an environment variable.
        name: the name of the limit in the error message.

    Raises:
        ValueError: it is not a number, or it is negative.
    """
    if not value:
        return None
    try:
        limit = float(value)
    except (TypeError, ValueError, OverflowError):
        limit = math.nan
    if limit >= 0:
        if not 0 < limit < LONGEST:
            return None
        # A number is returned as it came: it is shown in the log.
        return value if type(value) in (int, float) else limit
    raise ValueError(f"{name}: expected a number of seconds, got {value!r}")
