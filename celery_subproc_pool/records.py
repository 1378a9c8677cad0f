"""The scheduler's vocabulary: jobs, children, their states, and the outcomes and actions.

Layer: above `protocol`, `config` and `errors`. Data only, with no policy: that is `scheduler`.
"""

from __future__ import annotations

import enum
import signal
from collections import OrderedDict, deque
from collections.abc import Callable

import msgspec

from .config import ChildSettings
from .protocol import Reply, decode_reply

__all__ = (
    "TRANSITIONS",
    "Accept",
    "Action",
    "Answered",
    "Child",
    "ChildState",
    "CloseStdin",
    "Dropped",
    "Faulted",
    "Finished",
    "Forget",
    "Group",
    "Job",
    "JobState",
    "Kill",
    "Lost",
    "Outcome",
    "Probe",
    "Report",
    "Settle",
    "Slot",
    "SoftTimeout",
    "Spawn",
    "Terminated",
    "TimedOut",
    "Write",
    "describe_exit",
)


def describe_exit(status: int) -> str:
    """Return a process' exit status as text, in billiard's words.

    Arguments:
        status: as `subprocess.Popen.returncode`: negative is a signal's number.
    """
    if status >= 0:
        return f"exitcode {status}"
    try:
        return f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"


class ChildState(enum.Enum):
    """The life of a child; see `TRANSITIONS`."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    STOPPING = "stopping"
    GONE = "gone"


#: From each state, the states that may follow.
TRANSITIONS: dict[ChildState, frozenset[ChildState]] = {
    ChildState.STARTING: frozenset({ChildState.IDLE, ChildState.STOPPING, ChildState.GONE}),
    ChildState.IDLE: frozenset({ChildState.BUSY, ChildState.STOPPING, ChildState.GONE}),
    ChildState.BUSY: frozenset({ChildState.IDLE, ChildState.STOPPING, ChildState.GONE}),
    ChildState.STOPPING: frozenset({ChildState.GONE}),
    ChildState.GONE: frozenset(),
}


class JobState(enum.Enum):
    """The life of a job; `scheduler` draws it."""

    QUEUED = "queued"
    RESERVED = "reserved"
    SENT = "sent"
    ANSWERED = "answered"
    CLOSED = "closed"


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


class TimedOut(msgspec.Struct, frozen=True):
    """The job's hard time limit of `seconds` was over."""

    seconds: float


class Terminated(msgspec.Struct, frozen=True):
    """The job was terminated on request, with signal `signum`."""

    signum: int


class Dropped(msgspec.Struct, frozen=True):
    """The job had not been accepted and will not be: its message is still the broker's."""


Outcome = Answered | Faulted | Lost | TimedOut | Terminated | Dropped


class Job:
    """One `apply_async`.

    Arguments:
        task_id: Celery's id of the task.
        task_name: the name of the task.
        group: the name of the group of children that takes it; None is the worker itself.
        timeout: hard limit in seconds from acceptance on; None is none.
        soft_timeout: soft limit in seconds; None is none.
        traced_here: whether a thread of the worker traces it, and says when it is through.
            Otherwise its child does, or nobody, and its outcome is its end.
    """

    __slots__ = (
        "__weakref__",
        "accepted",
        "child",
        "deadline",
        "group",
        "losses",
        "number",
        "request",
        "soft_deadline",
        "soft_timeout",
        "state",
        "task_id",
        "task_name",
        "timeout",
        "traced_here",
    )

    def __init__(
        self,
        task_id: str,
        task_name: str,
        group: str | None,
        timeout: float | None = None,
        soft_timeout: float | None = None,
        traced_here: bool = True,
    ) -> None:
        self.task_id = task_id
        self.task_name = task_name
        self.group = group
        self.timeout = timeout
        self.soft_timeout = soft_timeout
        self.traced_here = traced_here
        self.state = JobState.QUEUED
        #: Place in the order of arrival.
        self.number = 0
        self.child: Child | None = None
        #: The line to write: known from the start, or once the tracer has provided it.
        self.request: bytes | None = None
        self.accepted = False
        #: Children that ended before they had read its request.
        self.losses = 0
        self.deadline: float | None = None
        self.soft_deadline: float | None = None

    def __repr__(self) -> str:
        return f"<Job {self.task_name}[{self.task_id}] {self.state.value}>"


