"""Tasks that run in external children: the base class, and the binding of names to groups.

Layer: above `outcome`; imports Celery. `run()` of a bound task is one exchange with a child, made
in the tracing thread that the pool started for the job.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from celery import Celery, Task
from celery.states import STARTED

from .config import CELERY_PREFIX, ROOT, PoolSettings
from .errors import ConfigError, NotInWorkerError
from .outcome import conclude, throttles_of
from .protocol import Reply, encode_request

__all__ = (
    "Exchange",
    "SubprocTask",
    "bind_task",
    "bind_tasks",
    "exchanging",
    "needs_python_children",
    "payload",
    "refuse_task",
    "tasks_without_children",
)

_current = threading.local()


class Exchange(Protocol):
    """A job with a child to talk to."""

    #: Celery's id of the task.
    task_id: str

    @property
    def pid(self) -> int:
        """The child's pid."""

    def exchange(self, line: bytes) -> Reply:
        """Give the request `line` to the child, and return its reply."""


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


def bind_tasks(app: Celery, settings: PoolSettings) -> dict[str, str]:
    """Register the task names that the settings list, and bind every task that a group takes.

    Arguments:
        app: the worker's app, finalized.
        settings: the pool's settings.

    Returns:
        The group of each task that has one, by the task's name.

    Raises:
        ConfigError: a task names a group that there is not.
    """
    for child in settings.children.values():
        for name in child.exact_tasks():
            if name not in app.tasks:
                app.register_task(type("Registered", (SubprocTask,), {"name": name})())
    groups: dict[str, str] = {}
    for name, task in app.tasks.items():
        group = bind_task(task, settings)
        if group is not None:
            groups[name] = group
    return groups


def bind_task(task: Task, settings: PoolSettings) -> str | None:
    """Bind `task` to the group of external children that takes it.

    Returns:
        The group's name; None if no group takes the task.

    Raises:
        ConfigError: the task names a group that there is not.
    """
    group = _group_of(task, settings)
    if group is not None:
        _bind(task, partial(_run, task, settings.children[group].throttle_max_retries))
    return group


def refuse_task(task: Task) -> None:
    """Let `task`, for which this worker has no children, fail with an error that says so."""
    _bind(task, partial(_refuse, task))


def tasks_without_children(app: Celery, groups: Mapping[str, str]) -> list[str]:
    """Return the names of the tasks of `app`, but for Celery's own, that are not in `groups`."""
    names = (name for name in app.tasks if not name.startswith(CELERY_PREFIX))
    return sorted(name for name in names if name not in groups)


def needs_python_children(app: Celery, settings: PoolSettings, groups: Mapping[str, str]) -> bool:
    """Return whether there is, or may come, a task that no external child takes."""
    return not settings.children or bool(tasks_without_children(app, groups))


def _group_of(task: Task, settings: PoolSettings) -> str | None:
    name: str | None = getattr(task, "child", None) if isinstance(task, SubprocTask) else None
    if name is None:
        return settings.group_for(task.name)
    if name not in settings.children:
        known = ", ".join(settings.children) or "none"
        raise ConfigError(
            f"{ROOT}.children: the task {task.name} names the child {name!r}, which is not"
            f" configured; there are: {known}"
        )
    return name


def _bind(task: Task, run: Callable[..., Any]) -> None:
    """Make `run` the body of `task`. With `autoretry_for`, `task.run` is Celery's wrapper of
    `_orig_run` (celery/app/autoretry.py), and must go on wrapping."""
    if hasattr(task, "_orig_run"):
        task._orig_run = run
    else:
        task.run = run


def _refuse(task: Task, /, *args: Any, **kwargs: Any) -> Any:
    raise ConfigError(
        f"no children of this worker take the task {task.name}, which was registered after the"
        f" worker started: add its name to {ROOT}.children.<name>.tasks, or start the worker again"
        " for it to have Python children too"
    )


def _run(task: Task, throttle_max_retries: int | None, /, *args: Any, **kwargs: Any) -> Any:
    if not _may_exchange(task):
        raise _not_here(task)
    job: Exchange = _current.job
    request = task.request
    if task.track_started and not task.ignore_result:
        # The tracer has stored its own pid; what executes is the child.
        task.update_state(state=STARTED, meta={"pid": job.pid, "hostname": request.hostname})
    line = encode_request(job.task_id, payload(task, args, kwargs))
    return conclude(task, job.exchange(line), throttle_max_retries)


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
