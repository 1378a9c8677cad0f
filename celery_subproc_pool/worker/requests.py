"""What reaches into Celery's `Request` (5.3 to 5.7: celery/worker/request.py).

The callbacks of a task's job are methods of its `Request`: that is how the pool gets at it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import celery
from billiard.exceptions import TimeLimitExceeded
from celery import signals
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend
from celery.exceptions import TaskRevokedError
from celery.states import REVOKED
from celery.utils.log import get_logger
from celery.worker.request import Request

from .outcome import exception_info

__all__ = (
    "acknowledge_early",
    "deserialized_body",
    "is_cancelled",
    "is_revoked",
    "is_tracer",
    "is_unacknowledged",
    "reject",
    "report_hard_timeout",
    "store_revoked_again",
    "stores_failure",
)

logger = get_logger(__name__)

#: Celery's tracers of task messages (5.3 to 5.7).
_TRACERS = (fast_trace_task, trace_task_ret)


def is_tracer(target: Any, arguments: Sequence[Any], callback: Any) -> bool:
    """Return whether `target` traces a task's message: Celery's own tracer, or a wrapper or
    replacement of it.

    Arguments:
        target: what `apply_async` was given to call.
        arguments: the arguments for it.
        callback: one of the callbacks that `apply_async` was given. If it is a method of a
            `Request`, and the arguments are that request's message, then `target` is a tracer.
    """
    if target is fast_trace_task:
        return True
    request = _request_of(callback)
    if request is not None and len(arguments) == 6 and arguments[1] == request.id:
        return True
    return any(_unwrapped(target) is _unwrapped(tracer) for tracer in _TRACERS)


def _unwrapped(function: Any) -> Any:
    """Return the function that `function` wraps, if `functools.wraps` or wrapt made it; otherwise
    `function` itself."""
    try:
        return inspect.unwrap(function)
    except Exception:
        # It wraps itself, or it has an attribute for every name.
        return function


def report_hard_timeout(job: Any, seconds: float) -> None:
    """Tell Celery that `job`, a `jobs.PoolJob`, has exceeded its hard limit of `seconds`.

    Prefork calls both callbacks. On Celery 5.7, that runs the errbacks, `on_failure` and the
    `task_failure` signal twice (seen). Here all of it happens once. Since 5.7, `on_timeout` does
    all of it. Before, `on_timeout` neither rejects the message nor sends the event and the signal;
    `on_failure` does, but it does not write the log message. Callbacks of anything else than
    Celery's `Request` are both called, as on prefork.
    """
    if _request_of(job.callbacks.error_callback) is None:
        job.callbacks.error_callback(exception_info(TimeLimitExceeded(seconds)))
        job.callbacks.timeout_callback(soft=False, timeout=seconds)
        return
    if celery.VERSION >= (5, 7):
        job.callbacks.timeout_callback(soft=False, timeout=seconds)
        return
    logger.error("Hard time limit (%ss) exceeded for %s[%s]", seconds, job.task_name, job.task_id)
    job.callbacks.error_callback(exception_info(TimeLimitExceeded(seconds)))


def deserialized_body(callback: Callable[..., Any]) -> Any:
    """Return the body of a message as Celery's `Request` deserialized it.

    Arguments:
        callback: one of the callbacks that `apply_async` was given.

    Returns:
        None if it is not known, or if a receiver of `task_received` may have changed it: the tracer
        would deserialize the message again.
    """
    request = _request_of(callback)
    if request is None or signals.task_received.receivers:
        return None
    return request.message.payload


def _request_of(callback: Callable[..., Any]) -> Any:
    """Return the `celery.worker.request.Request` that `callback` is a method of, or None."""
    request = getattr(callback, "__self__", None)
    return request if isinstance(request, Request) else None


def is_cancelled(job: Any) -> bool:
    """Return whether Celery ends `job`, a `jobs.PoolJob`, because the worker stops or has lost its
    broker; not because it was revoked.

    A cold shutdown cancels its jobs before it sets `state.should_terminate` (`Request.cancel`).
    """
    request = _request_of(job.callbacks.error_callback)
    return request is not None and request._already_cancelled


def is_revoked(job: Any) -> bool:
    """Return whether `job`, a `jobs.PoolJob` that was not begun, is revoked or has expired. Celery
    has done then what follows from that (`Request.revoked`)."""
    request = _request_of(job.callbacks.error_callback)
    try:
        return request is not None and bool(request.revoked())
    except Exception:
        logger.exception("Celery failed when it was asked whether %s is revoked", job.title)
        return False


def is_unacknowledged(job: Any) -> bool:
    """Return whether the broker still has the message of `job`, a `jobs.PoolJob`, and delivers it
    again when the worker is gone (`Request.acknowledged`)."""
    request = _request_of(job.callbacks.error_callback)
    return request is not None and not request.acknowledged


def reject(job: Any) -> None:
    """Reject the message of `job`, a `jobs.PoolJob`: the broker drops it or dead-letters it, and
    does not deliver it again. Do nothing if it was acknowledged early.

    Celery gives the pool no callback for that.
    """
    request = _request_of(job.callbacks.error_callback)
    if request is not None:
        request.reject(requeue=False)


def stores_failure(job: Any) -> bool:
    """Return whether Celery stores in the worker that `job`, a `jobs.PoolJob`, was lost or timed
    out (`Request.on_failure`, `on_timeout`), in a backend that can be asked whether it answers."""
    request = _request_of(job.callbacks.error_callback)
    if request is None or not request.store_errors:
        return False
    return not isinstance(request.task.backend, (DisabledBackend, RPCBackend))


def acknowledge_early(job: Any) -> None:
    """Acknowledge the message of `job`, a `jobs.PoolJob`, unless its task has `acks_late`.

    `Request.on_accepted` does the same.
    """
    request = _request_of(job.callbacks.error_callback)
    if request is not None and not request.task.acks_late:
        request.acknowledge()


def store_revoked_again(job: Any) -> None:
    """Store the state REVOKED of `job`, a `jobs.PoolJob`, once more, if it is revoked.

    Celery stores it before it tells the pool (`Request.terminate`). At that moment a Python child
    may be about to store its own result. Only the state is stored again: the rest of
    `mark_as_revoked`, such as telling a chord, is done.
    """
    request = _request_of(job.callbacks.error_callback)
    if request is not None and request._already_revoked and request.store_errors:
        request.task.backend.store_result(
            job.task_id, TaskRevokedError("terminated"), REVOKED, request=request._context
        )
