"""How the worker stops: jobs are dropped or given up, then children are stopped."""

from __future__ import annotations

from ..wire.messages import CancelReason
from .actions import Action, Cancel, Stranded
from .jobs import Jobs
from .model import Cause, Child, ChildState, Group, Job, JobState, children_of
from .outcomes import Lost
from .replacing import Replacing
from .spawning import Spawning
from .stopping import Stopping

__all__ = ("Shutdown",)


class Shutdown:
    """Stops the worker.

    Arguments:
        groups: the groups by name.
        jobs: the jobs.
        spawning: is stopped.
        stopping: stops children.
        replacing: kills busy children.
    """

    def __init__(
        self,
        groups: dict[str, Group],
        jobs: Jobs,
        spawning: Spawning,
        stopping: Stopping,
        replacing: Replacing,
    ) -> None:
        #: Whether no more jobs are accepted.
        self.closed = False
        self._groups = groups
        self._jobs = jobs
        self._spawning = spawning
        self._stopping = stopping
        self._replacing = replacing

    # -- jobs

    def close(self, now: float) -> list[Action]:
        """Accept no more jobs, and drop those that wait. Jobs that have lost their child are not
        dropped: their group spawns once more for them."""
        self.closed = True
        actions = self._jobs.drop()
        for group in self._groups.values():
            if group.waiting:
                actions += self._spawning.retry_now(group, now)
        return actions

    def give_up_stranded(self) -> list[Action]:
        """After `close`, give up jobs that no child will ever do."""
        actions: list[Action] = []
        for group in self._groups.values():
            hopeless = self._spawning.cannot_start(group)
            # A trace needs no place below the limit.
            jobs = tuple(
                job for job in group.waiting if hopeless or not (self._jobs.limit or job.traces)
            )
            if jobs:
                actions += self._strand(group, jobs)
        return actions

    def _strand(self, group: Group, jobs: tuple[Job, ...]) -> list[Action]:
        why, _, _ = group.failure.partition("\n")
        reason = f"no child of the group {group.name} can start: {why or 'it has none'}"
        lost = Lost(None, f"the worker stops, and {reason}", stranded=True)
        actions: list[Action] = [Stranded(group, reason, jobs)]
        for job in jobs:
            actions += self._jobs.resolve(job, lost)
        return actions

    # -- children

    def stop(self, now: float) -> list[Action]:
        """Stop all children and spawn no more. Idle children have time to exit."""
        self._spawning.stopped = True
        actions: list[Action] = []
        for child in children_of(self._groups):
            if child.state is not ChildState.BUSY:
                actions += self._stopping.stop_gently(child, now)
            elif child.cancels:
                actions += self._cancel_all(child, now)
            elif child.pending_cancels == len(child.jobs):
                actions += self._let_end(child, now)
            else:
                why = "the worker stops"
                actions += self._replacing.kill_and_replace(child, Cause.STOPPED, why, now)
        return actions

    def _cancel_all(self, child: Child, now: float) -> list[Action]:
        """Have `child` cancel its jobs and exit within `cancel_grace`."""
        actions = self._jobs.take_back(child)
        actions += [
            Cancel(child, job, CancelReason.SHUTDOWN)
            for job in child.jobs.values()
            if job.state is JobState.SENT and job.cancelled is None
        ]
        actions += self._stopping.stop_gently(child, now)
        grace = child.group.settings.cancel_grace
        self._stopping.escalate_at(child, now + grace, terminating=True)
        return actions

    def _let_end(self, child: Child, now: float) -> list[Action]:
        """Let `child` end its jobs, which are over, in the time that it was given for that, but not
        longer than it would have to exit."""
        last = max(job.kill_at or now for job in child.jobs.values())
        last = min(last, now + child.group.settings.stop_timeout)
        actions = self._stopping.stop_gently(child, now)
        self._stopping.escalate_at(child, last, terminating=True)
        return actions
