"""Tasks that run in external children: the base class, and the body that they get.

That body (`run_in_child`) is one exchange with a child. It runs in a tracer.

Web processes import this module to send tasks: it must not import the engine or `celery.worker`.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, Protocol

from celery import Celery, Task
from celery.app.task import Context
from celery.states import STARTED
from celery.utils.log import get_logger

from ..errors import NotInWorkerError
from ..signals import child_request
from ..wire.messages import Reply, encode_request
from ..wire.python import Exchange
from .compat import ignores_result
from .conclusion import conclude, throttles_of

__all__ = (
    "CURRENT",
    "PROGRESS",
    "JobOfChild",
    "SubprocTask",
    "is_declared",
    "let_child_run",
    "payload",
    "register",
)

logger = get_logger(__name__)

#: The state of a task that has told of its progress, as in Celery's documentation.
PROGRESS = "PROGRESS"


class JobOfChild(Protocol):
    """A job whose body is an exchange with an external child."""

    #: Celery's id of the task.
    task_id: str
    #: What is to be known of the child; None: there is none.
    facts: Exchange | None
    #: The task and its request, once a state was stored before the last one.
    stored: tuple[Task, Context] | None
    #: The same, once the body of the task was reached.
    asked: tuple[Task, Context] | None

    def exchange(
        self, line: bytes, on_progress: Callable[[dict[str, Any]], None]
    ) -> tuple[Reply, float | None]:
        """Give the request `line` to the child. Meanwhile, call `on_progress` with the progress
        that the child tells of.

        Returns:
            The child's reply; and the soft time limit in seconds, if the child was told that it is
            over.
        """


#: The job that the tracer traces in this context.
CURRENT: ContextVar[JobOfChild | None] = ContextVar("CURRENT", default=None)


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


def _request_of_job(task: Task) -> Context | None:
    """Return the request of `task` for which there is a child in this context, or None.

    It is not always the uppermost one: a ``__call__`` of the app's class may call Celery's own
    `Task.__call__`, and that pushes a request without an id.
    """
    job = CURRENT.get()
    if job is None:
        return None
    requests = reversed(task.request_stack.stack)
    return next((request for request in requests if request.id == job.task_id), None)


def _not_here(task: Task) -> NotInWorkerError:
    return NotInWorkerError(
        f"{task.name} runs in an external child process: send it with delay() to a worker that was"
        " started with -P celery_subproc_pool:Pool. It can't be called directly, eagerly or by"
        " another pool. In tests, start such a worker with"
        " celery.contrib.testing.worker.start_worker(app, pool='celery_subproc_pool:Pool',"
        " perform_ping_check=False), or patch what calls the task"
    )


class _Registered(SubprocTask):
    """A task that no code of the project declares: the settings or the children have named it."""

    abstract = True


def register(app: Celery, name: str) -> None:
    """Register a task that no code of the project declares."""
    # With `app`, the task derives from the app's own task class, as a declared one.
    facts: dict[str, Any] = {"name": name, "app": app}
    app.register_task(type("Registered", (_Registered,), facts)())


def is_declared(task: Task) -> bool:
    """Return whether code of the project declares `task`."""
    return not isinstance(task, _Registered)


def let_child_run(task: Task) -> None:
    """Make the exchange with a child the body of `task`.

    With `autoretry_for`, `task.run` is Celery's wrapper of `_orig_run` (celery/app/autoretry.py):
    keep the wrapper.
    """
    # Celery's tracer would store STARTED with the tracer's pid.
    task.track_started = False
    body = partial(_run_in_child, task)
    if hasattr(task, "_orig_run"):
        task._orig_run = body
    else:
        task.run = body


def _run_in_child(task: Task, /, *args: Any, **kwargs: Any) -> Any:
    """Let a child do the current request of `task`, whose own arguments these are.

    Returns:
        The result.

    Raises:
        NotInWorkerError: this is no job of an external child.
        Exception: as `conclusion.conclude`, `JobOfChild.exchange` and `messages.encode_request`.
    """
    request, job = _request_of_job(task), CURRENT.get()
    if request is None or job is None or job.facts is None:
        raise _not_here(task)
    if request.retries is None:
        # Foreign producers send null, and Celery adds to it.
        request.retries = 0
    job.asked = task, request
    if request is task.request:
        return _exchange(task, request, job, job.facts, args, kwargs)
    task.request_stack.push(request)
    try:
        return _exchange(task, request, job, job.facts, args, kwargs)
    finally:
        task.request_stack.pop()


def _exchange(
    task: Task,
    request: Context,
    job: JobOfChild,
    facts: Exchange,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Let a child do `request`, which is the current one of `task`."""
    if facts.tracked:
        _store(task, job, STARTED, {"pid": facts.pid, "hostname": request.hostname})
    # A copy: what receivers add is for the child, not for a retry of the task.
    headers = dict(request.headers or {})
    child_request.send(sender=task, task_id=job.task_id, headers=headers)
    message = payload(task.name, vars(request), headers, args, kwargs)
    line = encode_request(job.task_id, message)
    reply, over = job.exchange(line, partial(_store_progress, task, job))
    return conclude(task, reply, facts.throttle_max_retries, over)


def _store(task: Task, job: JobOfChild, state: str, meta: dict[str, Any]) -> None:
    """Store `state` of the current request of `task`, unless its result is ignored: the state would
    stay forever."""
    request = task.request
    if not ignores_result(task, vars(request)):
        job.stored = task, request
        task.update_state(state=state, meta=meta)


def _store_progress(task: Task, job: JobOfChild, meta: dict[str, Any]) -> None:
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
