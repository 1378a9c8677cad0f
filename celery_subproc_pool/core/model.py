"""Jobs, children, slots and groups: all that changes, and which module changes it.

All mutable state of `core` is here, and in private attributes of the classes of `core`. All modules
read it. Each field has one module that writes it, with the exceptions that are named here (a test
checks this table):

counters
    `Group.counters`.
jobs
    `Job`, its state included, apart from its deadlines.
deadlines
    `Job.deadline`, `soft_deadline`, `silence_deadline`, `kill_at`.
queues
    `Group.waiting`.
service
    `Child.jobs`, `recent_ids`, `pending_cancels`; `Group.available`. `Child.state`, of a child that
    enters or leaves service. It ends the timers of a child that leaves: `boot_deadline`,
    `startup_grace_until`, `max_age_at`.
slots
    `Slot.child`, `successor`, `jobs_begun`, `last_exit`; `Group.slots`, `children`, `successors`.
spawning
    `Slot.spawn_at`, `failures`; `Group.degraded`, `failure`, `on_demand`.
booting
    What the child announced: `Child.name`, `tasks`, `features`, `unknown_features`, `capacity`.
    `Child.pid`, `spawned_at`, `proven`, `has_booted`, `seen_unread`, `boot_deadline`,
    `startup_grace_until`; `Group.announces`, `tells_progress`, `came_up`.
recycling
    `Child.jobs_begun`, `jobs_done`, `recycle_factor`, `recycle_after_jobs`, `recycle_reason`,
    `max_age_at`.
stopping
    `Child.stop_deadline`, `terminating`, `killed`, `unkillable`.
replacing
    `Child.reason`, `draining`.
exits
    `Child.state`, of a child that is gone.
scheduler
    `Group.boot`, by the event `change_boot`.
standstill
    `Child.due`, `quiet_since`, `warn_at`, `stands_still`.
traces
    `Job.trace`, `traces`. Of a new trace also `request` and `accepted`.

`engine` writes `Child.open_line` and `Child.bad_greeting`. The rest of
`Group` is configuration and never changes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field

import msgspec

from ..errors import TransitionError
from ..settings import ChildSettings
from ..wire.messages import CancelReason, Feature, Message, decode_reply
from ..wire.python import Ask
from .counters import Counters
from .states import CHILD_TRANSITIONS, JOB_TRANSITIONS, Cause, ChildState, JobState, Tracing

__all__ = (
    "Cause",
    "Child",
    "ChildState",
    "Exit",
    "Group",
    "Job",
    "JobState",
    "Slot",
    "Tracing",
    "children_of",
)


#: How many ids of a child's latest jobs are kept, to explain an unexpected message.
IDS_REMEMBERED = 100


class _Referable:
    """Allows weak references to a class with slots: `dataclass` has no option for it on 3.10."""

    __slots__ = ("__weakref__",)


@dataclass(slots=True, eq=False)
class Job(_Referable):
    """One `apply_async`. Celery keeps weak references to it.

    Arguments:
        task_id: Celery's id of the task.
        task_name: the name of the task.
        group: the name of the group whose children can do it.
        timeout: the hard limit in seconds, from acceptance; None is none.
        soft_timeout: the soft limit in seconds, from acceptance; None is none.
        tracing: whether a tracer has a part in it.
        retries: how often Celery has retried the task. A retry is another job with the same id.
    """

    task_id: str
    task_name: str
    group: str
    timeout: float | None = None
    soft_timeout: float | None = None
    tracing: Tracing = Tracing.NEVER
    retries: int = 0

    state: JobState = field(default=JobState.QUEUED, init=False)
    #: Place in the order of arrival.
    number: int = field(default=0, init=False)
    #: The child that the job is with while it is RESERVED or SENT.
    child: Child | None = field(default=None, init=False)
    #: Of a job with a tracer: its trace, once that has begun.
    trace: Job | None = field(default=None, init=False)
    #: Of a trace: the job that it traces.
    traces: Job | None = field(default=None, init=False)
    #: What to write, once it is known. That of a trace grows by what its tracer is told later.
    request: bytes | None = field(default=None, init=False)
    #: Whether Celery was told that the job is accepted.
    accepted: bool = field(default=False, init=False)
    #: Runs alone in a child: it is suspected of having crashed one.
    isolated: bool = field(default=False, init=False)
    #: When the job arrived (monotonic seconds, as all times here).
    submitted_at: float = field(default=0.0, init=False)
    #: When its request was written to its latest child.
    begun_at: float = field(default=0.0, init=False)
    #: How often it went back to the queue because its child ended.
    requeues: int = field(default=0, init=False)
    #: How many bytes had been written to its child before its request.
    offset: int = field(default=0, init=False)
    #: When the hard limit is over.
    deadline: float | None = field(default=None, init=False)
    #: When the soft limit is over.
    soft_deadline: float | None = field(default=None, init=False)
    #: When `inactivity_timeout` is over.
    silence_deadline: float | None = field(default=None, init=False)
    #: Why the child has to end the job; None if it was not told to.
    cancelled: CancelReason | None = field(default=None, init=False)
    #: When the child is ended because it has not ended the job.
    kill_at: float | None = field(default=None, init=False)
    #: In words: how long the child had to end the job, since what, and why.
    grace_given: str = field(default="", init=False)

    def move(self, state: JobState) -> None:
        """Change the state.

        Raises:
            TransitionError: `JOB_TRANSITIONS` does not allow it.
        """
        if state not in JOB_TRANSITIONS[self.state]:
            raise TransitionError(f"{self!r} can't become {state.value}")
        self.state = state

    def __repr__(self) -> str:
        return f"<Job {self.title} {self.state.value}>"

    @property
    def title(self) -> str:
        """Its task and id, in Celery's form."""
        return f"{self.task_name}[{self.task_id}]"


