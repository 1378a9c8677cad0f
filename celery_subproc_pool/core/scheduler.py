"""The entry point of `core`: takes events and returns the actions to perform.

Each event is a method. Its last argument without a default is `now`, the time at which it happened
(seconds of any monotonic clock). It returns actions, to be performed in order. `written` and
`measured` return nothing: they have no consequences until `dispatch`.

Call `dispatch` after the events of a turn, when all that is known was told. The rules are in
`states`; the docstring of each module says what it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..wire.messages import CancelReason, Log, Progress, Ready, Reply
from ..wire.python import Ask
from .actions import Action
from .booting import Booting, still_booting
from .deadlines import Alarm, Deadlines
from .ending import Ending
from .exits import Exits
from .jobs import Jobs
from .model import Child, Group, Job
from .outcomes import Lost
from .recycling import Recycling
from .replacing import Replacing
from .replies import Replies
from .shutdown import Shutdown
from .sizing import Sizing
from .spawning import Spawning
from .standstill import Standstill
from .stopping import Stopping
from .time_limits import TimeLimits
from .timers import Timers
from .traces import Traces

__all__ = ("Scheduler",)


class Scheduler:
    """Decides what happens to jobs and children.

    Arguments:
        groups: the groups by name.
        limit: how many jobs may be accepted and not finished at a time, in all groups together.
        random: returns numbers from 0 to 1, for jitter.
    """

    def __init__(
        self, groups: dict[str, Group], limit: int, random: Callable[[], float] = lambda: 0.5
    ) -> None:
        self.groups = groups
        self._alarm = alarm = Alarm()
        deadlines = Deadlines(alarm)
        self._jobs = jobs = Jobs(groups, limit, alarm, deadlines)
        self._stopping = stopping = Stopping(alarm)
        self._recycling = recycling = Recycling(alarm, random)
        self._spawning = spawning = Spawning(groups, alarm, recycling, random)
        self._booting = Booting(alarm, spawning, recycling, stopping)
        self._replacing = Replacing(jobs, spawning, recycling, self._booting, stopping)
        self._ending = Ending(jobs, stopping, self._replacing)
        standstill = Standstill(alarm)
        self._traces = Traces(jobs, deadlines, stopping, self._ending, standstill)
        self._replies = Replies(
            jobs,
            deadlines,
            spawning,
            recycling,
            self._booting,
            stopping,
            self._replacing,
            self._traces,
        )
        self._time_limits = TimeLimits(deadlines, self._booting, self._replacing, self._ending)
        self._exits = Exits(jobs, spawning, stopping, self._replacing, self._traces)
        self._sizing = Sizing(groups, jobs, spawning, stopping)
        self._shutdown = Shutdown(groups, jobs, spawning, stopping, self._replacing)
        child_timers = (self._exits, self._booting, recycling, stopping, standstill)
        self._timers = Timers(groups, alarm, jobs, self._time_limits, child_timers, spawning)

    # -- starting and stopping

    def start(self, now: float) -> list[Action]:
        """Fill every slot."""
        return self._spawning.fill_all(now)

    def close(self, now: float) -> list[Action]:
        """Accept no more jobs, and drop those that wait: their messages go back to the broker.

        A job that was accepted and has lost its child waits for another one as long as one may
        come: its group spawns once more.
        """
        return self._shutdown.close(now)

    def flush(self, now: float) -> list[Action]:
        """Drop the jobs that were not accepted yet."""
        return self._jobs.drop()

    def stop(self, now: float) -> list[Action]:
        """Stop all children."""
        return self._shutdown.stop(now)

    def abandon(self) -> None:
        """Spawn no more. The caller ends the children itself."""
        self._spawning.stopped = True

    # -- events of jobs

    def submit(self, job: Job, now: float) -> list[Action]:
        """Take in a new job."""
        if self._shutdown.closed:
            return [self._jobs.refuse(job)]
        self._jobs.add(job, now)
        return []

    def trace(self, job: Job, request: bytes, now: float) -> list[Action]:
        """`job`, which is accepted or ANSWERED, is to be traced. `request` is for its tracer."""
        return self._traces.begin(job, request, now)

    def follow_up(self, job: Job, request: bytes, now: float) -> list[Action]:
        """Celery is about to be told that `job` is over. A tracer is to do `request` before."""
        return self._traces.follow_up(job, request, now)

    def give_up(self, job: Job, reason: str, now: float) -> list[Action]:
        """`job` can't be brought to its end, for `reason`."""
        return self._ending.lose(job, Lost(None, reason), None, now)

    def tell(self, job: Job, line: bytes, now: float) -> list[Action]:
        """The tracer of `job` is to read `line`: what the external child said."""
        return self._traces.tell(job, line, now)

    def terminate(
        self, job: Job, signum: int, now: float, reason: CancelReason = CancelReason.REVOKED
    ) -> list[Action]:
        """End `job` on request. If its child has the request, the child is told to cancel it for
        `reason`, or gets `signum` and is replaced."""
        return self._ending.terminate(job, signum, now, reason)

    # -- events of children

    def spawned(self, child: Child, pid: int, now: float) -> list[Action]:
        """The process of `child` runs."""
        return self._booting.spawned(child, pid, now)

    def spawn_failed(
        self, child: Child, reason: str, now: float, details: str = ""
    ) -> list[Action]:
        """The process of `child` could not be started, for `reason`. The `details` are for the case
        that none of its group can."""
        return self._exits.spawn_failed(child, reason, details, now)

    def ready(self, child: Child, greeting: Ready, pid: int | None, now: float) -> list[Action]:
        """`child` has booted; `pid` is the process that does its work, None if it is unknown."""
        return self._booting.ready(child, greeting, pid, now)

    def boot_failed(self, child: Child, message: str, now: float) -> list[Action]:
        """`child` said that it can't boot."""
        return self._exits.boot_failed(child, message, now)

    def replied(self, child: Child, reply: Reply, now: float) -> list[Action]:
        """`child` wrote a final reply."""
        return self._replies.replied(child, reply, now)

    def asked(self, child: Child, ask: Ask, now: float) -> list[Action]:
        """`child`, a tracer, asks for the exchange with an external child."""
        return self._traces.asked(child, ask, now)

    def progressed(self, child: Child, progress: Progress, now: float) -> list[Action]:
        """`child` told the progress of a job."""
        return self._replies.progressed(child, progress, now)

    def logged(self, child: Child, record: Log, now: float) -> list[Action]:
        """`child` wrote something for the log."""
        return self._replies.logged(child, record, now)

    def faulted(self, child: Child, reason: str, now: float) -> list[Action]:
        """`child` broke the protocol, or can't be served."""
        return self._replacing.fault(child, reason, now)

    def probed(self, child: Child, read: int, now: float) -> list[Action]:
        """`child` has read `read` bytes of what was written to it."""
        return self._time_limits.probed(child, read, now)

    def measured(self, child: Child, memory: int, now: float) -> None:
        """`child`, with all that it has started, takes `memory` bytes."""
        self._recycling.measured(child, memory)

    def written(self, child: Child, job: Job, offset: int, now: float) -> None:
        """The request of `job` was written to `child`, as far as its pipe took it, after `offset`
        other bytes."""
        self._jobs.sent(job, child, offset, now)
        if job.traces is not None:
            self._traces.written(job, child, now)
        self._recycling.count_begun(child)

    def unwritten(self, child: Child, reason: str, read: int, now: float) -> list[Action]:
        """A request could not be written, or not to its end, and no other can be. A job goes to
        another child if `child` has read no byte of it.

        Arguments:
            child: the child.
            reason: why, in words.
            read: how many bytes of what was written to it, it has read. It reads no more.
            now: the time.
        """
        return self._exits.unwritten(child, reason, read, now)

    def stdout_closed(self, child: Child, now: float) -> list[Action]:
        """`child` closed its stdout."""
        return self._exits.stdout_closed(child, now)

    def exited(self, child: Child, status: int, read: int, now: float) -> list[Action]:
        """The process of `child` ended. All that it wrote was told before.

        Arguments:
            child: the child.
            status: its exit status, as `subprocess.Popen.returncode`.
            read: how many bytes of what was written to it, it has read.
            now: the time.
        """
        return self._exits.exited(child, status, read, now)

    def unkillable(self, child: Child, reason: str, now: float) -> list[Action]:
        """`child`, which is STOPPING, can't be killed for `reason`."""
        return self._exits.unkillable(child, reason)

    # -- requests of operators

    def restart(self, groups: Iterable[Group], now: float) -> list[Action]:
        """Recycle all children of `groups`, those that boot included. No job is interrupted."""
        return self._spawning.restart(groups, now)

    def change_boot(self, name: str, boot: bytes, now: float) -> list[Action]:
        """Let children of the group `name` that are spawned from now on read `boot` first. Returns
        no actions."""
        self.groups[name].boot = boot
        return []

    def grow(self, count: int, now: float) -> list[Action]:
        """Add `count` to the limit, and the children that this needs."""
        return self._sizing.grow(count, now)

    def check_shrink(self, count: int) -> None:
        """Raise if `shrink` would find too few children that may go.

        Raises:
            ValueError: there are too few. The words are those of billiard's pool.
        """
        self._sizing.check_shrink(count)

    def shrink(self, count: int, now: float) -> list[Action]:
        """Take `count` off the limit, and the children that are not needed then. Call
        `check_shrink` before."""
        return self._sizing.shrink(count, now)

    # -- time

    @property
    def next_deadline(self) -> float | None:
        """Nothing is due before this; None: nothing at all. `tick` makes it exact."""
        return self._alarm.deadline

    def tick(self, now: float) -> list[Action]:
        """Do what is due at `now`."""
        return self._timers.tick(now)

    # -- decisions

    def dispatch(self, now: float) -> list[Action]:
        """Spawn the successors of children that are to be recycled. Then hand out waiting jobs in
        order of arrival, as far as the limit and the children allow."""
        actions: list[Action] = []
        # This is called for each job: what is rare is asked for first.
        if self._shutdown.closed:
            actions += self._shutdown.give_up_stranded()
        if self._jobs.orphans or self._jobs.abandoned:
            actions += self._traces.settle(now)
        if self._spawning.asleep:
            actions += self._spawning.wake(now)
        if self._recycling.marked:
            actions += self._spawning.spawn_successors(now)
        actions += self._jobs.begin_waiting(now)
        return actions

    # -- facts

    @property
    def limit(self) -> int:
        """How many jobs may be open at a time."""
        return self._jobs.limit

    @property
    def open_jobs(self) -> int:
        """How many jobs are with a child, or with their tracer after it."""
        return self._jobs.open

    @property
    def booting(self) -> bool:
        """Whether the first child of a slot has still to prove itself, or to be gone."""
        return still_booting(self.groups)

    @property
    def stopping(self) -> bool:
        """Whether no child is spawned any more."""
        return self._spawning.stopped

    @property
    def idle(self) -> bool:
        """Whether no job is open or waits for a child."""
        return self._jobs.idle
