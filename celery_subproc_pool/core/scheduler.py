"""Decides what happens to jobs and children; does none of it.

Layer: above `children`, `limits`, `queues` and `crashes`. Must not import a clock, processes or
Celery.

Events come in as method calls with the time they happened at (seconds on any monotonic clock);
every method returns the actions to perform, in order. An event only notes what happened. It is
`dispatch`, called when all that is known has been told, that hands jobs to idle children: a line
that nobody asked for must retire its child before that child gets another job.

A job of an external child goes through::

    QUEUED --dispatch--> RESERVED --written--> SENT --reply--> ANSWERED --finish--> CLOSED
       ^                    |                   |
       +--- child is gone --+                   +--- lost, timed out, terminated ----> CLOSED

It is RESERVED while the worker's tracer prepares the request, and ANSWERED while the tracer
stores the result (or the failure: a protocol fault is an answer too). The request of a job that is
not traced here is known from the start, and its answer closes it. No byte of a request has been
written before its job is SENT. A request of which no byte was written, or none read, may go to
another child; no other.

A job that is to end before its child has answered costs the child its life, unless the child can
be told to cancel it, or has other jobs too: then it stays in the child's hands, CLOSED or not,
until the child answers or `cancel_grace` is over. So it does, until `stop_timeout` is over, if it
is revoked by the signal that tells the child of soft time limits.

A reply counts whenever it comes: a child that takes no more requests is left to answer those that
it has, within their limits, and one that is being ended is heard until it has.

What becomes of children, and when the next one is spawned, is decided by `children`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable

from ..wire.messages import CancelReason, Error, Feature, Log, Progress, Ready, Reply, Throttled
from .actions import (
    Accept,
    Action,
    Cancel,
    CloseStdin,
    Finished,
    Forget,
    Interrupt,
    Logged,
    Overruled,
    Probe,
    Progressed,
    Resolve,
    SoftTimeout,
    Stranded,
    Unkillable,
    Write,
)
from .crashes import Crashes
from .lifecycle import Children
from .limits import Alarm, Limits
from .model import Cause, Child, ChildState, Group, Job, JobState
from .outcomes import (
    Answered,
    Dropped,
    Faulted,
    Lost,
    Outcome,
    SoftTimedOut,
    Terminated,
    TimedOut,
    describe_exit,
)
from .queues import Queues

__all__ = ("Scheduler",)

#: Seconds that a child may take to exit after it closed its stdout.
EOF_GRACE = 0.5

#: Seconds after something was due that show that the engine was not turned.
LATE = 1.0

#: Seconds that no waiting job is begun after one was ended because the worker stops or has lost its
#: broker, unless the end of that, `close` or `flush`, comes earlier.
HOLD = 5.0

#: Why a child that was killed does not end.
HELD = "it has not exited since it got SIGKILL, so the system holds on to it (a disk that hangs?)"

#: How many children may end before they have read a job, until the job is given up.
MAX_LOSSES = 3

#: What a child is replaced for, if it does not end a job that it was told to.
_CAUSES = {
    CancelReason.SOFT_TIME_LIMIT: Cause.TIMED_OUT,
    CancelReason.TIME_LIMIT: Cause.TIMED_OUT,
    CancelReason.REVOKED: Cause.TERMINATED,
    CancelReason.SHUTDOWN: Cause.STOPPED,
}


class Scheduler:
    """Jobs, children, deadlines and policy. Pure: see this module's docstring.

    Arguments:
        groups: the groups by name.
        limit: how many jobs may be accepted and not finished at a time, in all groups together.
        random: returns numbers from 0 to 1, for jitter.
    """

    def __init__(
        self, groups: dict[str, Group], limit: int, random: Callable[[], float] = lambda: 0.5
    ) -> None:
        self.groups = groups
        self.limit = limit
        #: Jobs that are with a child or with their tracer after it.
        self.open_jobs = 0
        self._alarm = Alarm()
        self._limits = Limits(self._alarm)
        self._children = Children(groups, self._alarm, random)
        self._queues = Queues(groups)
        self._crashes = Crashes()
        self._closed = False
        #: Until when no job is handed out.
        self._held_until: float | None = None
        self._jobs_seen = 0

    # -- starting and stopping

    def start(self, now: float) -> list[Action]:
        """Fill every slot."""
        return self._children.refill_all(now)

    def close(self, now: float) -> list[Action]:
        """Accept no more jobs: drop those that wait. Their messages go back to the broker.

        Those that were accepted and have lost their child are still waited for, if there may be
        another one: for that, their group has one more try.
        """
        self._closed = True
        actions = self.flush()
        for group in self.groups.values():
            if group.waiting:
                actions += self._children.try_anew(group, now)
        return actions

    def flush(self) -> list[Action]:
        """Drop the jobs that were not accepted yet."""
        self._held_until = None
        actions: list[Action] = []
        for job in self._queues.drop():
            job.state = JobState.CLOSED
            actions.append(Resolve(job, Dropped(), None))
        return actions

    def stop(self, now: float) -> list[Action]:
        """Stop all children: gently those that are idle, at once those that are not."""
        self.abandon()
        actions: list[Action] = []
        for child in self._children:
            if child.state is not ChildState.BUSY:
                actions += self._children.stop_gently(child, now)
            elif child.cancels:
                actions += self._stop_cancelling(child, now)
            elif child.pending_cancels == len(child.jobs):
                actions += self._stop_noticed(child, now)
            else:
                actions += self._replace(child, Cause.STOPPED, "the worker stops", now)
        return actions

    def _stop_cancelling(self, child: Child, now: float) -> list[Action]:
        """Tell `child` to end what it has in hand and exit; it is killed if it does not."""
        actions = self._take_back(child)
        actions += [
            Cancel(child, job, CancelReason.SHUTDOWN)
            for job in child.jobs.values()
            if job.state is JobState.SENT and job.cancelled is None
        ]
        actions += self._children.stop_gently(child, now)
        grace = child.group.settings.cancel_grace
        self._children.escalate_at(child, now + grace, terminating=True)
        return actions

    def _stop_noticed(self, child: Child, now: float) -> list[Action]:
        """Let `child` end what it has in hand, which is over, in the time that it has for that."""
        last = max(job.kill_at or now for job in child.jobs.values())
        actions = self._children.stop_gently(child, now)
        self._children.escalate_at(child, last, terminating=True)
        return actions

    def abandon(self) -> None:
        """Spawn no more: somebody else ends the children."""
        self._children.stopping = True

    # -- events of jobs

    def submit(self, job: Job, now: float) -> list[Action]:
        """Take in a new job."""
        if self._closed:
            job.state = JobState.CLOSED
            return [Resolve(job, Dropped(), None)]
        self._jobs_seen += 1
        job.number = self._jobs_seen
        job.submitted_at = now
        job.isolated = self._crashes.suspects(job)
        self._queues.add(job)
        return []

    def provide(self, job: Job, request: bytes, now: float) -> list[Action]:
        """The tracer of `job` has prepared its request line."""
        job.request = request
        if job.state is not JobState.RESERVED or job.child is None:
            return []
        return [Write(job.child, job)]

    def finish(self, job: Job, now: float) -> list[Action]:
        """The tracer of `job` is through, maybe without ever having needed the child."""
        if job.state is JobState.CLOSED:
            # Its end was settled while the tracer was not looking.
            return []
        if job.state is JobState.QUEUED:
            # It lost its child before it wanted one, and was waiting for the next.
            self._queues.remove(job)
        else:
            self.open_jobs -= 1
        actions: list[Action] = [Finished(job)]
        if job.child is not None:
            actions += self._children.release(job.child, job, now)
        self._close(job)
        return actions

    def terminate(
        self, job: Job, signum: int, now: float, reason: CancelReason = CancelReason.REVOKED
    ) -> list[Action]:
        """End `job` on request. Its child, if it has the request, is told so for `reason`; or it
        gets `signum` and is replaced.

        In a shutdown, and when the broker is lost, Celery ends the jobs that run before it takes
        back those that wait: none of these is to have the place of one that was ended.
        """
        if reason is CancelReason.SHUTDOWN:
            self._held_until = now + HOLD
            self._alarm.set(self._held_until)
        if job.state in (JobState.ANSWERED, JobState.CLOSED):
            return []
        child, sent = job.child, job.state is JobState.SENT
        actions = self._resolve(job, Terminated(signum))
        if child is None:
            return actions
        if child.state is ChildState.STOPPING:
            others = any(other.state is JobState.SENT for other in child.jobs.values())
            return actions if others else [*actions, self._children.kill(child, signum, now)]
        if not sent:
            return [*actions, *self._children.release(child, job, now)]
        if self._is_spared(child):
            return [*actions, *self._cancel(child, job, reason, now)]
        if signum == _soft_signal(child):
            return [*actions, self._interrupt(child, job, signum, reason, now)]
        stop_timeout = child.group.settings.stop_timeout
        self._children.escalate_at(child, now + stop_timeout, terminating=True)
        return [
            *actions,
            self._children.kill(child, signum, now),
            *self._vacate(child, Cause.TERMINATED, "its job was terminated", now),
        ]

    # -- events of children

    def spawned(self, child: Child, pid: int, now: float) -> list[Action]:
        """The process of `child` runs."""
        return self._children.spawned(child, pid, now)

    def ready(self, child: Child, greeting: Ready, pid: int | None, now: float) -> list[Action]:
        """`child` has booted; `pid` is the process that does its work, None if it is unknown."""
        return self._children.ready(child, greeting, pid, now)

    def boot_failed(self, child: Child, message: str, now: float) -> list[Action]:
        """`child` said that it can't boot."""
        if child.state is ChildState.STOPPING:
            return []
        summary, _, _ = message.partition("\n")
        actions = self._replace(child, Cause.NOT_STARTED, f"it can't boot: {summary}", now)
        child.group.failure = message
        return actions

    def spawn_failed(self, child: Child, reason: str, now: float) -> list[Action]:
        """The process of `child` could not be started."""
        del child.group.children[child.number]
        if child.state is ChildState.STOPPING:
            # It was not wanted any more.
            self._children.move(child, ChildState.GONE)
            return []
        return self._vacate(child, Cause.NOT_STARTED, reason, now, ChildState.GONE)

    def replied(self, child: Child, reply: Reply, now: float) -> list[Action]:
        """`child` wrote a final reply."""
        job = self._asked(child, reply.id)
        if child.state is ChildState.STOPPING and not self._still_counts(job, reply):
            return []
        if job is None:
            return self.faulted(child, _astray(child, reply, "reply"), now)
        actions: list[Action] = []
        if job.state is JobState.SENT:
            child.group.runs.append(now - job.begun_at)
            child.group.throttled += isinstance(reply, Throttled)
            actions.append(self._answer(job, Answered(reply), child))
        else:
            actions += _overruled(job)
        actions += self._children.replied(child, bool(reply.retire), now)
        actions += self._children.release(child, job, now)
        return actions

    def _still_counts(self, job: Job | None, reply: Reply) -> bool:
        """Whether `reply`, of a child that is being ended, is the end of `job`.

        After a fault, no job is left for it to end; nor is one that was ended itself. One that
        shares its child's fate may have succeeded before; that it failed may be due to the end.
        When the pool stops, all jobs that are left are given back.
        """
        if self._children.stopping or isinstance(reply, Error):
            return False
        return job is not None and job.state is JobState.SENT

    def progressed(self, child: Child, progress: Progress, now: float) -> list[Action]:
        """`child` told how far a job is."""
        if child.state is ChildState.STOPPING:
            return []
        if Feature.PROGRESS not in child.features:
            return self.faulted(child, _unannounced(Feature.PROGRESS), now)
        job = self._asked(child, progress.id)
        if job is None:
            return self.faulted(child, _astray(child, progress, "progress"), now)
        if job.state is not JobState.SENT:
            # It was told to end it, and has not yet.
            return []
        self._limits.hear(job, child, now)
        return [Progressed(job, progress.meta or {})]

    def logged(self, child: Child, record: Log, now: float) -> list[Action]:
        """`child` wrote something for the log. What it says of a job that is over is welcome."""
        if child.state is not ChildState.STOPPING and Feature.LOG not in child.features:
            return self.faulted(child, _unannounced(Feature.LOG), now)
        job = None if record.id is None else self._asked(child, record.id)
        if job is not None:
            self._limits.hear(job, child, now)
        return [Logged(child, job, record)]

    @staticmethod
    def _asked(child: Child, task_id: str | None) -> Job | None:
        """Return the job that a message of `child` is about, if the child has its request."""
        job: Job | None
        if task_id is not None:
            job = child.jobs.get(task_id)
        elif child.capacity == 1:
            job = next(iter(child.jobs.values()), None)
        else:
            job = None
        return None if job is None or job.state is JobState.RESERVED else job

    def measured(self, child: Child, memory: int, now: float) -> list[Action]:
        """`child`, with all that it has started, takes `memory` bytes."""
        self._children.measured(child, memory)
        return []

    def faulted(self, child: Child, reason: str, now: float) -> list[Action]:
        """`child` wrote what the protocol does not allow, or can't be served: replace it."""
        if child.state in (ChildState.STOPPING, ChildState.GONE):
            return []
        actions: list[Action] = [
            self._answer(job, Faulted(reason), child)
            for job in child.jobs.values()
            if job.state is JobState.SENT
        ]
        return [*actions, *self._replace(child, Cause.FAULTED, reason, now)]

    def probed(self, child: Child, read: int, now: float) -> list[Action]:
        """It was looked how many bytes of what was written to it `child` has read."""
        job = next(iter(child.jobs.values()), None)
        if job is None or job.state is not JobState.SENT:
            return []
        if read <= job.offset:
            child.still_boots = True
            seconds = child.group.settings.start_timeout
            if now < child.spawned_at + seconds:
                return []
            # What it took to boot is not the job's: not there, and not with the next child.
            self._limits.start(job, child, now)
            # Its exit tells whether it has read the job after all; if not, another child has it.
            reason = f"it did not read its first request within {seconds:g} s (start_timeout)"
            return self._replace(child, Cause.NOT_STARTED, reason, now)
        child.has_read = True
        if child.still_boots:
            self._limits.start(job, child, now)
        else:
            self._limits.restore(job, now)
        return []

    def written(self, child: Child, job: Job, offset: int, now: float) -> list[Action]:
        """The request of `job` was written to `child`, as far as its pipe took it.

        Arguments:
            child: the child.
            job: the job.
            offset: how many bytes had been written to the child before.
            now: the time.
        """
        job.state = JobState.SENT
        job.begun_at = now
        job.offset = offset
        self._children.begins(child)
        self._limits.hear(job, child, now)
        return []

    def unwritten(self, child: Child, reason: str, read: int, now: float) -> list[Action]:
        """A request could not be written, or not to its end, and no other can be: a job of which
        `child` has read no byte goes to another one.

        Arguments:
            child: the child.
            reason: why, in words.
            read: how many bytes of what was written to it, it has read; it will read no more.
            now: the time.
        """
        if child.state is not ChildState.BUSY:
            return self._expect_exit(child, reason, now)
        self._take_back_unread(child, read)
        sent = [job for job in child.jobs.values() if job.state is not JobState.RESERVED]
        if not sent:
            return self._expect_exit(child, reason, now)
        # It may answer, though it takes no more: it has until the limits of its jobs.
        actions = self._vacate(child, Cause.EXITED, reason, now, ChildState.BUSY)
        if not any(job.offset + len(job.request or b"") <= read for job in sent):
            # It has read none to its end, and can do no more than say so.
            stop_timeout = child.group.settings.stop_timeout
            self._children.escalate_at(child, now + stop_timeout, terminating=False)
        return actions

    @staticmethod
    def _take_back_unread(child: Child, read: int) -> None:
        """Let what `child` has not read a byte of be as if it had never been written."""
        for job in child.jobs.values():
            if job.state is JobState.SENT and job.offset >= read:
                job.state = JobState.RESERVED

    def stdout_closed(self, child: Child, now: float) -> list[Action]:
        """`child` closed its stdout: it exits, or has lost its use. Its exit status says more."""
        return self._expect_exit(child, "it closed its stdout", now)

    def _expect_exit(self, child: Child, reason: str, now: float) -> list[Action]:
        """Take `child` out of service, which shows that it is about to exit, and give it time."""
        if child.state is ChildState.STOPPING:
            return []
        if child.state is ChildState.STARTING:
            # Nothing but its exit status will tell more.
            child.reason = reason
            child.startup_grace_until = None
            child.deadline = now + EOF_GRACE
            self._alarm.set(child.deadline)
            return []
        waited_for = any(job.state is JobState.SENT for job in child.jobs.values())
        grace = EOF_GRACE if waited_for else child.group.settings.stop_timeout
        self._children.escalate_at(child, now + grace, terminating=waited_for)
        return self._vacate(child, _cause_of_exit(child), reason, now)

    def exited(self, child: Child, status: int, read: int, now: float) -> list[Action]:
        """The process of `child` ended; all that it wrote has been told before.

        Arguments:
            child: the child.
            status: its exit status, as `subprocess.Popen.returncode`.
            read: how many bytes of what was written to it, it has read.
            now: the time.
        """
        self._take_back_unread(child, read)
        actions: list[Action] = []
        seen_before = child.reason
        killed = status == -signal.SIGKILL and not child.killed
        reason = f"it exited: {describe_exit(status, killed)}"
        if child.state is not ChildState.STOPPING and not child.drains:
            actions += self._vacate(child, _cause_of_exit(child), reason, now, ChildState.GONE)
        else:
            self._children.move(child, ChildState.GONE)
            if not child.proven and not child.killed:
                child.group.failure = f"{seen_before}; {reason}" if seen_before else reason
            if not self._children.stopping:
                actions += self._take_back(child)
        ends: list[Action] = []
        for job in child.jobs.values():
            if job.state in (JobState.RESERVED, JobState.SENT):
                crashes = 0 if self._children.stopping else self._crashes.count(job, child)
                lost = Lost(status, seen_before, killed, crashes)
                ends += self._resolve(job, lost)
            ends += _overruled(job)
        child.jobs.clear()
        child.deadline = None
        self._children.remove(child)
        return [*ends, *actions, Forget(child, self._children.leaves(child))]

    def unkillable(self, child: Child, reason: str, now: float) -> list[Action]:
        """`child` goes on, though it was to be killed: nobody waits for its exit any more.

        Arguments:
            child: a child that is STOPPING.
            reason: why that is, in words.
            now: the time.
        """
        if child.unkillable:
            return []
        child.unkillable = True
        child.deadline = None
        # The last that it can be told: there will be no more jobs.
        actions: list[Action] = [
            Unkillable(child, reason, tuple(child.jobs.values())),
            CloseStdin(child),
        ]
        for job in child.jobs.values():
            if job.state in (JobState.RESERVED, JobState.SENT):
                lost = Lost(None, f"its child can't be killed: {reason}")
                actions += self._resolve(job, lost)
        child.jobs.clear()
        return actions

    def _take_back(self, child: Child) -> list[Action]:
        """Put the jobs of `child` back into the queue that it has not begun."""
        actions: list[Action] = []
        for job in tuple(child.jobs.values()):
            if job.state is JobState.RESERVED:
                del child.jobs[job.task_id]
                actions += self._requeue(job)
        return actions

    def restart(self, groups: Iterable[Group], now: float) -> list[Action]:
        """Replace all children of `groups` by fresh ones, few at a time: no job pending_cancels."""
        return [action for group in groups for action in self._children.restart(group, now)]

    def change_boot(self, name: str, boot: bytes, now: float) -> list[Action]:
        """Children of the group `name` that are spawned from now on read `boot` first."""
        self.groups[name].boot = boot
        return []

    # -- time

    @property
    def next_deadline(self) -> float | None:
        """Nothing is due before this; None: nothing is. A lower bound, made exact by `tick`."""
        return self._alarm.deadline

    def tick(self, now: float) -> list[Action]:
        """Do what is due at `now`."""
        if self.next_deadline is None or now < self.next_deadline:
            return []
        if now - self.next_deadline > LATE:
            self._excuse_silence(now)
        self._alarm.deadline = None
        if self._held_until is not None and now >= self._held_until:
            self._held_until = None
        self._alarm.set(self._held_until)
        actions: list[Action] = []
        for child in self._children:
            for job in tuple(child.jobs.values()):
                # The end of one job may be the child's.
                if child.state is ChildState.BUSY:
                    actions += self._tick_job(child, job, now)
            if self._children.is_overdue(child, now):
                actions += self.unkillable(child, HELD, now)
            actions += self._children.tick(child, now)
        actions += self._children.refill_all(now)
        for job in self._queues.accepted():
            # It lost its child, but not its limit.
            if job.deadline is not None and now >= job.deadline:
                actions += self._resolve(job, TimedOut(job.timeout or 0.0))
            else:
                self._alarm.set(job.deadline)
        return actions

    def _excuse_silence(self, now: float) -> None:
        """Nobody has listened for a while (the broker was gone, say): children may have waited
        for room in a pipe. What they had to say is heard from now on."""
        for child in self._children:
            for job in child.jobs.values():
                if job.silence_deadline is not None:
                    self._limits.hear(job, child, now)

    def _tick_job(self, child: Child, job: Job, now: float) -> list[Action]:
        actions: list[Action] = []
        if job.kill_at is not None and now >= job.kill_at:
            return self._give_up(child, job, now)
        if job.state is JobState.SENT and not child.has_read and self._limits.defer(job, now):
            return [Probe(child)]
        over = self._limits.hard_one_over(job, child, now)
        if over is not None:
            return self._time_out(child, job, over, now)
        if job.soft_deadline is not None and now >= job.soft_deadline:
            job.soft_deadline = None
            actions += self._time_out_softly(child, job, now)
        self._limits.watch(job)
        return actions

    def _time_out(self, child: Child, job: Job, over: TimedOut, now: float) -> list[Action]:
        sent = job.state is JobState.SENT
        actions = self._resolve(job, over)
        if not sent:
            return [*actions, *self._children.release(child, job, now)]
        if self._is_spared(child):
            return [*actions, *self._cancel(child, job, CancelReason.TIME_LIMIT, now)]
        if over.silent:
            reason = f"it told nothing of its job for {over.seconds:g} s (inactivity_timeout)"
        else:
            reason = f"its job took longer than {over.seconds:g} s (hard time limit)"
        unfinished = child.unfinished
        if unfinished:
            reason += f"; {unfinished}"
        elif not child.jobs_done and not child.group.settings.handshake:
            # The commonest mistake in a new child.
            reason += "; it has never answered: does it flush its stdout after each reply?"
        return [*actions, *self._put_down(child, Cause.TIMED_OUT, reason, now)]

    def _time_out_softly(self, child: Child, job: Job, now: float) -> list[Action]:
        sent = job.state is JobState.SENT
        if sent and child.cancels:
            cancel = self._cancel(child, job, CancelReason.SOFT_TIME_LIMIT, now)
            return [*cancel, SoftTimeout(job, child, None)]
        return [SoftTimeout(job, child, _soft_signal(child) if sent else None)]

    # -- ending one job of a child, and not the others

    @staticmethod
    def _is_spared(child: Child) -> bool:
        """Whether `child` is given time to end a job of its own, rather than be killed."""
        return child.cancels or len(child.jobs) > 1

    def _cancel(self, child: Child, job: Job, reason: CancelReason, now: float) -> list[Action]:
        """Have `child` end `job`, which it still holds, within its grace."""
        grace = child.group.settings.cancel_grace
        told = "it was told to cancel it" if child.cancels else "that was over"
        self._give_notice(child, job, reason, grace, told, now)
        return [Cancel(child, job, reason)] if child.cancels else []

    def _interrupt(
        self, child: Child, job: Job, signum: int, reason: CancelReason, now: float
    ) -> Interrupt:
        """Have `child` end `job`, which it still holds, as it does at a soft time limit: it lives
        on if it has done so by the time that it would have to exit in a stop."""
        grace = child.group.settings.stop_timeout
        told = f"it was sent {signal.Signals(signum).name}"
        self._give_notice(child, job, reason, grace, told, now)
        return Interrupt(child, signum)

    def _give_notice(
        self, child: Child, job: Job, reason: CancelReason, grace: float, told: str, now: float
    ) -> None:
        kill_at = now + grace
        if job.kill_at is None:
            self._children.give_notice(child)
            job.kill_at = kill_at
        # One that was told before gets no more time than it had then.
        job.kill_at = min(job.kill_at, kill_at)
        job.cancelled = reason
        job.notice = f"for {grace:g} s after {told} ({reason.value})"
        self._alarm.set(job.kill_at)

    def _give_up(self, child: Child, job: Job, now: float) -> list[Action]:
        """`child` has not ended `job` within its grace: that costs it its life."""
        assert job.cancelled is not None
        actions: list[Action] = []
        if job.state is JobState.SENT:
            actions.append(self._answer(job, SoftTimedOut(job.soft_timeout or 0.0), child))
        reason = f"it went on with {job.title} {job.notice}"
        unfinished = child.unfinished
        if unfinished:
            reason += f"; {unfinished}"
        return [*actions, *self._put_down(child, _CAUSES[job.cancelled], reason, now)]

    # -- size

    def grow(self, count: int, now: float) -> list[Action]:
        """Add `count` to the limit, and the children that this needs."""
        self.limit += count
        return self._children.grow(self.limit, now)

    def check_shrink(self, count: int) -> None:
        """Raise if `shrink` would find too few children that may go: a child that can have only
        one job at a time, and has it, may not.

        Raises:
            ValueError: there are too few. In the words of billiard's pool.
        """
        if count > self.limit or not self._children.can_shrink(self.limit - count):
            raise ValueError("Can't shrink pool. All processes busy!")

    def shrink(self, count: int, now: float) -> list[Action]:
        """Take `count` off the limit, and the children that are needed no longer, as
        `check_shrink` has allowed."""
        self.limit -= count
        return self._children.shrink(self.limit, now)

    # -- decisions

    def dispatch(self, now: float) -> list[Action]:
        """Hand waiting jobs to idle children, in order of arrival, as far as `limit` allows.

        And spawn the successors of children that are worn.
        """
        actions = self._children.renew(now)
        if self._closed:
            actions += self._give_up_waiting()
        while self.open_jobs < self.limit and self._held_until is None:
            pair = self._queues.next_pair()
            if pair is None:
                break
            actions += self._reserve(*pair, now)
        return actions

    def _give_up_waiting(self) -> list[Action]:
        """End jobs that no child will ever have, for the worker stops."""
        actions: list[Action] = []
        for group in self.groups.values():
            if group.waiting and (not self.limit or self._children.is_barren(group)):
                jobs = tuple(group.waiting)
                why, _, _ = group.failure.partition("\n")
                reason = f"no child of the group {group.name} can start"
                reason += f": {why}" if why else ", for it has none"
                actions.append(Stranded(group, reason, jobs))
                lost = Lost(None, f"the worker stops, and {reason}", stranded=True)
                for job in jobs:
                    actions += self._resolve(job, lost)
        return actions

    def _reserve(self, job: Job, child: Child | None, now: float) -> list[Action]:
        actions: list[Action] = []
        self._queues.remove(job)
        self.open_jobs += 1
        job.state = JobState.RESERVED
        if child is not None:
            self._children.reserve(child, job)
            child.group.waits.append(now - job.submitted_at)
            if job.accepted:
                self._limits.watch(job)
            else:
                self._limits.start(job, child, now)
        if not job.accepted:
            job.accepted = True
            actions.append(Accept(job, child, now))
        if job.request is not None and child is not None:
            actions.append(Write(child, job))
        return actions

    def _answer(self, job: Job, outcome: Outcome, child: Child) -> Resolve:
        """Give `outcome` to the tracer of `job`, which brings the job to its end."""
        self._crashes.clear(job)
        self._close(job)
        if job.traced_here:
            job.state = JobState.ANSWERED
        else:
            self.open_jobs -= 1
        return Resolve(job, outcome, child)

    @staticmethod
    def _close(job: Job) -> None:
        job.state = JobState.CLOSED
        job.child = job.deadline = job.soft_deadline = job.silence_deadline = None

    def _resolve(self, job: Job, outcome: Outcome) -> list[Action]:
        """Close `job` with an outcome that its tracer has no part in.

        Its child still holds it: the caller releases or vacates the child.
        """
        child = job.child
        if job.state is JobState.QUEUED:
            self._queues.remove(job)
        else:
            self.open_jobs -= 1
        self._close(job)
        return [Resolve(job, outcome, child)]

    def _requeue(self, job: Job) -> list[Action]:
        """Put a job whose request no child has begun back where it was in the queue.

        Its limits go on. After several children, give it up: they may all be broken.
        """
        job.losses += 1
        if job.losses > MAX_LOSSES:
            reason = f"{job.losses} children in a row ended before they had read the job"
            return self._resolve(job, Lost(None, reason))
        self.open_jobs -= 1
        job.state = JobState.QUEUED
        job.child = job.silence_deadline = job.kill_at = job.cancelled = None
        self._alarm.set(job.deadline)
        self._queues.put_back(job)
        return []

    def _put_down(self, child: Child, cause: Cause, reason: str, now: float) -> list[Action]:
        """Kill `child`, which goes on with a job that is over, and fill its slot. In its
        `kill_grace` it may clean up: nobody waits for that."""
        grace = child.group.settings.kill_grace
        if not grace:
            return self._replace(child, cause, reason, now)
        self._children.escalate_at(child, now + grace, terminating=True)
        return [
            self._children.kill(child, signal.SIGTERM, now),
            *self._vacate(child, cause, reason, now),
        ]

    def _replace(self, child: Child, cause: Cause, reason: str, now: float) -> list[Action]:
        """Kill `child` and fill its slot."""
        actions = self._vacate(child, cause, reason, now)
        return [self._children.kill(child, signal.SIGKILL, now), *actions]

    def _vacate(
        self,
        child: Child,
        cause: Cause,
        reason: str,
        now: float,
        state: ChildState = ChildState.STOPPING,
    ) -> list[Action]:
        """Take `child` out of service, as `Children.vacate`; jobs that it has not begun go back
        to the queue."""
        jobs = tuple(child.jobs.values())
        actions = self._take_back(child)
        return [*actions, *self._children.vacate(child, cause, reason, jobs, now, state)]

    # -- small things

    @property
    def booting(self) -> bool:
        """Whether a slot's first child has still to prove itself, or to be gone after it failed."""
        return self._children.booting

    @property
    def stopping(self) -> bool:
        """Whether all children are to go for good."""
        return self._children.stopping

    @property
    def idle(self) -> bool:
        """Whether no job is accepted or waits for a child."""
        return not self.open_jobs and not self._queues


