"""The scheduler's vocabulary: jobs, children, their states, and the outcomes and actions.

Layer: above `protocol`, `config` and `errors`. Data only, with no policy: that is `scheduler`.
"""

from __future__ import annotations

import enum
import signal
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import msgspec

from .config import ChildSettings
from .protocol import CancelReason, Feature, Log, Message, Reply, decode_reply

__all__ = (
    "TRANSITIONS",
    "Accept",
    "Action",
    "Answered",
    "Cancel",
    "Cause",
    "Change",
    "Child",
    "ChildState",
    "CloseStdin",
    "Dropped",
    "Exit",
    "Faulted",
    "Finished",
    "Forget",
    "Group",
    "Healed",
    "Interrupt",
    "Job",
    "JobState",
    "Kill",
    "Logged",
    "Lost",
    "Measure",
    "Outcome",
    "Overruled",
    "Probe",
    "Progressed",
    "Recycled",
    "Report",
    "Settle",
    "Slot",
    "SoftTimedOut",
    "SoftTimeout",
    "Spawn",
    "Started",
    "Stranded",
    "Terminated",
    "TimedOut",
    "Unkillable",
    "Write",
    "describe_exit",
)


#: Of how many jobs of a group it is remembered how long they took.
TIMES_REMEMBERED = 1000

#: How many ids of a child's last jobs are remembered, to say what a stray message is about.
IDS_REMEMBERED = 100


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


class ChildState(enum.Enum):
    """The life of a child; see `TRANSITIONS`."""

    # Its members are looked up for each job: by identity, which C does, as there is one of each.
    __hash__ = object.__hash__

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    RETIRING = "retiring"
    STOPPING = "stopping"
    GONE = "gone"


#: From each state, the states that may follow.
TRANSITIONS: dict[ChildState, frozenset[ChildState]] = {
    ChildState.STARTING: frozenset({ChildState.IDLE, ChildState.STOPPING, ChildState.GONE}),
    ChildState.IDLE: frozenset({ChildState.BUSY, ChildState.STOPPING, ChildState.GONE}),
    ChildState.BUSY: frozenset(
        {ChildState.IDLE, ChildState.RETIRING, ChildState.STOPPING, ChildState.GONE}
    ),
    ChildState.RETIRING: frozenset({ChildState.STOPPING, ChildState.GONE}),
    ChildState.STOPPING: frozenset({ChildState.GONE}),
    ChildState.GONE: frozenset(),
}


class Cause(enum.Enum):
    """Why a child was replaced, as `stats` counts it."""

    EXITED = "exited"
    FAULTED = "faulted"
    NOT_STARTED = "not_started"
    TIMED_OUT = "timed_out"
    TERMINATED = "terminated"
    RECYCLED = "recycled"
    #: The worker stops.
    STOPPED = "stopped"


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


class Job:
    """One `apply_async`.

    Arguments:
        task_id: Celery's id of the task.
        task_name: the name of the task.
        group: the name of the group of children that takes it; None is the worker itself.
        timeout: hard limit in seconds from acceptance on; None is none.
        soft_timeout: soft limit in seconds; None is none.
        traced_here: whether a thread of the worker traces it from the start, and says when it is
            through. Otherwise its child does, or nobody, and what comes after its outcome takes
            no child's time.
        retries: how often Celery has retried the task. A retry is another job, of the same id.
    """

    __slots__ = (
        "__weakref__",
        "accepted",
        "alone",
        "begun_at",
        "cancelled",
        "child",
        "deadline",
        "group",
        "kill_at",
        "losses",
        "notice",
        "number",
        "offset",
        "request",
        "retries",
        "silence_deadline",
        "soft_deadline",
        "soft_timeout",
        "state",
        "submitted_at",
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
        retries: int = 0,
    ) -> None:
        self.task_id = task_id
        self.task_name = task_name
        self.group = group
        self.timeout = timeout
        self.soft_timeout = soft_timeout
        self.traced_here = traced_here
        self.retries = retries
        self.state = JobState.QUEUED
        #: Place in the order of arrival.
        self.number = 0
        self.child: Child | None = None
        #: The line to write: known from the start, or once the tracer has provided it.
        self.request: bytes | None = None
        self.accepted = False
        #: Whether its child is to have no other: it may be what has cost one its life.
        self.alone = False
        #: When it came, and when its child got its request: the last child's, if it lost one.
        self.submitted_at = 0.0
        self.begun_at = 0.0
        #: Children that ended before they had read its request.
        self.losses = 0
        #: Where its request begins in all that was written to its child, in bytes.
        self.offset = 0
        #: When its hard and its soft limit are over, and when it will have been silent for too
        #: long.
        self.deadline: float | None = None
        self.soft_deadline: float | None = None
        self.silence_deadline: float | None = None
        #: Why its child is to end it, and when that costs the child its life.
        self.cancelled: CancelReason | None = None
        self.kill_at: float | None = None
        #: How long that is after what, in words.
        self.notice = ""

    def __repr__(self) -> str:
        return f"<Job {self.task_name}[{self.task_id}] {self.state.value}>"

    @property
    def title(self) -> str:
        """Its task and id, in Celery's form."""
        return f"{self.task_name}[{self.task_id}]"


