"""Whether a limit of a running job is over, also while its child still boots.

Time limits count from acceptance. There is one exception, for the first job of a child. When a
limit is over and the child may not have read the request yet, a probe looks. If the child has not
read it, it still boots: the limit starts again when it has.
"""

from __future__ import annotations

from collections.abc import Iterable

from .actions import Action, Probe
from .booting import Booting
from .deadlines import Deadlines
from .ending import Ending
from .model import Cause, Child, Job, JobState
from .replacing import Replacing

__all__ = ("TimeLimits",)


class TimeLimits:
    """Checks the limits of jobs that are with a child."""

    def __init__(
        self, deadlines: Deadlines, booting: Booting, replacing: Replacing, ending: Ending
    ) -> None:
        self._deadlines = deadlines
        self._booting = booting
        self._replacing = replacing
        self._ending = ending

    def tick(self, child: Child, job: Job, now: float) -> list[Action]:
        """Do what is due of `job`, which is with `child`."""
        if job.kill_at is not None and now >= job.kill_at:
            return self._ending.grace_over(child, job, now)
        if job.state is JobState.SENT and not child.has_booted and self._deadlines.defer(job, now):
            return [Probe(child)]
        over = self._deadlines.hard_limit_over(job, child, now)
        if over is not None:
            return self._ending.time_out(child, job, over, now)
        actions: list[Action] = []
        if self._deadlines.soft_limit_over(job, now):
            actions = self._ending.time_out_softly(child, job, now)
        self._deadlines.watch(job)
        return actions

    def probed(self, child: Child, read: int, now: float) -> list[Action]:
        """A probe found that `child` has read `read` bytes of what was written to it."""
        job = next(iter(child.jobs.values()), None)
        if job is None or job.state is not JobState.SENT:
            return []
        if read <= job.offset:
            return self._still_unread(child, job, now)
        self._booting.note_booted(child)
        if child.seen_unread:
            self._deadlines.start(job, child, now)
        else:
            self._deadlines.restore(job, now)
        return []

    def _still_unread(self, child: Child, job: Job, now: float) -> list[Action]:
        self._booting.note_unread(child)
        seconds = child.group.settings.start_timeout
        if now < child.spawned_at + seconds:
            return []
        # The time that it took to boot does not count for the job, nor with the next child.
        self._deadlines.start(job, child, now)
        # Its exit tells whether it has read the job after all. If not, another child gets the job.
        reason = f"it did not read its first request within {seconds:g} s (start_timeout)"
        return self._replacing.kill_and_replace(child, Cause.NOT_STARTED, reason, now)

    def excuse_silence(self, children: Iterable[Child], now: float) -> None:
        """Let `inactivity_timeout` count anew: nothing was read for a while (the broker was gone,
        say), and children may have waited for room in a pipe."""
        for child in children:
            for job in child.jobs.values():
                if job.silence_deadline is not None:
                    self._deadlines.hear(job, child, now)
