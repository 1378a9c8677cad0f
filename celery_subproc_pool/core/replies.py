"""What a child says of its jobs: replies, progress, lines for the log."""

from __future__ import annotations

from ..wire.messages import Error, Feature, Log, Progress, Reply, Throttled
from .actions import Action, Logged, Progressed
from .booting import Booting
from .deadlines import Deadlines
from .jobs import Jobs, overruled
from .model import Child, ChildState, Job, JobState
from .outcomes import Answered
from .recycling import Recycling
from .replacing import Replacing
from .spawning import Spawning
from .stopping import Stopping
from .traces import Traces

__all__ = ("Replies",)

#: How many characters of a fault's description are kept: it quotes what the child wrote.
MOST_QUOTED = 500


class Replies:
    """Takes what children say of their jobs."""

    def __init__(
        self,
        jobs: Jobs,
        deadlines: Deadlines,
        spawning: Spawning,
        recycling: Recycling,
        booting: Booting,
        stopping: Stopping,
        replacing: Replacing,
        traces: Traces,
    ) -> None:
        self._jobs = jobs
        self._traces = traces
        self._deadlines = deadlines
        self._spawning = spawning
        self._recycling = recycling
        self._booting = booting
        self._stopping = stopping
        self._replacing = replacing

    def replied(self, child: Child, reply: Reply, now: float) -> list[Action]:
        """`child` wrote a final reply."""
        job = _job_of(child, reply.id)
        if child.state is ChildState.STOPPING and not self._still_counts(job, reply):
            return []
        if job is None:
            return self._replacing.fault(child, _unexpected(child, reply, "reply"), now)
        if job.state is JobState.SENT:
            child.group.counters.count_reply(now - job.begun_at, isinstance(reply, Throttled))
            actions = self._ended(job, child, reply, now)
        else:
            child.group.counters.count_late_reply()
            actions = overruled(job)
        actions += self._note_done(child, bool(reply.retire), now)
        actions += self._stopping.release(child, job, now)
        return actions

    def _ended(self, job: Job, child: Child, reply: Reply, now: float) -> list[Action]:
        if job.traces is not None:
            return self._traces.ended(job, child, reply, now)
        return [self._jobs.answer(job, Answered(reply))]

    def _still_counts(self, job: Job | None, reply: Reply) -> bool:
        """Return whether `reply`, of a child that is being ended, ends `job`.

        No reply counts after a fault, and none to a job that was ended itself: these jobs are not
        SENT. Another job may have succeeded before the end. If it has failed, the end may be why.
        When the worker stops, all jobs that are left are given back.
        """
        if self._spawning.stopped or isinstance(reply, Error):
            return False
        return job is not None and job.state is JobState.SENT

    def _note_done(self, child: Child, retire: bool, now: float) -> list[Action]:
        """Note that `child` has done a job; `retire` is whether it asks to be recycled."""
        self._recycling.count_done(child)
        if not child.has_booted:
            self._booting.note_booted(child)
        if child.state is ChildState.STOPPING or child.draining:
            return []
        actions = [] if child.proven else self._booting.prove(child, now)
        if child.slot.failures and not child.recycle_reason:
            # If it is to be recycled, the failures are those of its successors.
            self._spawning.forget_failures(child.slot)
        actions += self._recycling.check_reply(child, retire)
        return actions

    def progressed(self, child: Child, progress: Progress, now: float) -> list[Action]:
        """`child` told the progress of a job."""
        if child.state is ChildState.STOPPING:
            return []
        if Feature.PROGRESS not in child.features:
            return self._replacing.fault(child, _unannounced(Feature.PROGRESS), now)
        job = _job_of(child, progress.id)
        if job is None:
            return self._replacing.fault(child, _unexpected(child, progress, "progress"), now)
        if job.state is not JobState.SENT:
            # It was told to end the job, and has not yet.
            return []
        self._deadlines.hear(job, child, now)
        return [Progressed(job, progress.meta or {})]

    def logged(self, child: Child, record: Log, now: float) -> list[Action]:
        """`child` wrote something for the log, maybe about a job that is over."""
        if child.state is not ChildState.STOPPING and Feature.LOG not in child.features:
            return self._replacing.fault(child, _unannounced(Feature.LOG), now)
        job = None if record.id is None else _job_of(child, record.id)
        if job is not None:
            self._deadlines.hear(job, child, now)
        return [Logged(child, job, record)]


def _job_of(child: Child, task_id: str | None) -> Job | None:
    """Return the job that a message of `child` is about; None if the child has no such request."""
    job: Job | None = None
    if task_id is not None:
        job = child.jobs.get(task_id)
    elif child.capacity == 1:
        job = next(iter(child.jobs.values()), None)
    return None if job is None or job.state is JobState.RESERVED else job


def _unexpected(child: Child, message: Reply | Progress, kind: str) -> str:
    """Say what is wrong with a message that is about none of the child's jobs."""
    jobs = [job for job in child.jobs.values() if job.state is not JobState.RESERVED]
    if message.id in child.recent_ids:
        text = f"a {kind} for {message.id}, which it had answered before: {message!r}"
    elif not jobs:
        text = f"a {kind} that nobody asked for: {message!r}"
    elif message.id is None:
        text = f"a {kind} without an id, which a child with several jobs must give: {message!r}"
    elif child.capacity == 1:
        return f"the {kind}'s id is {message.id!r}, the request's {jobs[0].task_id!r}"
    else:
        return f"the {kind}'s id is {message.id!r}, which is none of its {len(jobs)} jobs"
    return text[:MOST_QUOTED]


def _unannounced(feature: Feature) -> str:
    return f"it sent {feature.value}, a feature that it did not announce in its handshake"
