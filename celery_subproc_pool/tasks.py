"""Tasks that run in external children: the base class, and what such a task does when it runs.

Layer: above `outcome`; imports Celery. `run()` of a task that `routes` gave to a group is one
exchange with a child, made in the tracing thread that the pool started for the job.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from celery import Task
from celery.states import STARTED
from celery.utils.log import get_logger

from .errors import NotInWorkerError
from .outcome import conclude, throttles_of
from .protocol import CancelReason, Reply, encode_request

__all__ = ("PROGRESS", "Exchange", "SubprocTask", "exchanging", "payload", "run_in_child")

logger = get_logger(__name__)

#: The state of a task whose child has told how far it is, as in Celery's own documentation.
PROGRESS = "PROGRESS"

_current = threading.local()


class Exchange(Protocol):
    """A job with a child to talk to."""

    #: Celery's id of the task.
    task_id: str
    #: Its soft time limit, in seconds.
    soft_timeout: float | None
    #: Why its child was told to end it.
    cancelled: CancelReason | None

    @property
    def pid(self) -> int:
        """The child's pid."""

    def exchange(self, line: bytes, on_progress: Callable[[dict[str, Any]], None]) -> Reply:
        """Give the request `line` to the child, and return its reply; meanwhile, call
        `on_progress` with what it tells of its progress."""


class SubprocTask(Task):
    """A task whose work is done by an external child; the body of its function never runs.

    ::

        @app.task(base=SubprocTask, name="billing.charge", child="rails")
        def charge(amount, currency="EUR"): ...

    Without `child`, the first group whose ``tasks`` match the name takes it.
    """

    abstract = True

    #: The name of the group of children, or None.
    child: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Where nobody offers a child (a direct call, `apply()`, another pool), the body must not
        # run as if it were the work.
        if not _may_exchange(self):
            raise _not_here(self)
        return self.run(*args, **kwargs)


@contextmanager
def exchanging(job: Exchange) -> Iterator[None]:
    """Within this context, and in this thread, the task of `job` has a child to talk to."""
    _current.job = job
    try:
        yield
    finally:
        _current.job = None


def _may_exchange(task: Task) -> bool:
    job: Exchange | None = getattr(_current, "job", None)
    return job is not None and job.task_id == task.request.id


def _not_here(task: Task) -> NotInWorkerError:
    return NotInWorkerError(
        f"{task.name} runs in an external child process: send it with delay() to a worker that was"
        " started with -P celery_subproc_pool:Pool. It can't be called directly, eagerly or by"
        " another pool. In tests, start such a worker with"
        " celery.contrib.testing.worker.start_worker(app, pool='celery_subproc_pool:Pool'), or"
        " patch what calls the task"
    )


def run_in_child(task: Task, throttle_max_retries: int | None, /, *args: Any, **kwargs: Any) -> Any:
    """Have a child do the current request of `task`: the body of every task that a group takes.

    Arguments:
        task: the task.
        throttle_max_retries: how often it may be throttled; None is without end.
        args, kwargs: the task's own.

    Returns:
        The result.

    Raises:
        NotInWorkerError: there is no child to talk to, nor will be.
        Exception: as `outcome.conclude`, `jobs.PoolJob.exchange` and `protocol.encode_request`.
    """
    if not _may_exchange(task):
        raise _not_here(task)
    job: Exchange = _current.job
    request = task.request
    if task.track_started and not task.ignore_result:
        # The tracer has stored its own pid; what executes is the child.
        task.update_state(state=STARTED, meta={"pid": job.pid, "hostname": request.hostname})
    line = encode_request(job.task_id, payload(task, args, kwargs))
    reply = job.exchange(line, partial(_store_progress, task))
    over = job.soft_timeout if job.cancelled is CancelReason.SOFT_TIME_LIMIT else None
    return conclude(task, reply, throttle_max_retries, over)


def _store_progress(task: Task, meta: dict[str, Any]) -> None:
    request = task.request
    # Of a task whose end is not stored, nobody would ever learn that it came.
    if task.ignore_result or getattr(request, "ignore_result", False):
        return
    try:
        task.update_state(state=PROGRESS, meta=meta)
    except Exception as exc:
        logger.warning(
            "The progress of %s[%s] can't be stored; the job goes on: %r",
            task.name,
            request.id,
            exc,
        )


def payload(task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the payload of the current request of `task`, as ``docs/protocol.md`` has it."""
    request = task.request
    delivery = request.delivery_info or {}
    return {
        "task": task.name,
        "args": args,
        "kwargs": kwargs,
        "retries": request.retries,
        "throttles": throttles_of(task),
        "root_id": request.root_id,
        "parent_id": request.parent_id,
        "group": request.group,
        "queue": delivery.get("routing_key"),
        "redelivered": bool(delivery.get("redelivered")),
        "eta": request.eta,
        "expires": request.expires,
        "timelimit": request.timelimit or (None, None),
        "headers": request.headers or {},
    }