class Child:
    """What the scheduler knows of one child process."""

    __slots__ = (
        "capacity",
        "deadline",
        "drains",
        "ended",
        "enough_jobs",
        "features",
        "group",
        "has_read",
        "jobs",
        "jobs_begun",
        "jobs_done",
        "killed",
        "name",
        "near_greeting",
        "notices",
        "number",
        "open_line",
        "pid",
        "proven",
        "reason",
        "retire_at",
        "settle_at",
        "slot",
        "spawned_at",
        "stamina",
        "state",
        "still_boots",
        "tasks",
        "terminating",
        "unkillable",
        "unknown_features",
        "worn",
    )

    def __init__(self, group: Group, slot: Slot, number: int) -> None:
        self.group = group
        self.slot = slot
        #: Unique in this worker.
        self.number = number
        self.state = ChildState.STARTING
        #: The process that does the work; under a wrapper maybe not the one that was started.
        self.pid: int | None = None
        #: What it calls itself, and the tasks and features that it has announced.
        self.name: str | None = None
        self.tasks: frozenset[str] = frozenset()
        self.features: frozenset[Feature] = frozenset()
        #: What it has announced beside, by name.
        self.unknown_features: tuple[str, ...] = ()
        #: How many jobs it can have at a time.
        self.capacity = 1
        #: What it has in hand, by the jobs' ids, in order: reserved, sent, or closed before it
        #: has answered.
        self.jobs: dict[str, Job] = {}
        #: How many of them it was told to end. Until it has, it gets no other: it may have to die.
        self.notices = 0
        #: The ids of its last jobs that are over.
        self.ended: deque[str] = deque(maxlen=IDS_REMEMBERED)
        self.jobs_begun = self.jobs_done = 0
        self.spawned_at = 0.0
        #: Whether it has shown that it can start.
        self.proven = False
        #: When a child that can't tell will have shown it.
        self.settle_at: float | None = None
        #: Its share of what `max_jobs`, `max_age` and `max_memory` allow: not all are to be
        #: recycled at the same time.
        self.stamina = 1.0
        #: How many jobs begun make it worn.
        self.enough_jobs: int | None = None
        #: When it will be old.
        self.retire_at: float | None = None
        #: Why it is to be recycled; nothing if it is not.
        self.worn = ""
        #: Whether it was sent a SIGKILL by us.
        self.killed = False
        #: Whether it goes on all the same.
        self.unkillable = False
        #: Whether it is known to have read a request: it has booted.
        self.has_read = False
        #: Whether it was seen not to have read its first request when that should have been done.
        self.still_boots = False
        #: Quotes what it has written of a line that it has not ended; empty if there is no such.
        self.open_line: Callable[[], str] = str
        #: Before it is ready: what it wrote that looks like its greeting, and why it is none.
        self.near_greeting = ""
        #: When it must be ready, or when the next, harder step of stopping is due.
        self.deadline: float | None = None
        #: Whether SIGTERM has been sent already while stopping.
        self.terminating = False
        #: Whether it takes no more requests, and is busy with those that it has. Its slot is
        #: another's.
        self.drains = False
        #: Why it is being stopped.
        self.reason = ""

    @property
    def serves(self) -> bool:
        """Whether it does jobs."""
        return self.state in (ChildState.IDLE, ChildState.BUSY)

    @property
    def in_order(self) -> bool:
        """Whether, as it goes or is gone, it does so because it was asked to, and nobody had to
        kill it."""
        return not self.reason and not self.killed

    @property
    def spent(self) -> bool:
        """Whether it has had all the jobs that it may ever have, or is about to."""
        most = self.group.settings.max_jobs
        if most is None:
            return False
        reserved = sum(job.state is JobState.RESERVED for job in self.jobs.values())
        return self.jobs_begun + reserved >= most

    @property
    def has_room(self) -> bool:
        """Whether it can have one more job."""
        if len(self.jobs) >= self.capacity or self.notices or self.spent:
            return False
        return not self.jobs or not next(iter(self.jobs.values())).alone

    @property
    def may_speak(self) -> bool:
        """Whether something that it writes now may be in order."""
        return Feature.LOG in self.features or any(
            job.state is not JobState.RESERVED for job in self.jobs.values()
        )

    @property
    def unfinished(self) -> str:
        """That it has not ended a line, and which, if so."""
        line = self.open_line()
        return f"it has not ended its line with a newline: {line}" if line else ""

    @property
    def cancels(self) -> bool:
        """Whether it can be told to end a job."""
        return Feature.CANCEL in self.features

    def __repr__(self) -> str:
        return f"<Child {self.group.name}#{self.slot.number} pid {self.pid} {self.state.value}>"