@dataclass(slots=True, eq=False)
class Child:
    """What is known of one child process."""

    group: Group
    slot: Slot
    #: Unique in this worker.
    number: int

    state: ChildState = field(default=ChildState.STARTING, init=False)
    #: The process that does the work. Under a wrapper it may not be the one that was started.
    pid: int | None = field(default=None, init=False)
    #: When its process was started.
    spawned_at: float = field(default=0.0, init=False)

    #: The name that it gave itself.
    name: str | None = field(default=None, init=False)
    #: The tasks that it announced.
    tasks: frozenset[str] = field(default=frozenset(), init=False)
    #: The features that it announced.
    features: frozenset[Feature] = field(default=frozenset(), init=False)
    #: The names of other features that it announced.
    unknown_features: tuple[str, ...] = field(default=(), init=False)
    #: How many jobs it can have at a time.
    capacity: int = field(default=1, init=False)

    #: By id, in order: jobs that are RESERVED or SENT, and closed jobs that it has not answered.
    jobs: dict[str, Job] = field(default_factory=dict, init=False)
    #: Cancels sent and not answered yet; no new job while there are any: the child may be ended.
    pending_cancels: int = field(default=0, init=False)
    #: The ids of its latest jobs that are over.
    recent_ids: deque[str] = field(default_factory=lambda: deque(maxlen=IDS_REMEMBERED), init=False)
    #: How many requests were written to it.
    jobs_begun: int = field(default=0, init=False)
    #: How many requests it has answered.
    jobs_done: int = field(default=0, init=False)

    #: When it must be ready. After it closed its stdout instead: when it must have exited.
    boot_deadline: float | None = field(default=None, init=False)
    #: When it will have proved itself, or a degraded group its recovery, by having lived.
    startup_grace_until: float | None = field(default=None, init=False)
    #: Whether it has proved that it can start.
    proven: bool = field(default=False, init=False)
    #: Whether it is known to have booted: it has greeted, or has read a request.
    has_booted: bool = field(default=False, init=False)
    #: Whether a probe found that it had not read its first request yet.
    seen_unread: bool = field(default=False, init=False)
    #: Returns a quote of the line that it has begun and not ended; empty if there is none.
    open_line: Callable[[], str] = field(default=str, init=False)
    #: Before it is ready: a quote of a line that looks like a greeting, and why it is none.
    bad_greeting: str = field(default="", init=False)

    #: Its own fraction of `max_jobs`, `max_age` and `max_memory` (as gunicorn's
    #: max_requests_jitter): children should not all be recycled at once.
    recycle_factor: float = field(default=1.0, init=False)
    #: It is recycled once it has begun this many jobs.
    recycle_after_jobs: int | None = field(default=None, init=False)
    #: When `max_age` is over.
    max_age_at: float | None = field(default=None, init=False)
    #: Why it is to be recycled; empty if it is not.
    recycle_reason: str = field(default="", init=False)

    #: Of a tracer: the traces about which it is to say something next.
    due: set[Job] = field(default_factory=set, init=False)
    #: Since when it says nothing about them; None if there are none.
    quiet_since: float | None = field(default=None, init=False)
    #: When the log warns of that.
    warn_at: float | None = field(default=None, init=False)
    #: Whether the log has warned.
    stands_still: bool = field(default=False, init=False)

    #: Why it is replaced; empty if it is not.
    reason: str = field(default="", init=False)
    #: It takes no more requests, answers those that it has, and serves no slot.
    draining: bool = field(default=False, init=False)
    #: When the next, harder step of stopping is due. After SIGKILL: when it must have exited.
    stop_deadline: float | None = field(default=None, init=False)
    #: Whether SIGTERM was sent, or is skipped: the next step is SIGKILL.
    terminating: bool = field(default=False, init=False)
    #: Whether we sent it SIGKILL.
    killed: bool = field(default=False, init=False)
    #: Whether it lives on after SIGKILL, or may not be signalled.
    unkillable: bool = field(default=False, init=False)

    def move(self, state: ChildState) -> None:
        """Change the state.

        Raises:
            TransitionError: `CHILD_TRANSITIONS` does not allow it.
        """
        if state not in CHILD_TRANSITIONS[self.state]:
            raise TransitionError(f"{self!r} can't become {state.value}")
        self.state = state

    @property
    def serves(self) -> bool:
        """Whether it does jobs."""
        return self.state is ChildState.IDLE or self.state is ChildState.BUSY

    @property
    def in_order(self) -> bool:
        """Whether it ends, or has ended, because it was asked to, and was not killed."""
        return not self.reason and not self.killed

    @property
    def max_jobs_reached(self) -> bool:
        """Whether it has had `max_jobs` jobs, those that it is about to get included."""
        most = self.group.settings.max_jobs
        # Counting takes long with many jobs, and is needed only near the end.
        if most is None or self.jobs_begun + len(self.jobs) < most:
            return False
        reserved = sum(job.state is JobState.RESERVED for job in self.jobs.values())
        return self.jobs_begun + reserved >= most

    @property
    def has_room(self) -> bool:
        """Whether it can have one more job."""
        if len(self.jobs) >= self.capacity or self.pending_cancels:
            return False
        if self.group.settings.max_jobs is not None and self.max_jobs_reached:
            return False
        return not self.jobs or not next(iter(self.jobs.values())).isolated

    @property
    def may_speak(self) -> bool:
        """Whether a line that it writes now may be allowed."""
        return Feature.LOG in self.features or any(
            job.state is not JobState.RESERVED for job in self.jobs.values()
        )

    @property
    def unfinished(self) -> str:
        """In words: which line it has begun and not ended; empty if none."""
        line = self.open_line()
        return f"it has not ended its line with a newline: {line}" if line else ""

    @property
    def cancels(self) -> bool:
        """Whether it can be told to cancel a job."""
        return Feature.CANCEL in self.features

    def __repr__(self) -> str:
        return f"<Child {self.group.name}#{self.slot.number} pid {self.pid} {self.state.value}>"


