"""What a job goes through: the queue, its child, its end.

`states.JOB_TRANSITIONS` says which state may follow which.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..wire.messages import CancelReason, Ok
from . import service
from .actions import Accept, Action, Finished, Overruled, Resolve, Write
from .crashes import Crashes
from .deadlines import Alarm, Deadlines
from .model import Child, Group, Job, JobState, Tracing
from .outcomes import Answered, Dropped, Faulted, Lost, Outcome, TimedOut
from .queues import Queues

__all__ = ("MAX_REQUEUES", "Jobs", "overruled")

#: How many children may end before they have read a job, until the job is given up.
MAX_REQUEUES = 3


class Jobs:
    """The jobs of this worker.

    Arguments:
        groups: the groups by name.
        limit: how many jobs may be open at a time, in all groups together.
        alarm: is set to when jobs may be handed out again.
        deadlines: keeps those of the jobs.
    """

    def __init__(
        self, groups: dict[str, Group], limit: int, alarm: Alarm, deadlines: Deadlines
    ) -> None:
        self.limit = limit
        #: How many jobs are RESERVED, SENT or ANSWERED, traces not counted.
        self.open = 0
        #: Traces whose job has ended in another way.
        self.abandoned: list[tuple[Job, Outcome]] = []
        #: Jobs whose trace was lost, how, and their tracer.
        self.orphans: list[tuple[Job, Lost, Child | None]] = []
        self._alarm = alarm
        self._deadlines = deadlines
        self._queues = Queues(groups)
        self._crashes = Crashes()
        self._arrived = 0
        #: Until when no job is handed out.
        self._held_until: float | None = None

    @property
    def idle(self) -> bool:
        """Whether no job is open or waits."""
        return not self.open and not self._queues

    # -- the queue

    def add(self, job: Job, now: float) -> None:
        """Queue a new job."""
        self._arrived += 1
        job.number = self._arrived
        job.submitted_at = now
        job.isolated = self._crashes.is_suspect(job)
        self._queues.add(job)

    @staticmethod
    def refuse(job: Job) -> Resolve:
        """Drop a job that is in no queue."""
        job.move(JobState.CLOSED)
        return Resolve(job, Dropped(), None)

    def drop(self) -> list[Action]:
        """Drop the jobs that were not accepted yet, and hold none back any more."""
        self._held_until = None
        return [self.refuse(job) for job in self._queues.drop()]

    def hold(self, until: float) -> None:
        """Hand out no job until `until`, or until `drop`."""
        self._held_until = until
        self._alarm.set(until)

    def begin_waiting(self, now: float) -> list[Action]:
        """Hand out the jobs that wait, in order of arrival, as far as the limit and the children
        allow. Traces belong to jobs that were handed out before: they need a tracer only."""
        actions: list[Action] = []
        if not self._queues:
            return actions
        while pair := self._queues.next_trace():
            actions += self.reserve(*pair, now)
        while self.open < self.limit and self._held_until is None:
            pair = self._queues.next_pair()
            if pair is None:
                break
            actions += self.reserve(*pair, now)
        return actions

    def tick(self, now: float) -> list[Action]:
        """Close jobs whose hard limit is over while they wait for another child."""
        if self._held_until is not None and now >= self._held_until:
            self._held_until = None
        self._alarm.set(self._held_until)
        actions: list[Action] = []
        for job in self._queues.accepted():
            if job.deadline is not None and now >= job.deadline:
                actions += self.resolve(job.traces or job, TimedOut(job.timeout or 0.0))
            else:
                self._alarm.set(job.deadline)
        return actions

    # -- with a child

    def reserve(self, job: Job, child: Child, now: float) -> list[Action]:
        """Give `job`, which waits, to `child`."""
        self._queues.remove(job)
        self.open += job.traces is None
        job.move(JobState.RESERVED)
        actions: list[Action] = []
        job.child = child
        service.take(child, job)
        child.group.counters.count_wait(now - job.submitted_at)
        if job.request is not None:
            actions.append(Write(child, job))
        if job.accepted:
            self._deadlines.watch(job)
        else:
            self._deadlines.start(job, child, now)
            job.accepted = True
            actions.append(Accept(job, child, now))
        return actions

    @staticmethod
    def provide(job: Job, request: bytes) -> list[Action]:
        """Note the request of `job`, and write it if the job waits for that."""
        job.request = request
        if job.state is not JobState.RESERVED or job.child is None:
            return []
        return [Write(job.child, job)]

    def sent(self, job: Job, child: Child, offset: int, now: float) -> None:
        """The request of `job` was written to `child`, after `offset` other bytes."""
        job.move(JobState.SENT)
        job.begun_at = now
        job.offset = offset
        self._deadlines.hear(job, child, now)

    def cancel(
        self, job: Job, child: Child, reason: CancelReason, grace: float, since: str, now: float
    ) -> None:
        """Note that `child` has to end `job`.

        Arguments:
            job: the job.
            child: the child; it gets no new job meanwhile.
            reason: why.
            grace: how many seconds it has. If it was told before, it gets no more time.
            since: what the grace counts from, in words.
            now: the time.
        """
        if job.kill_at is None:
            service.suspend(child)
        self._deadlines.give_grace(job, now + grace)
        job.cancelled = reason
        job.grace_given = f"for {grace:g} s after {since} ({reason.value})"

    # -- back to the queue

    @staticmethod
    def take_back_unread(child: Child, read: int) -> None:
        """Note which requests `child` has not read a byte of: they were as good as never written.

        Arguments:
            child: a child that will read no more.
            read: how many bytes it has read.
        """
        for job in child.jobs.values():
            if job.state is JobState.SENT and job.offset >= read:
                job.move(JobState.RESERVED)

    def take_back(self, child: Child) -> list[Action]:
        """Put the jobs that `child` has not begun back into the queue."""
        actions: list[Action] = []
        for job in tuple(child.jobs.values()):
            if job.state is JobState.RESERVED:
                service.take_away(child, job)
                actions += self._requeue(job)
        return actions

    def _requeue(self, job: Job) -> list[Action]:
        """Put `job` back to its old place in the queue. Its time limits go on.

        After several children, give it up: all may be broken, or the job is the cause.
        """
        job.requeues += 1
        if job.requeues > MAX_REQUEUES or _is_needless(job):
            reason = f"{job.requeues} children in a row ended before they had read the job"
            return self.resolve(job, Lost(None, reason))
        self.open -= job.traces is None
        job.move(JobState.QUEUED)
        job.child = job.cancelled = None
        self._deadlines.detach(job)
        self._queues.put_back(job)
        return []

    # -- the end

    def answer(self, job: Job, outcome: Outcome) -> Resolve:
        """Note that `job`, which is no trace, ended with `outcome`, in which its child had a part.
        If a tracer has a part in it too, it gets the outcome, and closes the job later."""
        child = job.child
        if _needs_tracer(job, outcome):
            job.move(JobState.ANSWERED)
            job.child = None
            self._deadlines.hand_over(job, job.trace)
        else:
            self.close(job, survived=True)
        return Resolve(job, outcome, child)

    def resolve(self, job: Job, outcome: Outcome, culprit: Child | None = None) -> list[Action]:
        """Close `job` with an outcome that its tracer has no part in.

        The job stays in `Child.jobs`: the caller releases or replaces the child. A trace is lost,
        and with it what it traces, unless that is over already.

        Arguments:
            job: the job.
            outcome: how it ended. A trace can only be lost.
            culprit: the child that the outcome came from, if it is not the one that has the job.
        """
        child, trace = job.child, job.trace
        self.close(job)
        if job.traces is not None:
            return self._lose_trace(job.traces, outcome, child)
        unfinished = trace is not None and trace.state is not JobState.CLOSED
        if trace is not None and unfinished:
            self._deadlines.clear(trace)
            self.abandoned.append((trace, outcome))
        return [Resolve(job, outcome, culprit or child, unfinished)]

    def _lose_trace(self, job: Job, outcome: Outcome, tracer: Child | None) -> list[Action]:
        if job.state is JobState.CLOSED:
            return [Finished(job, None)]
        assert isinstance(outcome, Lost)
        self.orphans.append((job, outcome, tracer))
        return []

    def fail(self, job: Job, reason: str) -> list[Action]:
        """Note that the child of `job` broke the protocol."""
        if job.traces is not None:
            return self.resolve(job, Lost(None, reason))
        return [self.answer(job, Faulted(reason))]

    def close(self, job: Job, survived: bool = False) -> None:
        """Note that `job` is over; `survived` is whether it has crashed no child, and no tracer."""
        if survived:
            self._crashes.clear(job)
        if job.state is JobState.QUEUED:
            self._queues.remove(job)
        else:
            self.open -= job.traces is None
        job.move(JobState.CLOSED)
        job.child = None
        self._deadlines.clear(job)

    def lose(self, child: Child, lost: Lost, count_crash: bool) -> list[Action]:
        """Close the jobs of `child`, which is gone.

        Arguments:
            child: the child; it has begun its jobs, or the worker stops.
            lost: the outcome of each.
            count_crash: whether its end counts as a crash by its jobs.
        """
        actions: list[Action] = []
        for job in child.jobs.values():
            if job.state in (JobState.RESERVED, JobState.SENT):
                crashes = self._crashes.count(job, child) if count_crash else 0
                actions += self.resolve(job, replace(lost, crashes=crashes))
            actions += overruled(job)
        return actions


def overruled(job: Job) -> list[Action]:
    """Return that `job` has ended in its child too, if it had been revoked before."""
    revoked = job.cancelled is CancelReason.REVOKED and job.traces is None
    return [Overruled(job)] if revoked else []


def _needs_tracer(job: Job, outcome: Outcome) -> bool:
    if job.tracing is Tracing.UNLESS_OK:
        return not (isinstance(outcome, Answered) and isinstance(outcome.reply, Ok))
    return job.tracing is not Tracing.NEVER


def _is_needless(job: Job) -> bool:
    """Return whether `job` is the trace of a job that is over."""
    return job.traces is not None and job.traces.state is JobState.CLOSED
