"""How a child is replaced after a fault: its jobs, its slot, and its end."""

from __future__ import annotations

import signal

from ..wire.messages import CancelReason
from . import service, slots
from .actions import Action, Report
from .booting import EOF_GRACE, Booting
from .jobs import Jobs
from .model import Cause, Child, ChildState, JobState
from .recycling import Recycling
from .spawning import Spawning
from .stopping import Stopping

__all__ = ("CAUSES", "Replacing", "cause_of_exit")

#: Causes without backoff: they are no sign that the next child fails too.
_WITHOUT_BACKOFF = (Cause.TIMED_OUT, Cause.TERMINATED)

#: Why a child is replaced that did not end a job that it was told to end.
CAUSES = {
    CancelReason.SOFT_TIME_LIMIT: Cause.TIMED_OUT,
    CancelReason.TIME_LIMIT: Cause.TIMED_OUT,
    CancelReason.REVOKED: Cause.TERMINATED,
    CancelReason.SHUTDOWN: Cause.STOPPED,
}


class Replacing:
    """Replaces children. All methods take a child that is neither STOPPING nor GONE."""

    def __init__(
        self,
        jobs: Jobs,
        spawning: Spawning,
        recycling: Recycling,
        booting: Booting,
        stopping: Stopping,
    ) -> None:
        self._jobs = jobs
        self._spawning = spawning
        self._recycling = recycling
        self._booting = booting
        self._stopping = stopping

    def replace(
        self,
        child: Child,
        cause: Cause,
        reason: str,
        now: float,
        state: ChildState = ChildState.STOPPING,
    ) -> list[Action]:
        """Take `child` out of service and fill its slot, after a backoff if the child is to blame.

        Jobs that it has not begun go back to the queue. How it ends is up to the caller.

        Arguments:
            child: the child.
            cause: why, to be counted.
            reason: why, in words.
            now: the time.
            state: GONE if its process is; BUSY if it ends its jobs first.
        """
        jobs = tuple(child.jobs.values())
        actions = self._jobs.take_back(child)
        child.reason = reason
        if not child.proven:
            self._spawning.note_failure(child.group, reason)
        service.leave(child, state)
        if not child.draining:
            # Otherwise it was counted when it began to drain.
            child.group.counters.count_replaced(cause)
        child.draining = state is ChildState.BUSY
        slots.note_exit(child, reason, now)
        delay, spawns = self._fill_slot_of(child, cause, reason, now)
        return [*actions, Report(child, reason, jobs, delay), *spawns]

    def _fill_slot_of(
        self, child: Child, cause: Cause, reason: str, now: float
    ) -> tuple[float, list[Action]]:
        """Return for how long the slot of `child` backs off, and what fills the slot now."""
        group, slot = child.group, child.slot
        served = slot.child is child
        if not slots.leave(child):
            return 0.0, []
        delay = 0.0
        if served and slot.child is not None:
            self._recycling.note_slot(slot.child)
            self._booting.serve_early(slot.child, now)
        elif cause not in _WITHOUT_BACKOFF and not child.jobs_done:
            # Also if it had said that it is ready.
            delay = self._spawning.back_off(group, slot, reason, now)
        return delay, self._spawning.fill(group, slot, now)

    def kill_and_replace(self, child: Child, cause: Cause, reason: str, now: float) -> list[Action]:
        """Replace `child` and send it SIGKILL."""
        actions = self.replace(child, cause, reason, now)
        return [self._stopping.kill(child, signal.SIGKILL, now), *actions]

    def terminate_and_replace(
        self,
        child: Child,
        cause: Cause,
        reason: str,
        signum: int,
        grace: float,
        now: float,
    ) -> list[Action]:
        """Replace `child` and send it `signum`, and SIGKILL after `grace` seconds. It may clean up
        meanwhile; nothing waits for that."""
        self._stopping.escalate_at(child, now + grace, terminating=True)
        return [
            self._stopping.kill(child, signum, now),
            *self.replace(child, cause, reason, now),
        ]

    def end_overrun(self, child: Child, cause: Cause, reason: str, now: float) -> list[Action]:
        """End and replace `child`, which goes on with a job that is over, after `kill_grace`."""
        grace = child.group.settings.kill_grace
        if not grace:
            return self.kill_and_replace(child, cause, reason, now)
        return self.terminate_and_replace(child, cause, reason, signal.SIGTERM, grace, now)

    def fault(self, child: Child, reason: str, now: float) -> list[Action]:
        """Fail the jobs of `child`, which broke the protocol, and replace it."""
        if child.state in (ChildState.STOPPING, ChildState.GONE):
            return []
        actions: list[Action] = []
        for job in child.jobs.values():
            if job.state is JobState.SENT:
                actions += self._jobs.fail(job, reason)
        return [*actions, *self.kill_and_replace(child, Cause.FAULTED, reason, now)]

    def expect_exit(self, child: Child, reason: str, now: float) -> list[Action]:
        """Replace `child`, which is about to exit by itself, and give it time for that."""
        if child.state is ChildState.STOPPING:
            return []
        if child.state is ChildState.STARTING:
            child.reason = reason
            self._booting.must_exit(child, now)
            return []
        awaited = any(job.state is JobState.SENT for job in child.jobs.values())
        grace = EOF_GRACE if awaited else child.group.settings.stop_timeout
        self._stopping.escalate_at(child, now + grace, terminating=awaited)
        return self.replace(child, cause_of_exit(child), reason, now)


def cause_of_exit(child: Child) -> Cause:
    """Return why `child` exits by itself. If it was told to end a job, it may know no other way."""
    told = [job.cancelled for job in child.jobs.values() if job.cancelled is not None]
    return CAUSES[told[0]] if told else Cause.EXITED
