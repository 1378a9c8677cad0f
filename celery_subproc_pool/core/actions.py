"""What `scheduler` and `lifecycle` want done: the engine performs them, in order."""

from __future__ import annotations

from typing import Any

import msgspec

from ..wire.messages import CancelReason, Log
from .model import Child, Group, Job
from .outcomes import Outcome

__all__ = (
    "Accept",
    "Action",
    "Cancel",
    "Change",
    "CloseStdin",
    "Finished",
    "Forget",
    "Healed",
    "Interrupt",
    "Kill",
    "Logged",
    "Measure",
    "Overruled",
    "Probe",
    "Progressed",
    "Recycled",
    "Report",
    "Resolve",
    "SoftTimeout",
    "Spawn",
    "Started",
    "Stranded",
    "Unkillable",
    "Write",
)


class Spawn(msgspec.Struct, frozen=True):
    """Start a process for `child`; answer with `spawned` or `spawn_failed`."""

    child: Child


class Accept(msgspec.Struct, frozen=True):
    """Tell Celery that `job` is accepted, and start its tracer. `child` is None in the worker."""

    job: Job
    child: Child | None
    now: float


class Write(msgspec.Struct, frozen=True):
    """Write the request of `job` to `child`; answer with `written`, or, once the child was heard
    out, `unwritten` if no byte could be."""

    child: Child
    job: Job


class Resolve(msgspec.Struct, frozen=True):
    """Tell the owner of `job` how its time with a child ended."""

    job: Job
    outcome: Outcome
    child: Child | None


class Finished(msgspec.Struct, frozen=True):
    """The tracer of `job` came to its end, and nothing else ended `job` before."""

    job: Job


class SoftTimeout(msgspec.Struct, frozen=True):
    """The soft limit of `job` is over: tell Celery, and the child unless a `Cancel` does."""

    job: Job
    child: Child
    #: The signal that the child understands as such; None is none.
    signum: int | None


class Cancel(msgspec.Struct, frozen=True):
    """Tell `child`, which can cancel, to end `job`."""

    child: Child
    job: Job
    reason: CancelReason


class Interrupt(msgspec.Struct, frozen=True):
    """Send `signum`, by which `child` knows that its job is over, to the process that does it."""

    child: Child
    signum: int


class Overruled(msgspec.Struct, frozen=True):
    """The child of `job`, which was terminated before, has ended it in its own way now: what it
    may have stored of it does not count."""

    job: Job


class Progressed(msgspec.Struct, frozen=True):
    """`child` told how far `job` is: tell its owner."""

    job: Job
    meta: dict[str, Any]


class Logged(msgspec.Struct, frozen=True):
    """`child` has something for the log, about `job` or None."""

    child: Child
    job: Job | None
    record: Log


class Forget(msgspec.Struct, frozen=True):
    """`child` is gone, and nothing more will be asked of it."""

    child: Child
    #: Whether what it has started goes on; otherwise it is ended.
    leaves: bool = False


class Probe(msgspec.Struct, frozen=True):
    """Look whether `child` has read its request; answer with `probed`."""

    child: Child


class Measure(msgspec.Struct, frozen=True):
    """Look how much memory `child` takes; answer with `measured`."""

    child: Child


class Kill(msgspec.Struct, frozen=True):
    """Send `signum` to `child`: SIGKILL to all that it has started, too."""

    child: Child
    signum: int


class Unkillable(msgspec.Struct, frozen=True):
    """`child` goes on, though it was sent SIGKILL: tell the log."""

    child: Child
    #: Why that may be.
    reason: str
    #: What it had in hand.
    jobs: tuple[Job, ...]


class Stranded(msgspec.Struct, frozen=True):
    """The worker stops, and `jobs` of `group` have lost their children and get no others: tell
    the log."""

    group: Group
    reason: str
    jobs: tuple[Job, ...]


class CloseStdin(msgspec.Struct, frozen=True):
    """Close the stdin of `child`: it should finish and exit."""

    child: Child


class Started(msgspec.Struct, frozen=True):
    """`child` has proved that it works: tell who wants to know."""

    child: Child


class Report(msgspec.Struct, frozen=True):
    """A child is replaced after a fault: tell the log why, and who else wants to know."""

    child: Child
    reason: str
    #: What it had in hand.
    jobs: tuple[Job, ...]
    #: Seconds until the slot spawns again.
    delay: float


class Recycled(msgspec.Struct, frozen=True):
    """`successor` has taken the place of `child`, which goes: tell as for `Report`."""

    child: Child
    successor: Child


class Healed(msgspec.Struct, frozen=True):
    """All slots of `group` have a child that works again: tell the log."""

    group: Group


#: What becomes of children, as far as others may want to know.
Change = Started | Report | Recycled

Action = (
    Spawn
    | Accept
    | Write
    | Resolve
    | Finished
    | SoftTimeout
    | Cancel
    | Interrupt
    | Overruled
    | Progressed
    | Logged
    | Probe
    | Measure
    | Kill
    | Unkillable
    | Stranded
    | CloseStdin
    | Started
    | Report
    | Recycled
    | Healed
    | Forget
)
