"""What is asked of Celery's `Request`, whose methods the callbacks of a job are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import celery
from billiard.exceptions import TimeLimitExceeded
from celery import signals
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.exceptions import TaskRevokedError
from celery.states import REVOKED
from celery.utils.log import get_logger
from celery.worker.request import Request

from .outcome import exception_info

__all__ = (
    "acknowledge_early",
    "deserialized_body",
    "is_cancelled",
    "is_tracer",
    "is_unacknowledged",
    "reject",
    "report_hard_timeout",
    "store_revoked_again",
)

logger = get_logger(__name__)

#: Celery's tracers of task messages (5.3 to 5.7).
_TRACERS = (fast_trace_task, trace_task_ret)


def is_tracer(target: Any, arguments: Sequence[Any], callback: Any) -> bool:
    """Return whether `target`, which the pool is to call, traces a task's message: it is Celery's
    own tracer, or what somebody has wrapped around it or put into its place.

    Arguments:
        target: what `apply_async` was given.
        arguments: its arguments.
        callback: one of those that `apply_async` was given. What a `Request` has called with its
            own message traces that message, whatever it is.
    """
    if target is fast_trace_task:
        return True
    request = _request_of(callback)
    if request is not None and len(arguments) == 6 and arguments[1] == request.id:
        return True
    return any(_unwrapped(target) is _unwrapped(tracer) for tracer in _TRACERS)


def _unwrapped(function: Any) -> Any:
    """Return what was wrapped, as `functools.wraps` and wrapt tell; `function` itself otherwise."""
    try:
        return inspect.unwrap(function)
    except Exception:
        # It wraps itself, or has an attribute for every name.
        return function


def report_hard_timeout(job: Any, seconds: float) -> None:
    """Tell Celery that the hard limit of `job`, a `jobs.PoolJob`, was over after `seconds`.

    Prefork calls both callbacks, which on Celery 5.7 runs the errbacks, `on_failure` and the
    `task_failure` signal twice (seen). Here everything happens once: since 5.7 `on_timeout` does
    it all; before, it neither rejects the message nor sends the event and the signal, but
    `on_failure` does, and lacks the words for the log. Others than Celery's `Request` are told as
    by prefork.
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
    """Return the body of a message as Celery has deserialized it when it came; None if it is not
    known, or somebody may have changed it since: the tracer would read the message anew.

    Arguments:
        callback: one of those that `apply_async` was given: a method of Celery's `Request` (5.3 to
            5.7), which has looked at the arguments.
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
    broker, and not because somebody has revoked it.

    A cold shutdown cancels its jobs before it says so anywhere (5.3 to 5.7: `Request.cancel`).
    """
    request = _request_of(job.callbacks.error_callback)
    return request is not None and request._already_cancelled


def is_unacknowledged(job: Any) -> bool:
    """Return whether the broker still has the message of `job`, a `jobs.PoolJob`, which it delivers
    again when the worker is gone (5.3 to 5.7: `Request.acknowledged`)."""
    request = _request_of(job.callbacks.error_callback)
    return request is not None and not request.acknowledged


def reject(job: Any) -> None:
    """Reject the message of `job`, a `jobs.PoolJob`: the broker drops it or puts it aside, and
    does not deliver it again.

    Celery has no callback for it, but its callbacks are methods of the `Request` that has one
    (5.3 to 5.7: celery/worker/request.py). Of a message that was acknowledged early, nothing is
    left to reject.
    """
    request = _request_of(job.callbacks.error_callback)
    if request is not None:
        request.reject(requeue=False)


def acknowledge_early(job: Any) -> None:
    """Acknowledge the message of `job`, a `jobs.PoolJob`, if that is not to wait for its end (as
    `Request.on_accepted` does, 5.3 to 5.7)."""
    request = _request_of(job.callbacks.error_callback)
    if request is not None and not request.task.acks_late:
        request.acknowledge()


def store_revoked_again(job: Any) -> None:
    """Store that `job`, a `jobs.PoolJob`, is REVOKED, if it is, once more.

    Celery stores it before it tells the pool (5.3 to 5.7: `Request.terminate`), when the tracing
    thread may be about to store an earlier state, and a Python child its own end of the job. Only
    the state is stored again: the rest of `mark_as_revoked`, such as telling a chord, has been
    done.
    """
    request = _request_of(job.callbacks.error_callback)
    if request is not None and request._already_revoked and request.store_errors:
        request.task.backend.store_result(
            job.task_id, TaskRevokedError("terminated"), REVOKED, request=request._context
        )
