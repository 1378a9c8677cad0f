"""How a job is ended before its child has answered: terminated, timed out, cancelled.

`states` says when that ends the child too.
"""

from __future__ import annotations

import signal

from msgspec.structs import replace

from ..wire.messages import CancelReason
from .actions import Action, Cancel, Interrupt, SoftTimeout
from .jobs import Jobs
from .model import Cause, Child, ChildState, Job, JobState
from .outcomes import Lost, SoftTimedOut, Terminated, TimedOut
from .replacing import CAUSES, Replacing
from .stopping import Stopping

__all__ = ("HOLD", "Ending")

#: Seconds that no waiting job is begun after a job was ended because the worker stops or has lost
#: its broker. `close` and `flush`, which come next, end this earlier.
HOLD = 5.0


class Ending:
    """Ends jobs that run."""

    def __init__(self, jobs: Jobs, stopping: Stopping, replacing: Replacing) -> None:
        self._jobs = jobs
        self._stopping = stopping
        self._replacing = replacing

    # -- events

    def terminate(self, job: Job, signum: int, now: float, reason: CancelReason) -> list[Action]:
        """End `job` on request.

        In a shutdown, and when the broker is lost, Celery ends the running jobs before it takes
        back the waiting ones. A waiting job must not get the place of one that was ended.
        """
        if reason is CancelReason.SHUTDOWN:
            self._jobs.hold(now + HOLD)
        if job.state in (JobState.ANSWERED, JobState.CLOSED):
            return []
        child, sent = job.child, job.state is JobState.SENT
        actions = self._jobs.resolve(job, Terminated(signum, reason))
        return actions + self.free(child, job, sent, signum, reason, now)

    def lose(self, job: Job, lost: Lost, tracer: Child | None, now: float) -> list[Action]:
        """End `job`, whose `tracer` was lost, and what its external child does for it."""
        if job.state is JobState.CLOSED:
            return []
        child, sent = job.child, job.state is JobState.SENT
        if sent or job.state is JobState.ANSWERED:
            lost = replace(lost, stranded=False)
        actions = self._jobs.resolve(job, lost, tracer)
        reason = CancelReason.REVOKED
        return actions + self.free(child, job, sent, signal.SIGTERM, reason, now)

    def free(
        self,
        child: Child | None,
        job: Job,
        sent: bool,
        signum: int,
        reason: CancelReason,
        now: float,
    ) -> list[Action]:
        """Have `child` end `job`, which was resolved, or end `child`.

        Arguments:
            child: the child that had it; None if none had.
            job: the job.
            sent: whether the child has its request.
            signum: the signal that ends the child.
            reason: why the job is over, for a child that can cancel.
            now: the time.
        """
        if child is None:
            return []
        if child.state is ChildState.STOPPING:
            # It is ended for this job alone, not for its other ones.
            others = any(other.state is JobState.SENT for other in child.jobs.values())
            return [] if others else [self._stopping.kill(child, signum, now)]
        if not sent:
            return self._stopping.release(child, job, now)
        if _is_spared(child):
            return self._cancel(child, job, reason, now)
        if signum == _soft_signal(child):
            return [self._interrupt(child, job, signum, reason, now)]
        return self._kill_terminated(child, signum, now)

    def _kill_terminated(self, child: Child, signum: int, now: float) -> list[Action]:
        grace = child.group.settings.stop_timeout
        why = "its job was terminated"
        return self._replacing.terminate_and_replace(
            child, Cause.TERMINATED, why, signum, grace, now
        )

    def time_out(self, child: Child, job: Job, over: TimedOut, now: float) -> list[Action]:
        """A hard limit of `job` is over. If it is a trace, it is the limit of what it traces."""
        if job.traces is not None:
            return self._jobs.resolve(job.traces, over)
        sent = job.state is JobState.SENT
        actions = self._jobs.resolve(job, over)
        if not sent:
            return [*actions, *self._stopping.release(child, job, now)]
        if _is_spared(child):
            return [*actions, *self._cancel(child, job, CancelReason.TIME_LIMIT, now)]
        reason = _why_timed_out(child, over)
        return [*actions, *self._replacing.end_overrun(child, Cause.TIMED_OUT, reason, now)]

    def time_out_softly(self, child: Child, job: Job, now: float) -> list[Action]:
        """The soft limit of `job` is over."""
        sent = job.state is JobState.SENT
        if sent and child.cancels and not child.group.ends_at_soft_limit:
            told = Cancel(child, job, CancelReason.SOFT_TIME_LIMIT)
            return [told, SoftTimeout(job, child, None)]
        if sent and child.cancels:
            cancel = self._cancel(child, job, CancelReason.SOFT_TIME_LIMIT, now)
            return [*cancel, SoftTimeout(job, child, None)]
        return [SoftTimeout(job, child, _soft_signal(child) if sent else None)]

    def grace_over(self, child: Child, job: Job, now: float) -> list[Action]:
        """`child` has not ended `job` within its grace: end the child."""
        assert job.cancelled is not None
        actions: list[Action] = []
        if job.state is JobState.SENT and job.traces is None:
            actions.append(self._jobs.answer(job, SoftTimedOut(job.soft_timeout or 0.0)))
        reason = f"it went on with {job.title} {job.grace_given}"
        unfinished = child.unfinished
        if unfinished:
            reason += f"; {unfinished}"
        cause = CAUSES[job.cancelled]
        return [*actions, *self._replacing.end_overrun(child, cause, reason, now)]

    # -- one job of a child, and not the child

    def _cancel(self, child: Child, job: Job, reason: CancelReason, now: float) -> list[Action]:
        """Have `child` end `job` within `cancel_grace`."""
        grace = child.group.settings.cancel_grace
        since = "it was told to cancel it" if child.cancels else "that was over"
        self._jobs.cancel(job, child, reason, grace, since, now)
        return [Cancel(child, job, reason)] if child.cancels else []

    def _interrupt(
        self, child: Child, job: Job, signum: int, reason: CancelReason, now: float
    ) -> Interrupt:
        """Have `child` end `job` as at a soft time limit. It has as long as it would have to exit
        in a stop, and lives on if it ends the job by then."""
        grace = child.group.settings.stop_timeout
        since = f"it was sent {signal.Signals(signum).name}"
        self._jobs.cancel(job, child, reason, grace, since, now)
        return Interrupt(child, signum)


def _is_spared(child: Child) -> bool:
    """Return whether `child` is given time to end a job itself, instead of being killed."""
    return child.cancels or len(child.jobs) > 1


def _soft_signal(child: Child) -> signal.Signals | None:
    """Return the signal that tells `child` of a soft time limit, or None."""
    name = child.group.settings.soft_timeout_signal
    return signal.Signals[name] if name else None


def _why_timed_out(child: Child, over: TimedOut) -> str:
    if over.silent:
        reason = f"it told nothing of its job for {over.seconds:g} s (inactivity_timeout)"
    else:
        reason = f"its job took longer than {over.seconds:g} s (hard time limit)"
    unfinished = child.unfinished
    if unfinished:
        return f"{reason}; {unfinished}"
    if not child.jobs_done and not child.group.settings.handshake:
        # The most common mistake in a new child.
        return f"{reason}; it has never answered: does it flush its stdout after each reply?"
    return reason
