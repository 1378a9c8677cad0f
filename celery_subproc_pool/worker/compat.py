"""What the versions of Celery and kombu need done differently in the worker.

`python_child.compat` has the same for Python children; `requests` has what reaches into Celery's
`Request`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import celery
from celery import Task, _state
from celery.app.task import Context
from celery.utils.log import get_logger
from kombu.message import Message

__all__ = (
    "app_argument",
    "as_current",
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
