"""What the versions of Celery and kombu need done differently: all of it stands here.

Layer: above `outcome`, below all that meets Celery; imports Celery and kombu.
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
from celery.backends.base import DisabledBackend
from celery.utils.log import get_logger
from kombu.message import Message

__all__ = (
    "app_argument",
    "as_current",
    "ignores_result",
    "is_observed",
    "may_be_observed",
    "resolve_auto_concurrency",
    "run_queued_acks",
)

logger = get_logger(__name__)


def resolve_auto_concurrency(worker: Any) -> None:
    """Let `worker`, whose pool is ours, have as many children with ``-c auto`` as it may use CPUs.

    Celery 5.7 brought ``auto``. It respects a container's quota for subclasses of prefork's pool,
    and takes all other pools for such as need no CPU. Call it from the signal `worker_init`:
    right after that, Celery looks for itself.
    """
    if celery.VERSION >= (5, 7):
        from celery.utils.sysinfo import cpu_budget, is_auto_concurrency

        if is_auto_concurrency(worker.concurrency):
            worker.concurrency = cpu_budget().count


def ignores_result(task: Task, request: Mapping[str, Any]) -> bool:
    """Return whether nothing is to be stored of a request of `task`, of which `request` has the
    fields.

    Since Celery 5.7 the request's own word wins (celery/app/task.py: `get_actual_ignore_result`);
    before, either's is enough.
    """
    if isinstance(task.backend, DisabledBackend):
        return True
    asked = request.get("ignore_result")
    if celery.VERSION >= (5, 7) and asked is not None:
        return bool(asked)
    return bool(task.ignore_result or asked)


def is_observed() -> bool:
    """Return whether anybody listens to what Celery's tracer signals of each task."""
    return bool(
        signals.task_prerun.receivers
        or signals.task_postrun.receivers
        or signals.task_success.receivers
    )


#: What a tracer calls of a task's class, in Celery 5.3 to 5.7 (celery/app/trace.py:
#: `build_tracer`). Of later ones nothing is known.
_CALLED_OF_TASKS = ("__call__", "before_start", "on_success", "after_return")

#: The modules whose functions let nobody see a trace. A running worker has replaced
#: `Task.__call__` by one of the second (`setup_worker_optimizations`).
_SILENT_MODULES = {
    "celery.app.task",
    "celery.app.trace",
    "celery.backends.base",
    "celery.loaders.base",
    f"{__package__}.tasks",
}


def may_be_observed(app: Celery, task: Task) -> bool:
    """Return whether something but Celery's own code and ours is called when `task` is traced and
    succeeds, whose result is ignored.

    Packages that watch tasks wrap what a tracer calls, the tracer, or what makes it (Sentry: all of
    it; New Relic: the last).
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

    The globals tell: `functools.wraps` and wrapt's objects pass on the name of the module, and the
    latter even the type, for `isinstance`.
    """
    if type(function) is not FunctionType:
        return False
    return function.__globals__.get("__name__") in _SILENT_MODULES


def run_queued_acks(hub: Any) -> None:
    """Send the acknowledgements that wait for the hub's next turn.

    While the pool drains, nobody turns the hub, and an ack that is never sent makes the broker
    deliver a finished task again. Only acks and rejects are run: the transport's own reader may
    wait there too, and would deliver messages to a pool that takes no more.

    kombu 5.3 to 5.7 keep what `call_soon` was given in a set that `_pop_ready` empties; Celery's
    consumer queues the bound methods `ack_log_error` and `reject_log_error` of a message.
    """
    for callback in hub._pop_ready():
        function = getattr(callback, "fun", None)
        if isinstance(getattr(function, "__self__", None), Message):
            try:
                callback()
            except Exception:
                # kombu logs connections that are lost, but has other errors for some.
                logger.exception(
                    "An acknowledgement can't be sent: its job will be delivered again"
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
