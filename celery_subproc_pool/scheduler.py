"""Decides what happens to jobs and children; does none of it.

Layer: above `children`, `records` and `protocol`. Must not import a clock, processes or Celery.

Events come in as method calls with the time they happened at (seconds on any monotonic clock);
every method returns the actions to perform, in order. An event only notes what happened. It is
`dispatch`, called when all that is known has been told, that hands jobs to idle children: a line
that nobody asked for must retire its child before that child gets another job.

A job of an external child goes through::

    QUEUED --dispatch--> RESERVED --provide--> SENT --reply--> ANSWERED --finish--> CLOSED
       ^                    |                   |
       +--- child is gone --+                   +--- lost, timed out, terminated ----> CLOSED

It is RESERVED while the worker's tracer prepares the request, and ANSWERED while the tracer
stores the result (or the failure: a protocol fault is an answer too). The request of a job that is
not traced here is known from the start, and its answer closes it. No byte of a request has been
written before its job is SENT. A request of which no byte was written, or none read, may go to
another child; no other.

What becomes of children, and when the next one is spawned, is decided by `children`.
"""

from __future__ import annotations

import signal
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from .children import Alarm, Children
from .protocol import Reply, Throttled
from .records import (
    Accept,
    Action,
    Answered,
    Cause,
    Child,
    ChildState,
    Dropped,
    Faulted,
    Finished,
    Forget,
    Group,
    Job,
    JobState,
    Lost,
    Outcome,
    Probe,
    Settle,
    SoftTimeout,
    Terminated,
    TimedOut,
    Write,
    describe_exit,
)

__all__ = ("Scheduler",)

#: Seconds that a child may take to exit after it closed its stdout.
EOF_GRACE = 0.5

#: Seconds from one look to the next whether a child has read its first request.
PROBE_INTERVAL = 0.1

#: How many children may end before they have read a job, until the job is given up.
MAX_LOSSES = 3

