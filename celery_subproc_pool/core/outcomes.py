"""How a job ended, and what is known of its child then."""

from __future__ import annotations

import signal

import msgspec

from ..wire.messages import CancelReason, Reply

__all__ = (
    "UNKNOWN_STATUS",
    "Answered",
    "ChildFacts",
    "Dropped",
    "Faulted",
    "Lost",
    "Outcome",
    "SoftTimedOut",
    "Terminated",
    "TimedOut",
    "describe_exit",
)


#: The exit status of a process that nobody was told of: the template that had forked it has died.
UNKNOWN_STATUS = 1 << 16


def describe_exit(status: int, killed_by_others: bool = False) -> str:
    """Return a process' exit status as text, in billiard's words.

    Arguments:
        status: as `subprocess.Popen.returncode`: negative is a signal's number.
        killed_by_others: whether it is a SIGKILL that we did not send.
    """
    if status == UNKNOWN_STATUS:
        return "with an unknown exitcode, as its template has died before"
    if status >= 0:
        return f"exitcode {status}"
    try:
        text = f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"
    # The usual sender is a system that runs out of memory.
    return f"{text}, out of memory?" if killed_by_others else text


class Answered(msgspec.Struct, frozen=True):
    """The child replied."""

    reply: Reply


class Faulted(msgspec.Struct, frozen=True):
    """The child broke the protocol."""

    reason: str


class Lost(msgspec.Struct, frozen=True):
    """The child ended with the job, or no child will do it."""

    #: As `subprocess.Popen.returncode`; None if no single child lost it.
    status: int | None
    #: What was seen before the exit; empty if nothing.
    reason: str
    #: Whether the child got a SIGKILL that we did not send.
    killed_by_others: bool = False
    #: How many children the job has crashed in this worker, once `max_crashes` is reached; else 0.
    crashes: int = 0
    #: Whether no child has begun it and none will, because the worker stops.
    stranded: bool = False


class TimedOut(msgspec.Struct, frozen=True):
    """A hard limit of `seconds` was over."""

    seconds: float
    #: Whether the limit was `inactivity_timeout`.
    silent: bool = False


class SoftTimedOut(msgspec.Struct, frozen=True):
    """The soft limit of `seconds` was over, and the child did not end the job."""

    seconds: float


class Terminated(msgspec.Struct, frozen=True):
    """The job was terminated on request, with signal `signum`."""

    signum: int
    #: Why: it was revoked, or the worker stops or has lost its broker.
    reason: CancelReason = CancelReason.REVOKED


class Dropped(msgspec.Struct, frozen=True):
    """The job was not accepted and will not be: its message stays with the broker."""


Outcome = Answered | Faulted | Lost | TimedOut | SoftTimedOut | Terminated | Dropped


class ChildFacts(msgspec.Struct, frozen=True):
    """What an operator wants to know of the child that an outcome came from."""

    group: str
    pid: int
    #: The last lines of its stderr, oldest first; empty if we do not read its stderr.
    stderr: tuple[str, ...]