class Child:
    """What the scheduler knows of one child process."""

    __slots__ = (
        "deadline",
        "group",
        "has_read",
        "job",
        "jobs_done",
        "number",
        "pid",
        "reason",
        "slot",
        "spawned_at",
        "state",
        "still_boots",
        "terminating",
    )

    def __init__(self, group: Group, slot: Slot, number: int) -> None:
        self.group = group
        self.slot = slot
        #: Unique in this worker.
        self.number = number
        self.state = ChildState.STARTING
        #: The process that does the work; under a wrapper maybe not the one that was started.
        self.pid: int | None = None
        self.job: Job | None = None
        self.jobs_done = 0
        self.spawned_at = 0.0
        #: Whether it is known to have read a request: it has booted.
        self.has_read = False
        #: Whether it was seen not to have read its first request when that should have been done.
        self.still_boots = False
        #: When it must be ready, or when the next, harder step of stopping is due.
        self.deadline: float | None = None
        #: Whether SIGTERM has been sent already while stopping.
        self.terminating = False
        #: Why it is being stopped.
        self.reason = ""

    def __repr__(self) -> str:
        return f"<Child {self.group.name}#{self.slot.number} pid {self.pid} {self.state.value}>"


class Slot:
    """A child's place in its group."""

    __slots__ = ("child", "failures", "number", "spawn_at")

    def __init__(self, number: int) -> None:
        self.number = number
        self.child: Child | None = None
        #: Children in a row that died before they did a job.
        self.failures = 0
        #: While cooling: when to spawn again.
        self.spawn_at: float | None = None


class Group:
    """The children of one configured kind, and the jobs that wait for them.

    Arguments:
        name: its name.
        settings: its settings.
        size: how many children it has.
        boot: what each of them gets to read before anything else.
        decode: makes a reply of a line of theirs, or raises `ProtocolFault`.
    """

    __slots__ = (
        "boot",
        "came_up",
        "children",
        "decode",
        "failure",
        "idle",
        "name",
        "settings",
        "slots",
        "waiting",
    )

    def __init__(
        self,
        name: str,
        settings: ChildSettings,
        size: int,
        boot: bytes = b"",
        decode: Callable[[bytes], Reply] = decode_reply,
    ) -> None:
        self.name = name
        self.settings = settings
        self.boot = boot
        self.decode = decode
        #: Whether a child of it has ever been ready for jobs.
        self.came_up = False
        #: Why the last child that was never ready went away.
        self.failure = ""
        self.slots = [Slot(number) for number in range(size)]
        #: All that are not gone yet, those that are being stopped included.
        self.children: dict[int, Child] = {}
        #: Last in, first out: the warmest child serves next. An ordered set.
        self.idle: OrderedDict[Child, None] = OrderedDict()
        self.waiting: deque[Job] = deque()


class Spawn(msgspec.Struct, frozen=True):
    """Start a process for `child`; answer with `spawned` or `spawn_failed`."""

    child: Child


class Accept(msgspec.Struct, frozen=True):
    """Tell Celery that `job` is accepted, and start its tracer. `child` is None in the worker."""

    job: Job
    child: Child | None
    now: float


class Write(msgspec.Struct, frozen=True):
    """Write the request of `job` to `child`; answer with `unwritten` if no byte could be."""

    child: Child
    job: Job


class Settle(msgspec.Struct, frozen=True):
    """Tell the owner of `job` how its time with a child ended."""

    job: Job
    outcome: Outcome
    child: Child | None


class Finished(msgspec.Struct, frozen=True):
    """The tracer of `job` came to its end, and nothing else ended `job` before."""

    job: Job


class SoftTimeout(msgspec.Struct, frozen=True):
    """The soft limit of `job` is over: tell Celery, and the child as its settings say."""

    job: Job
    child: Child
    #: The signal that the child understands as such; None: it can't be told.
    signum: int | None


class Forget(msgspec.Struct, frozen=True):
    """`child` is gone, and nothing more will be asked of it."""

    child: Child


class Probe(msgspec.Struct, frozen=True):
    """Look whether `child` has read its request; answer with `probed`."""

    child: Child


class Kill(msgspec.Struct, frozen=True):
    """Send `signum` to the process group of `child`."""

    child: Child
    signum: int


class CloseStdin(msgspec.Struct, frozen=True):
    """Close the stdin of `child`: it should finish and exit."""

    child: Child


class Report(msgspec.Struct, frozen=True):
    """A child is replaced after a fault: tell the log why."""

    child: Child
    reason: str
    job: Job | None
    #: Seconds until the slot spawns again.
    delay: float


Action = (
    Spawn
    | Accept
    | Write
    | Settle
    | Finished
    | SoftTimeout
    | Probe
    | Kill
    | CloseStdin
    | Report
    | Forget
)
