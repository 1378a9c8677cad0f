"""Tasks that run in external children: the base class, and the body that they get.

That body (`run_in_child`) is one exchange with a child. It runs in a tracing thread of the worker.

Web processes import this module to send tasks: it must not import the engine or `celery.worker`.
"""

from __future__ import annotations

import threading
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, Protocol

from celery import Celery, Task
from celery.app.task import Context
from celery.states import STARTED
from celery.utils.log import get_logger

from ..errors import NotInWorkerError
from ..wire.messages import CancelReason, Reply, encode_request
from .compat import ignores_result
from .outcome import conclude, throttles_of

__all__ = ("PROGRESS", "Exchange", "SubprocTask", "exchanging", "payload", "run_in_child")

logger = get_logger(__name__)

#: The state of a task that has told of its progress, as in Celery's documentation.
PROGRESS = "PROGRESS"

_current = threading.local()


class Exchange(Protocol):
    """A job that can talk to its child."""

    #: Celery's id of the task.
    task_id: str
    #: Its soft time limit, in seconds.
    soft_timeout: float | None
    #: Why the child was told to end it; None if it was not.
    cancelled: CancelReason | None

    @property
    def pid(self) -> int:
        """The child's pid."""

    def exchange(self, line: bytes, on_progress: Callable[[dict[str, Any]], None]) -> Reply:
        """Give the request `line` to the child, and return its reply. Meanwhile, call
        `on_progress` with the progress that the child tells of."""

    def storing(self) -> AbstractContextManager[None]:
        """Let a state before the last one be stored within this context."""


class _OfItsApp(ABCMeta):
    """Lets the tasks of an app also derive from the task class of that app.

    For a task with a ``base``, Celery sets ``app`` in the class, but derives it from the base
    instead of from ``app.Task`` (5.3 to 5.7: `Celery._task_from_fun`). The task needs what
    ``app.Task`` offers, too: Django's ``delay_on_commit``, Flask's context, a project's own.

    It is an `ABCMeta`, because bases of tasks often are abstract base classes.
    """

    def __new__(
        mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any
    ) -> Any:
        app: Any = namespace.get("app")
        # Not `isinstance`: for the proxy `celery.current_app`, that would make an app.
        if not issubclass(type(app), Celery):
            return super().__new__(mcls, name, bases, namespace, **options)
        bases = _with_class_of(app, bases)
        metaclasses: tuple[Any, Any] = mcls, type(app.Task)
        combined = _combined(*metaclasses)
        return super(_OfItsApp, combined).__new__(combined, name, bases, namespace, **options)


def _with_class_of(app: Celery, bases: tuple[type, ...]) -> tuple[type, ...]:
    """Return `bases` with the task class of `app` at the end. It replaces those that it derives
    from."""
    own: type = app.Task
    if any(issubclass(base, own) for base in bases):
        return bases
    return (*(base for base in bases if not issubclass(own, base)), own)


@cache
def _combined(one: Any, other: Any) -> Any:
    """Return a metaclass for a class whose bases have the metaclasses `one` and `other`."""
    if issubclass(one, other):
        return one
    if issubclass(other, one):
        return other
    return type(f"{one.__name__}_{other.__name__}", (one, other), {})


class SubprocTask(Task, metaclass=_OfItsApp):
    """A task that an external child does. The body of its function never runs.

    ::

        @app.task(base=SubprocTask, name="billing.charge", child="rails")
        def charge(amount, currency="EUR"): ...

    Without `child`, the first group whose ``tasks`` match the name takes it.

    It has what the app's own task class (``app.Task``) has: methods, options, hooks, and a
    ``__call__``, which is called around the exchange with the child.
    """

    abstract = True

    #: The name of the group of children, or None.
    child: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without a child (a direct call, `apply()`, another pool), the body must not run.
        if _request_of_job(self) is None:
            raise _not_here(self)
        call = super().__call__
        if call.__func__ is Task.__call__:
            # Celery's own would push a request without an id: the task could not be retried.
            call = self.run
        return call(*args, **kwargs)