#: Of how many jobs it is remembered that they have cost a child.
CRASHES_REMEMBERED = 10_000


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
        self._children = Children(groups, self._alarm, random)
        self._closed = False
        self._jobs_seen = 0
        #: How many children a job has cost, by its id and retries: the oldest first.
        self._crashes: OrderedDict[tuple[str, int], int] = OrderedDict()
        #: Jobs for the worker itself, which have no children to wait for.
        self._local: deque[Job] = deque()

    # -- starting and stopping

    def start(self, now: float) -> list[Action]:
        """Fill every slot."""
        return self._children.refill_all(now)

    def close(self) -> list[Action]:
        """Accept no more jobs: drop those that wait. Their messages go back to the broker."""
        self._closed = True
        return self.flush()

    def flush(self) -> list[Action]:
        """Drop the jobs that were not accepted yet."""
        actions: list[Action] = []
        for queue in (self._local, *(group.waiting for group in self.groups.values())):
            dropped = [job for job in queue if not job.accepted]
            kept = [job for job in queue if job.accepted]
            queue.clear()
            queue.extend(kept)
            for job in dropped:
                job.state = JobState.CLOSED
                actions.append(Settle(job, Dropped(), None))
        return actions

    def stop(self, now: float) -> list[Action]:
        """Stop all children: gently those that are idle, at once those that are not."""
        self.abandon()
        actions: list[Action] = []
        for child in self._children:
            if child.state is ChildState.BUSY:
                actions += self._replace(child, Cause.STOPPED, "the worker stops", now)
            else:
                actions += self._children.stop_gently(child, now)
        return actions

    def abandon(self) -> None:
        """Spawn no more: somebody else ends the children."""
        self._children.stopping = True

    # -- events of jobs

    def submit(self, job: Job, now: float) -> list[Action]:
        """Take in a new job."""
        if self._closed:
            job.state = JobState.CLOSED
            return [Settle(job, Dropped(), None)]
        self._jobs_seen += 1
        job.number = self._jobs_seen
        job.submitted_at = now
        self._queue_of(job).append(job)
        return []

    def provide(self, job: Job, request: bytes, now: float) -> list[Action]:
        """The tracer of `job` has prepared its request line."""
        job.request = request
        if job.state is not JobState.RESERVED or job.child is None:
            return []
        return [self._send(job.child, job, now)]

    def finish(self, job: Job, now: float) -> list[Action]:
        """The tracer of `job` is through, maybe without ever having needed the child."""
        if job.state is JobState.CLOSED:
            # Its end was settled while the tracer was not looking.
            return []
        if job.state is JobState.QUEUED:
            # It lost its child before it wanted one, and was waiting for the next.
            self._queue_of(job).remove(job)
        else:
            self.open_jobs -= 1
        actions: list[Action] = [Finished(job)]
        if job.child is not None:
            actions += self._children.release(job.child, now)
        job.state = JobState.CLOSED
        job.child = job.deadline = job.soft_deadline = None
        return actions

    def terminate(self, job: Job, signum: int, now: float) -> list[Action]:
        """End `job` on request: its child, if it has the request, gets `signum` and is replaced."""
        if job.state in (JobState.ANSWERED, JobState.CLOSED):
            return []
        child, sent = job.child, job.state is JobState.SENT
        actions = self._settle(job, Terminated(signum))
        if child is None:
            return actions
        if child.state is ChildState.STOPPING:
            child.job = None
            return [*actions, self._children.kill(child, signum)]
        if not sent:
            return [*actions, *self._children.release(child, now)]
        stop_timeout = child.group.settings.stop_timeout
        self._children.escalate_at(child, now + stop_timeout, terminating=True)
        return [
            *actions,
            self._children.kill(child, signum),
            *self._vacate(child, Cause.TERMINATED, "its job was terminated", now),
        ]

    # -- events of children

    def spawned(self, child: Child, pid: int, now: float) -> list[Action]:
        """The process of `child` runs."""
        return self._children.spawned(child, pid, now)

    def ready(self, child: Child, pid: int | None, now: float) -> list[Action]:
        """`child` has booted; `pid` is the process that does its work, None if it is unknown."""
        return self._children.ready(child, pid, now)

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
        job = child.job
        if child.state is ChildState.STOPPING:
            return []
        if job is None or job.state is not JobState.SENT:
            return self.faulted(child, f"a reply that nobody asked for: {reply!r}"[:500], now)
        if reply.id is not None and reply.id != job.task_id:
            return self.faulted(
                child, f"the reply's id is {reply.id!r}, the request's {job.task_id!r}", now
            )
        child.group.runs.append(now - job.begun_at)
        child.group.throttled += isinstance(reply, Throttled)
        actions: list[Action] = [self._answer(job, Answered(reply), child)]
        actions += self._children.replied(child, bool(reply.retire), now)
        actions += self._children.release(child, now)
        return actions

    def measured(self, child: Child, memory: int, now: float) -> list[Action]:
        """`child`, with all that it has started, takes `memory` bytes."""
        self._children.measured(child, memory)
        return []

    def faulted(self, child: Child, reason: str, now: float) -> list[Action]:
        """`child` wrote what the protocol does not allow, or can't be served: replace it."""
        if child.state in (ChildState.STOPPING, ChildState.GONE):
            return []
        job = child.job
        actions: list[Action] = []
        if job is not None and job.state is JobState.SENT:
            actions.append(self._answer(job, Faulted(reason), child))
        return [*actions, *self._replace(child, Cause.FAULTED, reason, now)]

    def probed(self, child: Child, unread: int, now: float) -> list[Action]:
        """It was looked how many bytes of its first request `child` has not read."""
        job = child.job
        if job is None or job.request is None or job.state is not JobState.SENT:
            return []
        if unread >= len(job.request):
            child.still_boots = True
            seconds = child.group.settings.start_timeout
            if now < child.spawned_at + seconds:
                return []
            # What it took to boot is not the job's: not there, and not with the next child.
            self._set_limits(job, now)
            # Its exit tells whether it has read the job after all; if not, another child has it.
            reason = f"it did not read its first request within {seconds:g} s (start_timeout)"
            return self._replace(child, Cause.NOT_STARTED, reason, now)
        child.has_read = True
        if child.still_boots:
            self._set_limits(job, now)
        else:
            # It has had the time. What was put off for the look is due now.
            if job.deadline is not None and job.deadline <= now + PROBE_INTERVAL:
                job.deadline = now
            if job.soft_deadline is not None and job.soft_deadline <= now + PROBE_INTERVAL:
                job.soft_deadline = now
            self._alarm.set(now)
        return []

    def unwritten(self, child: Child, reason: str, now: float) -> list[Action]:
        """No byte of the request could be written: its job goes to another child."""
        if child.state is ChildState.STOPPING:
            return []
        self._take_back(child)
        return self._expect_exit(child, reason, now)

    def unsolicited(self, child: Child, reason: str, now: float) -> list[Action]:
        """Output was there before the request was written: the job goes to another child."""
        if child.state is ChildState.STOPPING:
            return []
        self._take_back(child)
        return self._replace(child, Cause.FAULTED, reason, now)

    @staticmethod
    def _take_back(child: Child) -> None:
        if child.job is not None and child.job.state is JobState.SENT:
            child.job.state = JobState.RESERVED

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
            child.settle_at = None
            child.deadline = now + EOF_GRACE
            self._alarm.set(child.deadline)
            return []
        waited_for = child.job is not None and child.job.state is JobState.SENT
        grace = EOF_GRACE if waited_for else child.group.settings.stop_timeout
        self._children.escalate_at(child, now + grace, terminating=waited_for)
        return self._vacate(child, Cause.EXITED, reason, now)

    def exited(self, child: Child, status: int, unread: int, now: float) -> list[Action]:
        """The process of `child` ended; all that it wrote has been told before.

        Arguments:
            child: the child.
            status: its exit status, as `subprocess.Popen.returncode`.
            unread: how many bytes of its requests it never read.
            now: the time.
        """
        job = child.job
        if job is not None and job.request is not None and unread >= len(job.request):
            # It can't have begun what it has not read a byte of.
            self._take_back(child)
        actions: list[Action] = []
        seen_before = child.reason
        killed = status == -signal.SIGKILL and not child.killed
        reason = f"it exited: {describe_exit(status, killed)}"
        if child.state is not ChildState.STOPPING:
            actions += self._vacate(child, Cause.EXITED, reason, now, ChildState.GONE)
        else:
            self._children.move(child, ChildState.GONE)
            if not child.proven and not child.killed:
                child.group.failure = f"{seen_before}; {reason}" if seen_before else reason
            if job is not None and job.state is JobState.RESERVED and not self._children.stopping:
                actions = [*self._requeue(job), *actions]
                child.job = None
        if child.job is not None:
            lost = Lost(status, seen_before, killed, self._crashed(child.job, child))
            actions = [*self._settle(child.job, lost), *actions]
            child.job = None
        child.deadline = None
        del child.group.children[child.number]
        return [*actions, Forget(child)]

    def _crashed(self, job: Job, child: Child) -> int:
        """Count that `job` has cost `child`.

        Returns:
            How many it has cost, if that is as many as it may; otherwise 0.
        """
        most = child.group.settings.max_crashes
        if most is None or self._children.stopping:
            return 0
        key = (job.task_id, job.retries)
        crashes = self._crashes.pop(key, 0) + 1
        if crashes >= most:
            return crashes
        self._crashes[key] = crashes
        if len(self._crashes) > CRASHES_REMEMBERED:
            self._crashes.popitem(last=False)
        return 0

    def restart(self, groups: Iterable[Group], now: float) -> list[Action]:
        """Replace all children of `groups` by fresh ones, few at a time: no job notices."""
        return [action for group in groups for action in self._children.restart(group, now)]

    # -- time

    @property
    def next_deadline(self) -> float | None:
        """Nothing is due before this; None: nothing is. A lower bound, made exact by `tick`."""
        return self._alarm.deadline

    def tick(self, now: float) -> list[Action]:
        """Do what is due at `now`."""
        if self.next_deadline is None or now < self.next_deadline:
            return []
        self._alarm.deadline = None
        actions: list[Action] = []
        for child in self._children:
            job = child.job
            if job is not None and child.state is ChildState.BUSY:
                actions += self._tick_job(child, job, now)
            actions += self._children.tick(child, now)
        actions += self._children.refill_all(now)
        for group in self.groups.values():
            for job in [job for job in group.waiting if job.accepted]:
                # It lost its child, but not its limit.
                if job.deadline is not None and now >= job.deadline:
                    actions += self._settle(job, TimedOut(job.timeout or 0.0))
                else:
                    self._alarm.set(job.deadline)
        return actions

    def _tick_job(self, child: Child, job: Job, now: float) -> list[Action]:
        actions: list[Action] = []
        if job.state is JobState.SENT and not child.has_read and self._put_off(job, now):
            return [Probe(child)]
        if job.deadline is not None and now >= job.deadline:
            sent = job.state is JobState.SENT
            actions += self._settle(job, TimedOut(job.timeout or 0.0))
            if not sent:
                return [*actions, *self._children.release(child, now)]
            reason = f"its job took longer than {job.timeout:g} s (hard time limit)"
            if not child.jobs_done and not child.group.settings.handshake:
                # The commonest mistake in a new child.
                reason += "; it has never answered: does it flush its stdout after each reply?"
            return [*actions, *self._replace(child, Cause.TIMED_OUT, reason, now)]
        if job.soft_deadline is not None and now >= job.soft_deadline:
            job.soft_deadline = None
            name = child.group.settings.soft_timeout_signal
            signum = signal.Signals[name] if name and job.state is JobState.SENT else None
            actions.append(SoftTimeout(job, child, signum))
        self._alarm.set(job.deadline)
        self._alarm.set(job.soft_deadline)
        return actions

    def _put_off(self, job: Job, now: float) -> bool:
        """Put the limits of `job` that are due off until its child was looked at."""
        due = False
        if job.deadline is not None and now >= job.deadline:
            job.deadline, due = now + PROBE_INTERVAL, True
        if job.soft_deadline is not None and now >= job.soft_deadline:
            job.soft_deadline, due = now + PROBE_INTERVAL, True
        self._alarm.set(job.deadline)
        self._alarm.set(job.soft_deadline)
        return due

    def _set_limits(self, job: Job, now: float) -> None:
        """Let the time limits of `job` count from `now`."""
        job.deadline = None if job.timeout is None else now + job.timeout
        job.soft_deadline = None if job.soft_timeout is None else now + job.soft_timeout
        self._alarm.set(job.deadline)
        self._alarm.set(job.soft_deadline)

    # -- size

    def grow(self, count: int, now: float) -> list[Action]:
        """Add `count` to the limit, and `count` children to each group without its own size."""
        self.limit += count
        return self._children.grow(count, now)

    def check_shrink(self, count: int) -> None:
        """Raise if `shrink` would find too few children that are not busy.

        Raises:
            ValueError: there are too few. In the words of billiard's pool.
        """
        if count > self.limit or not self._children.can_shrink(count):
            raise ValueError("Can't shrink pool. All processes busy!")

    def shrink(self, count: int, now: float) -> list[Action]:
        """Take `count` off the limit, and `count` children that are not busy from each group
        without its own size."""
        self.limit -= count
        return self._children.shrink(count, now)

    # -- decisions

    def dispatch(self, now: float) -> list[Action]:
        """Hand waiting jobs to idle children, in order of arrival, as far as `limit` allows.

        And spawn the successors of children that are worn.
        """
        actions = self._children.renew(now)
        while self.open_jobs < self.limit:
            queue = self._next_queue()
            if queue is None:
                break
            actions += self._reserve(queue.popleft(), now)
        return actions

    def _next_queue(self) -> deque[Job] | None:
        best = self._local if self._local else None
        for group in self.groups.values():
            queue = group.waiting
            if queue and group.idle and (best is None or queue[0].number < best[0].number):
                best = queue
        return best

    def _reserve(self, job: Job, now: float) -> list[Action]:
        actions: list[Action] = []
        self.open_jobs += 1
        job.state = JobState.RESERVED
        child: Child | None = None
        if job.group is not None:
            child, _ = self.groups[job.group].idle.popitem()
            self._children.move(child, ChildState.BUSY)
            child.job, job.child = job, child
            child.group.waits.append(now - job.submitted_at)
            if job.accepted:
                self._alarm.set(job.deadline)
                self._alarm.set(job.soft_deadline)
            else:
                self._set_limits(job, now)
        if not job.accepted:
            job.accepted = True
            actions.append(Accept(job, child, now))
        if job.request is not None and child is not None:
            actions.append(self._send(child, job, now))
        return actions

    def _send(self, child: Child, job: Job, now: float) -> Write:
        job.state = JobState.SENT
        job.begun_at = now
        self._children.begins(child)
        return Write(child, job)

    def _answer(self, job: Job, outcome: Outcome, child: Child) -> Settle:
        """Give `outcome` to the tracer of `job`, which brings the job to its end."""
        if self._crashes:
            self._crashes.pop((job.task_id, job.retries), None)
        if job.traced_here:
            job.state = JobState.ANSWERED
        else:
            job.state = JobState.CLOSED
            self.open_jobs -= 1
        job.child = job.deadline = job.soft_deadline = None
        return Settle(job, outcome, child)

    def _settle(self, job: Job, outcome: Outcome) -> list[Action]:
        """Close `job` with an outcome that its tracer has no part in.

        Its child still holds it: the caller releases or vacates the child.
        """
        child = job.child
        if job.state is JobState.QUEUED:
            self._queue_of(job).remove(job)
        else:
            self.open_jobs -= 1
        job.state = JobState.CLOSED
        job.child = job.deadline = job.soft_deadline = None
        return [Settle(job, outcome, child)]

    def _requeue(self, job: Job) -> list[Action]:
        """Put a job whose request no child has begun back where it was in the queue.

        Its limits go on. After several children, give it up: they may all be broken.
        """
        job.losses += 1
        if job.losses > MAX_LOSSES:
            reason = f"{job.losses} children in a row ended before they had read the job"
            return self._settle(job, Lost(None, reason))
        self.open_jobs -= 1
        job.state = JobState.QUEUED
        job.child = None
        self._alarm.set(job.deadline)
        # In order of arrival, also among others that lost their children.
        queue = self._queue_of(job)
        queue.insert(sum(other.number < job.number for other in queue), job)
        return []

    def _replace(self, child: Child, cause: Cause, reason: str, now: float) -> list[Action]:
        """Kill `child` and fill its slot."""
        actions = self._vacate(child, cause, reason, now)
        return [self._children.kill(child, signal.SIGKILL), *actions]

    def _vacate(
        self,
        child: Child,
        cause: Cause,
        reason: str,
        now: float,
        state: ChildState = ChildState.STOPPING,
    ) -> list[Action]:
        """Take `child` out of service, as `Children.vacate`; a job that it has not begun goes
        back to the queue."""
        job = child.job
        actions: list[Action] = []
        if job is not None and job.state is not JobState.SENT:
            child.job = None
            if job.state is JobState.RESERVED:
                actions += self._requeue(job)
        return [*actions, *self._children.vacate(child, cause, reason, job, now, state)]

    # -- small things

    def _queue_of(self, job: Job) -> deque[Job]:
        return self._local if job.group is None else self.groups[job.group].waiting

    @property
    def booting(self) -> bool:
        """Whether a slot's first child has still to prove itself, or to be gone after it failed."""
        return self._children.booting

    @property
    def idle(self) -> bool:
        """Whether no job is accepted or waits for a child."""
        return not self.open_jobs and not any(
            (self._local, *(group.waiting for group in self.groups.values()))
        )
