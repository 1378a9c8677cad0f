"""How a job's time with a child ended, and what is known of the child then."""

from __future__ import annotations

import signal

import msgspec

from ..wire.messages import Reply

__all__ = (
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


def describe_exit(status: int, killed: bool = False) -> str:
    """Return a process' exit status as text, in billiard's words.

    Arguments:
        status: as `subprocess.Popen.returncode`: negative is a signal's number.
        killed: whether it was killed by a SIGKILL that was none of ours.
    """
    if status >= 0:
        return f"exitcode {status}"
    try:
        text = f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"
    # Nobody else sends it as often as the system that runs out of memory.
    return f"{text}, out of memory?" if killed else text


class Answered(msgspec.Struct, frozen=True):
    """The child replied."""

    reply: Reply


class Faulted(msgspec.Struct, frozen=True):
    """The child wrote what the protocol does not allow."""

    reason: str


class Lost(msgspec.Struct, frozen=True):
    """The child went away with the job."""

    #: As `subprocess.Popen.returncode`; None if no single child is to blame.
    status: int | None
    #: What was seen before its exit, or nothing.
    reason: str
    #: Whether it was killed by a SIGKILL that was none of ours.
    killed: bool = False
    #: How many children the job has cost in this worker, if it is not to cost another one.
    crashes: int = 0
    #: Whether no child has begun it, and none will: the worker stops.
    stranded: bool = False


class TimedOut(msgspec.Struct, frozen=True):
    """The job's hard time limit of `seconds` was over."""

    seconds: float
    #: Whether the limit was that of its silence (`inactivity_timeout`).
    silent: bool = False


class SoftTimedOut(msgspec.Struct, frozen=True):
    """The job's child was told that the soft limit of `seconds` is over, and did not end it."""

    seconds: float


class Terminated(msgspec.Struct, frozen=True):
    """The job was terminated on request, with signal `signum`."""

    signum: int


class Dropped(msgspec.Struct, frozen=True):
    """The job had not been accepted and will not be: its message is still the broker's."""


Outcome = Answered | Faulted | Lost | TimedOut | SoftTimedOut | Terminated | Dropped


class ChildFacts(msgspec.Struct, frozen=True):
    """What a person wants to know of the child that an outcome came from."""

    group: str
    pid: int
    #: The last lines of its stderr, oldest first; empty if stderr does not come to us.
    stderr: tuple[str, ...]
