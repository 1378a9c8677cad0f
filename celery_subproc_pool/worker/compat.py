"""What the versions of Celery and kombu need done differently in the worker.

`python_child.compat` has the same for Python children; `requests` has what reaches into Celery's
`Request`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import celery
from celery import Celery, Task, _state, signals
from celery.app import trace
from celery.app.task import Context
from celery.utils.log import get_logger
from kombu.message import Message

from .. import PACKAGE

__all__ = (
    "app_argument",
    "as_current",
    "is_observed",
    "may_be_observed",
    "resolve_auto_concurrency",
    "run_queued_acks",
)

logger = get_logger(__name__)


def resolve_auto_concurrency(worker: Any) -> None:
    """With ``-c auto``, let `worker`, whose pool is ours, have as many children as CPUs.

    Celery 5.7 introduced ``auto``. Celery respects a container's CPU quota only for subclasses of
    prefork's pool: it assumes that tasks on other pools need no CPU. Call this from the signal
    `worker_init`: Celery resolves ``auto`` right after it.
    """
    if celery.VERSION >= (5, 7):
        from celery.utils.sysinfo import cpu_budget, is_auto_concurrency

        if is_auto_concurrency(worker.concurrency):
            worker.concurrency = cpu_budget().count


def is_observed() -> bool:
    """Return whether the signals that Celery's tracer sends for each task have receivers.

    What a receiver of `worker_process_init` does is unknown here: agents connect to the others
    there.
    """
    return bool(
        signals.worker_process_init.receivers
        or signals.task_prerun.receivers
        or signals.task_postrun.receivers
        or signals.task_success.receivers
    )


#: The methods of a task that a tracer calls, in Celery 5.3 to 5.7 (celery/app/trace.py:
#: `build_tracer`). Later versions are not known.
_CALLED_OF_TASKS = ("__call__", "before_start", "on_success", "after_return")

#: The modules whose functions run no code but Celery's and ours. A running worker has replaced
#: `Task.__call__` by a function of `celery.app.trace` (`setup_worker_optimizations`).
_SILENT_MODULES = {
    "celery.app.task",
    "celery.app.trace",
    "celery.backends.base",
    "celery.loaders.base",
    f"{PACKAGE}.tracer.tasks",
}


def may_be_observed(app: Celery, task: Task) -> bool:
    """Return whether other code than Celery's and ours may be called when `task` is traced and
    succeeds. Its result is ignored.

    Packages that watch tasks wrap what a tracer calls, the tracer, or what makes the tracer
    (Sentry: all three; New Relic: the last).
    """
    loader, backend = type(app.loader), type(task.backend)
    called = [vars(kind).get(name) for kind in type(task).__mro__ for name in _CALLED_OF_TASKS]
    called += [trace.build_tracer, task.__trace__, loader.on_task_init, loader.on_process_cleanup]
    called += [backend.process_cleanup, backend.mark_as_done]
    return (
        celery.VERSION >= (5, 8)
        or not all(function is None or _is_silent(function) for function in called)
        or bool(app.conf.worker_deduplicate_successful_tasks)
    )


def _is_silent(function: object) -> bool:
    """Return whether `function` is Celery's or ours, and not wrapped.

    Look at its globals: a wrapper of `functools.wraps` or wrapt has the module name of what it
    wraps; one of wrapt even passes `isinstance`.
    """
    if type(function) is not FunctionType:
        return False
    return function.__globals__.get("__name__") in _SILENT_MODULES


def run_queued_acks(hub: Any) -> None:
    """Send the acknowledgements that wait for the hub's next turn.

    The hub does not turn while the pool drains. An ack that is never sent makes the broker deliver
    a finished task again. Run only acks and rejects: the transport's own reader may be queued too,
    and it would deliver messages to a pool that takes no more.

    kombu 5.3 to 5.7 keep what `call_soon` was given in a set, and `_pop_ready` empties that.
    Celery's consumer queues the bound methods `ack_log_error` and `reject_log_error` of a message.
    """
    for callback in hub._pop_ready():
        function = getattr(callback, "fun", None)
        if isinstance(getattr(function, "__self__", None), Message):
            try:
                callback()
            except Exception:
                # kombu logs a lost connection; but it may raise other errors for that.
                logger.exception(
                    "An acknowledgement can't be sent: the broker will deliver its job again"
                )
        else:
            hub.call_soon(callback)


def app_argument(parameter: object, argv: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """Return what the option ``-A`` of the `celery` command was given; None if it was not.

    Arguments:
        parameter: the option's value in click's context. Older versions (5.3) have put the app
            that they found there in the name's place.
        argv: the command line, for them.
        environ: the environment, which may have it instead.
    """
    if isinstance(parameter, str):
        return parameter
    for word, following in zip(argv, (*argv[1:], ""), strict=True):
        if word in ("-A", "--app"):
            return following
        if word.startswith("--app="):
            return word.removeprefix("--app=")
        if word.startswith("-A"):
            return word[2:]
    return environ.get("CELERY_APP")


@contextmanager
def as_current(task: Task, context: Context) -> Iterator[None]:
    """Within this context, `task` with the request `context` is the current one, as for Celery's
    `TaskFormatter` of log records. Celery's tracer does it so (5.3 to 5.7)."""
    _state._task_stack.push(task)
    task.request_stack.push(context)
    try:
        yield
    finally:
        task.request_stack.pop()
        _state._task_stack.pop()
