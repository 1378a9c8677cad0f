"""Puts the outcome of a job in Celery's terms: exceptions, `ExceptionInfo`."""

from __future__ import annotations

from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated as BilliardTerminated
from billiard.exceptions import WorkerLostError

from ..core.outcomes import ChildFacts, Lost, Terminated, describe_exit
from ..errors import PoisonousTaskError, ProtocolFault
from ..wire.json_lines import is_explained

__all__ = (
    "exception",
    "exception_info",
    "protocol_fault",
)


def protocol_fault(reason: str, facts: ChildFacts | None) -> ProtocolFault:
    """Return the error of a job whose child broke the protocol. It says what to do about it."""
    advice = (
        " Its stdout is reserved for the protocol's messages, one a line: it must print everything"
        " else to stderr."
    )
    if is_explained(reason):
        advice = ""
    return ProtocolFault(f"{_who(facts)} broke the protocol: {reason}.{advice}{_tail(facts)}")


def exception(outcome: Lost | Terminated, facts: ChildFacts | None) -> Exception:
    """Return billiard's error for a job that was lost or terminated, as on prefork; our own error
    if the job has crashed too many children."""
    error: Exception
    if isinstance(outcome, Terminated):
        error = BilliardTerminated(-outcome.signum)
    elif outcome.crashes:
        error = PoisonousTaskError(
            f"It has crashed {outcome.crashes} children of this worker, as many as max_crashes"
            " allows, and is rejected. The last one:"
            f" {_how(outcome, facts)}.{_tail(facts)}"
        )
    else:
        error = WorkerLostError(f"Worker exited prematurely: {_how(outcome, facts)}.{_tail(facts)}")
    return error


def exception_info(exc: BaseException) -> ExceptionInfo:
    """Return `exc` as Celery's callbacks want it."""
    try:
        raise exc
    except BaseException:
        return ExceptionInfo()


def _how(lost: Lost, facts: ChildFacts | None) -> str:
    if lost.status is None:
        return lost.reason
    reason = f"; {lost.reason}" if lost.reason else ""
    return f"{describe_exit(lost.status, lost.killed_by_others)} ({_who(facts)}{reason})"


def _who(facts: ChildFacts | None) -> str:
    return f"child {facts.group} pid {facts.pid}" if facts is not None else "child"


def _tail(facts: ChildFacts | None) -> str:
    if facts is None or not facts.stderr:
        return ""
    return f" Last stderr lines: {' | '.join(facts.stderr)}"
