"""When something is due: for the engine as a whole, and for each job."""

from __future__ import annotations

from .model import Child, Job, JobState
from .outcomes import TimedOut

__all__ = ("PROBE_INTERVAL", "Alarm", "Deadlines")

#: Seconds between two looks whether a child has read its first request.
PROBE_INTERVAL = 0.1

#: The deadlines of a job that wait for its child to boot.
_DEADLINES = ("deadline", "soft_deadline", "silence_deadline")


class Alarm:
    """When the next thing is due. A lower bound: `Scheduler.tick` makes it exact."""

    __slots__ = ("deadline",)

    def __init__(self) -> None:
        #: Nothing is due before this; None: nothing is due at all.
        self.deadline: float | None = None

    def clear(self) -> None:
        """Nothing is due, as far as is known: what is due is to be set anew."""
        self.deadline = None

    def set(self, deadline: float | None) -> None:
        """Note that something is due at `deadline`; None is never."""
        if deadline is not None and (self.deadline is None or deadline < self.deadline):
            self.deadline = deadline


class Deadlines:
    """Keeps the deadlines of jobs.

    Arguments:
        alarm: is set to them.
    """

    __slots__ = ("_alarm",)

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm

    def start(self, job: Job, child: Child, now: float) -> None:
        """Let the time limits of `job`, which is with `child`, count from `now`."""
        job.deadline = None if job.timeout is None else now + job.timeout
        job.soft_deadline = None if job.soft_timeout is None else now + job.soft_timeout
        self.hear(job, child, now)
        self.watch(job)

    def hear(self, job: Job, child: Child, now: float) -> None:
        """Let `inactivity_timeout` count from `now`: the request of `job` was written, or `child`
        told something of it."""
        seconds = child.group.settings.inactivity_timeout
        if seconds is not None and job.state is JobState.SENT:
            job.silence_deadline = now + seconds
            self._alarm.set(job.silence_deadline)

    def watch(self, job: Job) -> None:
        """Set the alarm to the deadlines of `job`."""
        self._alarm.set(job.deadline)
        self._alarm.set(job.soft_deadline)
        self._alarm.set(job.silence_deadline)
        self._alarm.set(job.kill_at)

    def soft_limit_over(self, job: Job, now: float) -> bool:
        """Return whether the soft limit of `job` is over. It is reported once."""
        if job.soft_deadline is None or now < job.soft_deadline:
            return False
        job.soft_deadline = None
        return True

    def give_grace(self, job: Job, until: float) -> None:
        """Give the child of `job` time to end it, until `until`, or an earlier time set before."""
        job.kill_at = until if job.kill_at is None else min(job.kill_at, until)
        self._alarm.set(job.kill_at)

    def clear(self, job: Job) -> None:
        """Drop the deadlines of `job`, which is over. Its child may still have to end it."""
        job.deadline = job.soft_deadline = job.silence_deadline = None

    def hand_over(self, job: Job, trace: Job | None) -> None:
        """Keep only the hard limit of `job`, which its child has answered. It is now the limit of
        its `trace`, once that has begun."""
        job.soft_deadline = job.silence_deadline = None
        if trace is not None:
            trace.deadline = job.deadline
            self._alarm.set(trace.deadline)

    def detach(self, job: Job) -> None:
        """Keep only the deadlines that go on while `job` waits for another child."""
        job.silence_deadline = job.kill_at = None
        self._alarm.set(job.deadline)

    def defer(self, job: Job, now: float) -> bool:
        """Defer what is due until a probe tells whether the child has read the request. Return
        whether anything is due."""
        due = False
        for name in _DEADLINES:
            deadline = getattr(job, name)
            if deadline is not None and now >= deadline:
                setattr(job, name, now + PROBE_INTERVAL)
                due = True
        self.watch(job)
        return due

    def restore(self, job: Job, now: float) -> None:
        """Restore deferred deadlines: the child had read the request in time."""
        for name in _DEADLINES:
            deadline = getattr(job, name)
            if deadline is not None and deadline <= now + PROBE_INTERVAL:
                setattr(job, name, now)
        self._alarm.set(now)

    @staticmethod
    def hard_limit_over(job: Job, child: Child, now: float) -> TimedOut | None:
        """Return which hard limit of `job`, which is with `child`, is over; None if none is."""
        if job.deadline is not None and now >= job.deadline:
            return TimedOut(job.timeout or 0.0)
        seconds = child.group.settings.inactivity_timeout
        if job.silence_deadline is not None and now >= job.silence_deadline:
            return TimedOut(seconds or 0.0, silent=True)
        return None
