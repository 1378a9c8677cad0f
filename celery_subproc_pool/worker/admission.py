"""Makes a job of what `apply_async` was given: which group does it, how long it may take, and what
its child reads.

All of it runs on the thread that calls `apply_async`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from celery import Celery

from ..core.model import Group
from ..python_child import codec
from ..settings import PYTHON
from .calls import CallJob
from .fast_path import FastPath
from .intake import seconds
from .jobs import Callbacks, Owner, PoolJob
from .requests import deserialized_body, is_tracer
from .routes import Routes

__all__ = ("Admission", "Limits")


class Limits(NamedTuple):
    """Time limits in seconds; None is none."""

    hard: Any = None
    soft: Any = None


class Admission:
    """Makes the jobs of one worker.

    Arguments:
        app: the worker's app.
        routes: which group takes which task.
        groups: the groups of children that the worker has, by name.
        limits: the worker's own time limits.
        hostname: the worker's node name.
    """

    def __init__(
        self,
        app: Celery,
        routes: Routes,
        groups: Mapping[str, Group],
        limits: Limits,
        hostname: str,
    ) -> None:
        # `app.tasks` takes a lock: not for each job.
        self._tasks = app.tasks
        self._routes = routes
        self._groups = groups
        self._limits = limits
        self._fast_path = FastPath(app, hostname, routes.tracked)

    def job_for(
        self,
        owner: Owner,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        callbacks: Callbacks,
        limits: Limits,
    ) -> tuple[PoolJob, Callable[[], None]]:
        """Return a job, and the function that prepares it.

        That function may raise anything: the job can't be done then. It is apart because there must
        be a job that can fail.

        Arguments:
            owner: takes the job's wishes to the engine.
            target, args, kwargs: Celery's tracer, or what a Python child is to call.
            callbacks: tell Celery what becomes of the job.
            limits: the request's or task's time limits.
        """
        if is_tracer(target, args, callbacks.error_callback):
            job = PoolJob(owner, target, args, callbacks)
            return job, partial(self._prepare_task, job, limits)
        call = CallJob(owner, target, callbacks)
        return call, partial(self._prepare_call, call, args, kwargs, limits)

    @property
    def fast_path(self) -> FastPath:
        """What tells Celery of the success of jobs on the fast path."""
        return self._fast_path

    def _prepare_task(self, job: PoolJob, limits: Limits) -> None:
        """Find the group and the limits of `job`; and its request, unless its tracer makes that.

        Raises:
            Exception: the job can't be done, whatever the reason.
        """
        job.group = name = self._routes.find(job.task_name, PYTHON in self._groups)
        if name is None:
            return
        group = self._groups[name]
        self._limit(job, limits, group.settings.timeout)
        if name == PYTHON:
            job.traced_here = False
            job.request = codec.encode_task(job.task_id, job.arguments)
            return
        body = deserialized_body(job.callbacks.error_callback)
        fast = self._fast_path.request_for(job.arguments, group.tells_progress, body)
        if fast is not None:
            job.traced_here = False
            job.request, job.fast = fast.line, fast

    def _limit(self, job: PoolJob, given: Limits, default: float | None) -> None:
        """Set the limits of `job`.

        The request's own come first, then the task's, the worker's, and for the hard one the
        group's (`default`).
        """
        own_hard, own_soft = job.arguments[2].get("timelimit") or (None, None)
        # Celery passes the limits that a task had when the worker started. The remote control
        # command `time_limit` changes them later, at the task.
        task = self._tasks[job.task_name]
        hard = seconds(given.hard if own_hard else task.time_limit, "the hard time limit")
        soft = seconds(given.soft if own_soft else task.soft_time_limit, "the soft time limit")
        job.timeout = hard or self._limits.hard or default
        job.soft_timeout = soft or self._limits.soft

    def _prepare_call(
        self, call: CallJob, args: Sequence[Any], kwargs: Mapping[str, Any], given: Limits
    ) -> None:
        """Find the limits of `call` (its caller's, or the worker's) and its request.

        Raises:
            Exception: the job can't be done, whatever the reason.
        """
        call.timeout = seconds(given.hard, "timeout") or self._limits.hard
        call.soft_timeout = seconds(given.soft, "soft_timeout") or self._limits.soft
        call.prepare(args, kwargs, PYTHON in self._groups)
