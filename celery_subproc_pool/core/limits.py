"""When something is due: for the engine as a whole, and of the time limits of each job.

Layer: above `records`. Pure: no clock is read here.
"""

from __future__ import annotations

from .model import Child, Job, JobState
from .outcomes import TimedOut

__all__ = ("PROBE_INTERVAL", "Alarm", "Limits")

#: Seconds from one look to the next whether a child has read its first request.
PROBE_INTERVAL = 0.1

#: The deadlines of a job that count for a child only once it has booted.
_DEADLINES = ("deadline", "soft_deadline", "silence_deadline")


class Alarm:
    """When something is due next: a lower bound, made exact by whoever goes through all that is."""

    __slots__ = ("deadline",)

    def __init__(self) -> None:
        #: Nothing is due before this; None: nothing is due at all.
        self.deadline: float | None = None

    def set(self, deadline: float | None) -> None:
        """Something is due at `deadline`; None is never."""
        if deadline is not None and (self.deadline is None or deadline < self.deadline):
            self.deadline = deadline


class Limits:
    """Keeps the deadlines of jobs that are with a child.

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
        """There was a sign of life of `job`, or its request was written."""
        seconds = child.group.settings.inactivity_timeout
        if seconds is not None and job.state is JobState.SENT:
            job.silence_deadline = now + seconds
            self._alarm.set(job.silence_deadline)

    def watch(self, job: Job) -> None:
        """Set the alarm to the deadlines that `job` has."""
        self._alarm.set(job.deadline)
        self._alarm.set(job.soft_deadline)
        self._alarm.set(job.silence_deadline)
        self._alarm.set(job.kill_at)

    def defer(self, job: Job, now: float) -> bool:
        """Put off what is due of `job` until it was looked whether its child has read it; return
        whether something is."""
        due = False
        for name in _DEADLINES:
            deadline = getattr(job, name)
            if deadline is not None and now >= deadline:
                setattr(job, name, now + PROBE_INTERVAL)
                due = True
        self.watch(job)
        return due

    def restore(self, job: Job, now: float) -> None:
        """What was put off of `job` is due now: its child has had the time."""
        for name in _DEADLINES:
            deadline = getattr(job, name)
            if deadline is not None and deadline <= now + PROBE_INTERVAL:
                setattr(job, name, now)
        self._alarm.set(now)

    @staticmethod
    def hard_one_over(job: Job, child: Child, now: float) -> TimedOut | None:
        """Return which hard limit of `job`, which is with `child`, is over; None if none is."""
        if job.deadline is not None and now >= job.deadline:
            return TimedOut(job.timeout or 0.0)
        seconds = child.group.settings.inactivity_timeout
        if job.silence_deadline is not None and now >= job.silence_deadline:
            return TimedOut(seconds or 0.0, silent=True)
        return None