@contextmanager
def exchanging(job: Exchange) -> Iterator[None]:
    """Let the task of `job` talk to its child, within this context and in this thread."""
    _current.job = job
    try:
        yield
    finally:
        _current.job = None


def _request_of_job(task: Task) -> Context | None:
    """Return the request of `task` for which this thread has a child; None if it has no child.

    It is not always the uppermost one: a ``__call__`` of the app's class may call Celery's own
    `Task.__call__`, and that pushes a request without an id.
    """
    job: Exchange | None = getattr(_current, "job", None)
    if job is None:
        return None
    requests = reversed(task.request_stack.stack)
    return next((request for request in requests if request.id == job.task_id), None)


@contextmanager
def _uppermost(task: Task, request: Context) -> Iterator[None]:
    """Make `request` the current one of `task` within this context."""
    if request is task.request:
        yield
        return
    task.request_stack.push(request)
    try:
        yield
    finally:
        task.request_stack.pop()


def _not_here(task: Task) -> NotInWorkerError:
    return NotInWorkerError(
        f"{task.name} runs in an external child process: send it with delay() to a worker that was"
        " started with -P celery_subproc_pool:Pool. It can't be called directly, eagerly or by"
        " another pool. In tests, start such a worker with"
        " celery.contrib.testing.worker.start_worker(app, pool='celery_subproc_pool:Pool',"
        " perform_ping_check=False), or patch what calls the task"
    )


def run_in_child(
    task: Task,
    throttle_max_retries: int | None,
    track_started: bool,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Let a child do the current request of `task`: the body of each task that a group takes.

    Arguments:
        task: the task.
        throttle_max_retries: how often it may be throttled; None is without limit.
        track_started: whether its state is to be STARTED while it runs.
        args, kwargs: the task's own.

    Returns:
        The result.

    Raises:
        NotInWorkerError: this is not a worker with children.
        Exception: as `outcome.conclude`, `jobs.PoolJob.exchange` and `messages.encode_request`.
    """
    request = _request_of_job(task)
    if request is None:
        raise _not_here(task)
    job: Exchange = _current.job
    if request.retries is None:
        # Foreign producers send null, and Celery adds to it.
        request.retries = 0
    with _uppermost(task, request):
        if track_started:
            _store(task, job, STARTED, {"pid": job.pid, "hostname": request.hostname})
        message = payload(task.name, vars(request), request.headers or {}, args, kwargs)
        line = encode_request(job.task_id, message)
        reply = job.exchange(line, partial(_store_progress, task, job))
        over = job.soft_timeout if job.cancelled is CancelReason.SOFT_TIME_LIMIT else None
        return conclude(task, reply, throttle_max_retries, over)


def _store(task: Task, job: Exchange, state: str, meta: dict[str, Any]) -> None:
    """Store `state` of the current request of `task`, unless its result is ignored: the state would
    stay forever."""
    if not ignores_result(task, vars(task.request)):
        with job.storing():
            task.update_state(state=state, meta=meta)


def _store_progress(task: Task, job: Exchange, meta: dict[str, Any]) -> None:
    try:
        _store(task, job, PROGRESS, meta)
    except Exception as exc:
        logger.warning(
            "The progress of %s[%s] can't be stored; the job goes on: %r",
            task.name,
            job.task_id,
            exc,
        )


def payload(
    name: str,
    request: Mapping[str, Any],
    headers: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the payload of a request, as ``docs/protocol.md`` has it.

    Arguments:
        name: the name of the task.
        request: the fields of the request.
        headers: the request's headers that are not Celery's own.
        args, kwargs: the task's own.
    """
    get = request.get
    delivery = get("delivery_info") or {}
    return {
        "task": name,
        "args": args,
        "kwargs": kwargs,
        "retries": get("retries") or 0,
        "throttles": throttles_of(headers),
        "root_id": get("root_id"),
        "parent_id": get("parent_id"),
        "group": get("group"),
        "queue": delivery.get("routing_key"),
        "redelivered": bool(delivery.get("redelivered")),
        "eta": get("eta"),
        "expires": get("expires"),
        "timelimit": get("timelimit") or (None, None),
        "headers": headers,
    }
