"""What the scheduler wants done. The engine performs actions in order.

Some actions end in a callback. They tell the owner of a job (`Accept`, `Resolve`, `Finished`,
`SoftTimeout`, `Overruled`, `Progressed`), or tell of a child (`Started`, `Report`, `Recycled`). The
engine queues the callback. It calls callbacks in their order, after all actions of the turn,
because they may bring new events.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..wire.messages import CancelReason, Log, Reply
from .model import Child, Group, Job
from .outcomes import Outcome

__all__ = (
    "Abandon",
    "Accept",
    "Action",
    "Cancel",
    "Change",
    "CloseStdin",
    "Finished",
    "Forget",
    "GoesOn",
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
    "StandsStill",
    "Started",
    "Stranded",
    "Tell",
    "Unkillable",
    "Write",
)


class Spawn(msgspec.Struct, frozen=True):
    """Start the process of `child`. Answer with `spawned` or `spawn_failed`."""

    child: Child


class Accept(msgspec.Struct, frozen=True):
    """Tell that `job` is accepted by `child`."""

    job: Job
    child: Child
    now: float


class Write(msgspec.Struct, frozen=True):
    """Write the request of `job` to `child`. Answer with `written` if a byte was written. If the
    child reads no more, take in what it still says, then answer with `unwritten`."""

    child: Child
    job: Job


class Resolve(msgspec.Struct, frozen=True):
    """Tell the owner of `job` how the job ended."""

    job: Job
    outcome: Outcome
    #: The child that the outcome came from, if there is one.
    child: Child | None
    #: Whether the end of its trace follows, as `Finished`.
    unfinished: bool = False


class Finished(msgspec.Struct, frozen=True):
    """Tell that the trace of `job` is over. The job may have been resolved before."""

    job: Job
    #: How the trace ended; None if it did not come to its end.
    reply: Reply | None


class Tell(msgspec.Struct, frozen=True):
    """Write `line` to `child`, a tracer: it is about a trace that the tracer has."""

    child: Child
    line: bytes


class Abandon(msgspec.Struct, frozen=True):
    """Tell `child`, a tracer, that what its trace `job` traces is over."""

    child: Child
    job: Job
    #: Whether the end was a revoke. Its state must stay the last one.
    revoked: bool


class SoftTimeout(msgspec.Struct, frozen=True):
    """Tell Celery that the soft limit of `job` is over, and send `child` the signal."""

    job: Job
    child: Child
    #: The signal; None if the child knows none, or is told by a `Cancel`.
    signum: int | None


class Cancel(msgspec.Struct, frozen=True):
    """Tell `child`, which can cancel, to cancel `job`."""

    child: Child
    job: Job
    reason: CancelReason


class Interrupt(msgspec.Struct, frozen=True):
    """Send `signum`, which tells `child` to end its job, to the process that does the work."""

    child: Child
    signum: int


class Overruled(msgspec.Struct, frozen=True):
    """Tell that `job`, which was revoked before, has ended in its child only now. The child may
    have stored another result, which does not count."""

    job: Job


class Progressed(msgspec.Struct, frozen=True):
    """Tell the owner of `job` its progress."""

    job: Job
    meta: dict[str, Any]


class Logged(msgspec.Struct, frozen=True):
    """Log a record of `child`, which is about `job` or none."""

    child: Child
    job: Job | None
    record: Log


class StandsStill(msgspec.Struct, frozen=True):
    """Log that `child`, a tracer, says nothing, and have it say where it hangs."""

    child: Child
    #: For how long.
    seconds: float
    #: The traces that wait for it.
    jobs: tuple[Job, ...]


class GoesOn(msgspec.Struct, frozen=True):
    """Log that `child`, a tracer that has stood still, goes on."""

    child: Child
    #: For how long it has said nothing.
    seconds: float


class Forget(msgspec.Struct, frozen=True):
    """Close what belongs to `child`, which is gone."""

    child: Child
    #: Whether what it has started goes on. Otherwise end it.
    leaves: bool = False


class Probe(msgspec.Struct, frozen=True):
    """See how much `child` has read. Answer with `probed`."""

    child: Child


class Measure(msgspec.Struct, frozen=True):
    """See how much memory `child` takes. Answer with `measured`."""

    child: Child


class Kill(msgspec.Struct, frozen=True):
    """Send `signum` to `child`. SIGKILL also ends what it has started."""

    child: Child
    signum: int


class Unkillable(msgspec.Struct, frozen=True):
    """Log that `child` lives on after it was to be killed."""

    child: Child
    #: Why, in words.
    reason: str
    #: The jobs that it had.
    jobs: tuple[Job, ...]


class Stranded(msgspec.Struct, frozen=True):
    """Log that the worker stops, and that no child of `group` will do `jobs`, which have lost
    theirs."""

    group: Group
    reason: str
    jobs: tuple[Job, ...]


class CloseStdin(msgspec.Struct, frozen=True):
    """Close the stdin of `child`, which makes it exit."""

    child: Child


class Started(msgspec.Struct, frozen=True):
    """Tell that `child` has proved that it works."""

    child: Child


class Report(msgspec.Struct, frozen=True):
    """Log and tell that `child` is replaced, after a fault or at its exit."""

    child: Child
    reason: str
    #: The jobs that it had.
    jobs: tuple[Job, ...]
    #: Seconds that the slot backs off.
    delay: float


class Recycled(msgspec.Struct, frozen=True):
    """Log and tell that `successor` has taken the slot of `child`, which is recycled."""

    child: Child
    successor: Child


class Healed(msgspec.Struct, frozen=True):
    """Log that each slot of `group` has a child that works again."""

    group: Group


#: What is told of children.
Change = Started | Report | Recycled

Action = (
    Spawn
    | Accept
    | Write
    | Resolve
    | Finished
    | Tell
    | Abandon
    | SoftTimeout
    | Cancel
    | Interrupt
    | Overruled
    | Progressed
    | Logged
    | StandsStill
    | GoesOn
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