def _soft_signal(child: Child) -> signal.Signals | None:
    """Return the signal by which `child` is told that a soft time limit is over, or None."""
    name = child.group.settings.soft_timeout_signal
    return signal.Signals[name] if name else None


def _overruled(job: Job) -> list[Action]:
    """Return that `job` is over with its child too, if it had been revoked before."""
    return [Overruled(job)] if job.cancelled is CancelReason.REVOKED else []


def _cause_of_exit(child: Child) -> Cause:
    """Why a child ends by itself: one that was told to end a job may know no other way."""
    told = [job.cancelled for job in child.jobs.values() if job.cancelled is not None]
    return _CAUSES[told[0]] if told else Cause.EXITED


def _astray(child: Child, message: Reply | Progress, kind: str) -> str:
    """Say what is wrong with a message that is about no job which `child` has in hand."""
    jobs = [job for job in child.jobs.values() if job.state is not JobState.RESERVED]
    if message.id in child.ended:
        return f"a {kind} for {message.id}, which it had answered before: {message!r}"[:500]
    if not jobs:
        return f"a {kind} that nobody asked for: {message!r}"[:500]
    if message.id is None:
        return f"a {kind} without an id, which a child with several jobs must give: {message!r}"[
            :500
        ]
    if child.capacity == 1:
        return f"the {kind}'s id is {message.id!r}, the request's {jobs[0].task_id!r}"
    return f"the {kind}'s id is {message.id!r}, which is none of its {len(jobs)} jobs"


def _unannounced(feature: Feature) -> str:
    return f"it sent {feature.value}, a feature that it did not announce in its handshake"