class Exit(msgspec.Struct, frozen=True):
    """That a child of a slot was given up; maybe a successor that could not start."""

    pid: int | None
    reason: str
    #: Monotonic, in seconds.
    at: float


class Slot:
    """A child's place in its group."""

    __slots__ = ("child", "failures", "jobs_begun", "last_exit", "number", "spawn_at", "successor")

    def __init__(self, number: int) -> None:
        self.number = number
        self.child: Child | None = None
        #: While its child is worn: who is to take its place.
        self.successor: Child | None = None
        #: Children in a row that died before they did a job.
        self.failures = 0
        #: How many jobs the children that are gone have begun.
        self.jobs_begun = 0
        #: While cooling: when to spawn again.
        self.spawn_at: float | None = None
        self.last_exit: Exit | None = None


class Group:
    """The children of one configured kind, and the jobs that wait for them.

    Arguments:
        name: its name.
        settings: its settings.
        size: how many children it has.
        boot: what each of them gets to read before anything else.
        decode: makes a reply of a line of theirs, or raises `ProtocolFault`.
        withheld: names of the worker's environment variables that are none of their business.
    """

    __slots__ = (
        "announces",
        "available",
        "boot",
        "came_up",
        "children",
        "decode",
        "degraded",
        "failure",
        "jobs_begun",
        "jobs_done",
        "last_words",
        "name",
        "replaced",
        "runs",
        "settings",
        "slots",
        "successors",
        "tells_progress",
        "throttled",
        "waiting",
        "waits",
        "withheld",
    )

    def __init__(
        self,
        name: str,
        settings: ChildSettings,
        size: int,
        boot: bytes = b"",
        decode: Callable[[bytes], Message] = decode_reply,
        withheld: frozenset[str] = frozenset(),
    ) -> None:
        self.name = name
        self.settings = settings
        self.boot = boot
        self.decode = decode
        self.withheld = withheld
        #: Whether a child of it has ever announced tasks.
        self.announces = False
        #: Whether one has ever announced that it tells of its progress.
        self.tells_progress = False
        #: Whether a child of it has ever proved that it can start.
        self.came_up = False
        #: Why the last child that could not went away, if none has since; and the last lines of
        #: its stderr.
        self.failure = ""
        self.last_words: tuple[str, ...] = ()
        #: Whether a slot had to cool since all of them had a child that works.
        self.degraded = False
        #: How many successors of worn children boot.
        self.successors = 0
        #: How many jobs the children that are gone have begun, also of slots that are gone.
        self.jobs_begun = 0
        self.jobs_done = 0
        #: How many of them were throttled.
        self.throttled = 0
        #: Of the latest jobs: seconds until a child had one, and until it had answered.
        self.waits: deque[float] = deque(maxlen=TIMES_REMEMBERED)
        self.runs: deque[float] = deque(maxlen=TIMES_REMEMBERED)
        #: How many children were replaced, and why.
        self.replaced: Counter[Cause] = Counter()
        self.slots = [Slot(number) for number in range(size)]
        #: All that are not gone yet, those that are being stopped included.
        self.children: dict[int, Child] = {}
        #: Children that can have one more job: the next one takes it from the end. An ordered set.
        self.available: OrderedDict[Child, None] = OrderedDict()
        self.waiting: deque[Job] = deque()

    @property
    def in_service(self) -> int:
        """How many slots have a child that does jobs."""
        return sum(slot.child is not None and slot.child.serves for slot in self.slots)

    @property
    def cooling(self) -> int:
        """How many slots wait before they spawn again."""
        return sum(slot.spawn_at is not None for slot in self.slots)


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


class Settle(msgspec.Struct, frozen=True):
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
    | Settle
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
