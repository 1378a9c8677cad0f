"""Tells Celery and the log how jobs ended, if no tracer in the worker does.

All of it is called on the engine's thread, and calls Celery's callbacks.
"""

from __future__ import annotations

from billiard.exceptions import SoftTimeLimitExceeded
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
from ..errors import PoisonousTaskError
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
    store_revoked_again,
)

__all__ = (
    "acceptance_failed",
    "end_failed",
    "for_tracer",
    "refused",
    "report",
)

logger = get_logger(__name__)


def for_tracer(result: Outcome, facts: ChildFacts | None) -> messages.Reply | Exception | None:
    """Return what the tracer of an external job needs to end it: a reply, or an exception to raise.

    Arguments:
        result: how the job's time with its child ended.
        facts: what is known of the child.

    Returns:
        None if the tracer has no part in this end: `report` tells Celery of it.
    """
    if isinstance(result, Answered):
        return result.reply
    if isinstance(result, Faulted):
        return outcome.protocol_fault(result.reason, facts)
    if isinstance(result, SoftTimedOut):
        over: Exception = SoftTimeLimitExceeded(result.seconds)
        return over
    return None


def report(app: Celery, job: PoolJob, result: Outcome, facts: ChildFacts | None) -> None:
    """Tell Celery of an end that no tracer in the worker has a part in.

    Arguments:
        app: the worker's app.
        job: the job that ended.
        result: how its time with its child ended.
        facts: what is known of the child.
    """
    callbacks = job.callbacks
    if isinstance(result, Answered):
        assert isinstance(result.reply, (python.Traced, python.Returned))
        _report_traced(app, job, result.reply)
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
        if isinstance(result, Terminated) and job.stored_before:
            store_revoked_again(job)


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


def _report_traced(app: Celery, job: PoolJob, reply: python.Traced | python.Returned) -> None:
    """Tell Celery how the trace in a Python child ended, or the caller how a callable ended."""
    try:
        end = codec.decode_end(app, reply)
    except Exception as exc:
        # Whatever it is, the job has ended.
        end = codec.End(True, outcome.exception_info(exc))
    callbacks = job.callbacks
    (callbacks.error_callback if end.escaped else callbacks.callback)(end.result)