class Exit(msgspec.Struct, frozen=True):
    """The latest child that a slot lost. It may be a successor that could not start."""

    pid: int | None
    reason: str
    #: Monotonic, in seconds.
    at: float


@dataclass(slots=True, eq=False)
class Slot:
    """A child's place in its group."""

    number: int
    child: Child | None = field(default=None, init=False)
    #: Boots to take the place of `child`, which is to be recycled.
    successor: Child | None = field(default=None, init=False)
    #: Children in a row that ended before they had done a job.
    failures: int = field(default=0, init=False)
    #: While it backs off: when to spawn again.
    spawn_at: float | None = field(default=None, init=False)
    #: How many jobs its children that are gone have begun.
    jobs_begun: int = field(default=0, init=False)
    last_exit: Exit | None = field(default=None, init=False)


@dataclass(slots=True, eq=False)
class Group:
    """The children of one configured kind, and the jobs that wait for them.

    Arguments:
        name: its name.
        settings: its settings.
        size: how many slots it has at first.
        boot: what each child reads before anything else. Only `Scheduler.change_boot` changes it.
        decode: makes a message of a child's line, or raises `ProtocolFault`.
        withheld: names of the worker's environment variables that its children do not get.
        on_demand: whether it spawns no child until a job waits for one.
        ends_at_soft_limit: whether a child that can cancel has to end a job at its soft limit. If
            not, the job may go on until its hard limit.
        forks: whether its children are forked from a template, where that is safe.
    """

    name: str
    settings: ChildSettings
    size: InitVar[int]
    boot: bytes = b""
    decode: Callable[[bytes], Message | Ask] = decode_reply
    withheld: frozenset[str] = frozenset()
    on_demand: bool = False
    ends_at_soft_limit: bool = True
    forks: bool = False

    slots: list[Slot] = field(default_factory=list, init=False)
    #: By number: all that are not gone, those that are being stopped included.
    children: dict[int, Child] = field(default_factory=dict, init=False)
    #: Children with room for a job, as an ordered set. The last one gets the next job.
    available: OrderedDict[Child, None] = field(default_factory=OrderedDict, init=False)
    #: Jobs that wait, in order of arrival.
    waiting: deque[Job] = field(default_factory=deque, init=False)
    counters: Counters = field(default_factory=Counters, init=False)
    #: How many successors boot.
    successors: int = field(default=0, init=False)
    #: Whether a child has ever announced tasks.
    announces: bool = field(default=False, init=False)
    #: Whether a child has ever announced `progress`.
    tells_progress: bool = field(default=False, init=False)
    #: Whether a child has ever proved that it can start.
    came_up: bool = field(default=False, init=False)
    #: Why the latest child that failed did so; empty once a child has proved itself since.
    failure: str = field(default="", init=False)
    #: Whether a slot has backed off since each slot had a proven child.
    degraded: bool = field(default=False, init=False)

    def __post_init__(self, size: int) -> None:
        self.slots.extend(Slot(number) for number in range(size))

    def __repr__(self) -> str:
        return f"<Group {self.name}>"

    @property
    def must_start(self) -> bool:
        """Whether it has children when the pool starts. With ``--autoscale=10,0``, it may not."""
        return bool(self.slots) and not self.on_demand

    @property
    def in_service(self) -> int:
        """How many slots have a child that does jobs."""
        return sum(slot.child is not None and slot.child.serves for slot in self.slots)

    @property
    def backing_off(self) -> int:
        """How many slots wait before they spawn again."""
        return sum(slot.spawn_at is not None for slot in self.slots)


def children_of(groups: dict[str, Group]) -> tuple[Child, ...]:
    """Return all children of `groups` that are not gone; they may go meanwhile."""
    return tuple(child for group in groups.values() for child in group.children.values())
