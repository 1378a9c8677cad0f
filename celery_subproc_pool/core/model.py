"""The scheduler's vocabulary: jobs, children, their states, and the outcomes and actions.

Layer: above `protocol`, `config` and `errors`. Data only, with no policy: that is `scheduler`.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, deque
from collections.abc import Callable

import msgspec

from ..settings import ChildSettings
from ..wire.messages import CancelReason, Feature, Message, decode_reply

__all__ = (
    "TRANSITIONS",
    "Cause",
    "Child",
    "ChildState",
    "Exit",
    "Group",
    "Job",
    "JobState",
    "Slot",
)


#: Of how many jobs of a group it is remembered how long they took.
TIMES_REMEMBERED = 1000

#: How many ids of a child's last jobs are remembered, to say what a stray message is about.
IDS_REMEMBERED = 100


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
        "begun_at",
        "cancelled",
        "child",
        "deadline",
        "group",
        "isolated",
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
        self.isolated = False
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
        "features",
        "group",
        "has_read",
        "jobs",
        "jobs_begun",
        "jobs_done",
        "killed",
        "max_age_at",
        "name",
        "near_greeting",
        "number",
        "open_line",
        "pending_cancels",
        "pid",
        "proven",
        "reason",
        "recycle_after_jobs",
        "recycle_factor",
        "recycle_reason",
        "slot",
        "spawned_at",
        "startup_grace_until",
        "state",
        "still_boots",
        "tasks",
        "terminating",
        "unkillable",
        "unknown_features",
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
        self.pending_cancels = 0
        #: The ids of its last jobs that are over.
        self.ended: deque[str] = deque(maxlen=IDS_REMEMBERED)
        self.jobs_begun = self.jobs_done = 0
        self.spawned_at = 0.0
        #: Whether it has shown that it can start.
        self.proven = False
        #: When a child that can't tell will have shown it.
        self.startup_grace_until: float | None = None
        #: Its share of what `max_jobs`, `max_age` and `max_memory` allow: not all are to be
        #: recycled at the same time.
        self.recycle_factor = 1.0
        #: How many jobs begun make it worn.
        self.recycle_after_jobs: int | None = None
        #: When it will be old.
        self.max_age_at: float | None = None
        #: Why it is to be recycled; nothing if it is not.
        self.recycle_reason = ""
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
        if len(self.jobs) >= self.capacity or self.pending_cancels or self.spent:
            return False
        return not self.jobs or not next(iter(self.jobs.values())).isolated

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
        #: Why the last child that could not went away, if none has since.
        self.failure = ""
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
    def backing_off(self) -> int:
        """How many slots wait before they spawn again."""
        return sum(slot.spawn_at is not None for slot in self.slots)
