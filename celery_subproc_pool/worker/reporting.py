"""Tells Celery and the log how jobs ended.

All of it is called on the engine's thread, and calls Celery's callbacks.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.utils.log import get_logger

from ..core.outcomes import (
    Answered,
    ChildFacts,
    Faulted,
    Lost,
    Outcome,
    SoftTimedOut,
    Terminated,
    TimedOut,
)
from ..errors import PoisonousTaskError, ProtocolFault
from ..python_child import codec
from ..wire import messages, python
from . import outcome
from .intake import ODD_VALUE_ERRORS
from .jobs import PoolJob
from .requests import (
    acknowledge_early,
    is_unacknowledged,
    reject,
    report_hard_timeout,
)

__all__ = (
    "acceptance_failed",
    "answer_for_tracer",
    "end_failed",
    "refused",
    "report",
    "report_traced",
)

logger = get_logger(__name__)


def answer_for_tracer(
    job: PoolJob, result: Outcome, facts: ChildFacts | None
) -> python.Answer | None:
    """Return what a tracer needs to end an external job.

    Arguments:
        job: the job.
        result: how its time with its child ended.
        facts: what is known of the child.

    Returns:
        None if a tracer has no part in this end: `report` tells Celery of it.
    """
    if isinstance(result, Answered):
        told = job.cancelled is messages.CancelReason.SOFT_TIME_LIMIT
        reply: Any = result.reply
        return python.Answer(reply=reply, over=job.soft_timeout if told else None)
    if isinstance(result, Faulted):
        return python.Answer(fault=str(outcome.protocol_fault(result.reason, facts)))
    if isinstance(result, SoftTimedOut):
        return python.Answer(over=result.seconds)
    return None


def report(app: Celery, job: PoolJob, result: Outcome, facts: ChildFacts | None) -> None:
    """Tell Celery of an end that no tracer has a part in, or how a Python child's job ended.

    Arguments:
        app: the worker's app.
        job: the job that ended.
        result: how its time with its child ended.
        facts: what is known of the child.
    """
    callbacks = job.callbacks
    if isinstance(result, Answered):
        report_traced(app, job, result.reply)
    elif isinstance(result, TimedOut):
        if result.silent:
            logger.warning(
                "The child of %s told nothing of it for %g s (inactivity_timeout)",
                job.title,
                result.seconds,
            )
        report_hard_timeout(job, result.seconds)
    elif isinstance(result, Faulted):
        fault = outcome.protocol_fault(result.reason, facts)
        callbacks.error_callback(outcome.exception_info(fault))
    elif isinstance(result, Lost) and result.stranded and is_unacknowledged(job):
        logger.info("%s was not begun, and stays with the broker", job.title)
    elif isinstance(result, (Lost, Terminated)):
        error = outcome.exception(result, facts)
        if isinstance(error, PoisonousTaskError):
            reject(job)
        callbacks.error_callback(outcome.exception_info(error))


def refused(job: PoolJob, error: Exception) -> None:
    """Tell Celery that `job` fails with `error`, before a child could have it."""
    # Celery acknowledges most messages when their job is accepted. This one never will be: its
    # message would count as in flight for good, and would be delivered again.
    acknowledge_early(job)
    job.callbacks.error_callback(outcome.exception_info(error))


def acceptance_failed(job: PoolJob) -> None:
    """Log that Celery raised when it was told that `job` is accepted. A child does it anyway."""
    logger.exception("Celery failed when it was told that %s has begun; it goes on", job.title)
    # Otherwise the message would count as in flight for good.
    acknowledge_early(job)


def end_failed(job: PoolJob, error: Exception) -> None:
    """Log that Celery raised `error` when it was told how `job` ended."""
    logger.error(
        "Celery failed when it was told how %s ended: %r", job.title, error, exc_info=error
    )
    if isinstance(error, ODD_VALUE_ERRORS):
        # It would fail in the same way each time the broker delivers it.
        reject(job)


def report_traced(app: Celery, job: PoolJob, reply: messages.Reply | None) -> None:
    """Tell Celery how the trace of a task ended, or the caller how a callable ended.

    Arguments:
        app: the worker's app.
        job: the job.
        reply: that of the Python child or the tracer.
    """
    try:
        if not isinstance(reply, (python.Traced, python.Returned)):
            raise ProtocolFault(f"the tracer let go of the job without a reason: {reply!r}")
        end = codec.decode_end(app, reply)
    except Exception as exc:
        # Whatever it is, the job has ended.
        end = codec.End(True, outcome.exception_info(exc))
    callbacks = job.callbacks
    (callbacks.error_callback if end.escaped else callbacks.callback)(end.result)
