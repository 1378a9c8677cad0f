"""The part that tracers have in the jobs of external children. `states` has the rules."""

from __future__ import annotations

import signal

from ..settings import TRACERS
from ..wire.messages import CancelReason, Reply
from ..wire.python import Ask
from .actions import Abandon, Action, Finished, Tell
from .deadlines import Deadlines
from .ending import Ending
from .jobs import Jobs
from .model import Child, Job, JobState
from .outcomes import Outcome, Terminated
from .standstill import Standstill
from .stopping import Stopping

__all__ = ("Traces",)


class Traces:
    """Begins and ends traces, and passes on what tracers and external children say to each other.

    Arguments:
        jobs: the jobs, traces included.
        deadlines: of the jobs.
        stopping: releases children.
        ending: ends what external children do for jobs that are over.
        standstill: watches tracers.
    """

    def __init__(
        self,
        jobs: Jobs,
        deadlines: Deadlines,
        stopping: Stopping,
        ending: Ending,
        standstill: Standstill,
    ) -> None:
        self._jobs = jobs
        self._standstill = standstill
        self._deadlines = deadlines
        self._stopping = stopping
        self._ending = ending

    # -- events

    def begin(self, job: Job, request: bytes, now: float) -> list[Action]:
        """Have `job` traced, unless it is over. `request` is for its tracer."""
        if job.state is JobState.CLOSED:
            return []
        self._add(job, request, now)
        if job.state is JobState.ANSWERED:
            self._deadlines.hand_over(job, job.trace)
        return []

    def follow_up(self, job: Job, request: bytes, now: float) -> list[Action]:
        """Have a tracer do `request` about `job`, which is over, before Celery is told of it."""
        self._add(job, request, now)
        return []

    def _add(self, job: Job, request: bytes, now: float) -> None:
        trace = Job(job.task_id, job.task_name, TRACERS, timeout=job.timeout, retries=job.retries)
        trace.request = request
        # Celery is not told of it, and no shutdown drops it: its job was accepted.
        trace.accepted = True
        trace.traces, job.trace = job, trace
        self._jobs.add(trace, now)

    def written(self, trace: Job, tracer: Child, now: float) -> None:
        """`trace` was written to `tracer`."""
        self._standstill.expect(tracer, trace, now)
        if trace.traces is not None and trace.traces.state is JobState.CLOSED:
            # No limit goes on for a job that is over, and Celery waits to be told of it.
            grace = tracer.group.settings.cancel_grace
            since = "it was asked whether the result backend answers"
            self._jobs.cancel(trace, tracer, CancelReason.TIME_LIMIT, grace, since, now)

    def unwritten(self, tracer: Child) -> None:
        """`tracer` reads no more, and keeps only the traces that it has read."""
        self._standstill.forget(tracer)

    def asked(self, tracer: Child, ask: Ask, now: float) -> list[Action]:
        """`tracer` asks for the exchange with the external child of a job."""
        trace = tracer.jobs.get(ask.id)
        if trace is None or trace.state is not JobState.SENT or trace.traces is None:
            # The job has ended meanwhile in another way.
            return []
        goes_on = self._standstill.heard(tracer, trace, now)
        return [*goes_on, *self._jobs.provide(trace.traces, ask.line)]

    def tell(self, job: Job, line: bytes, now: float) -> list[Action]:
        """Pass `line`, which is about `job`, on to its tracer. If another tracer gets the trace
        later, it gets the line too."""
        trace = job.trace
        if trace is None or trace.state is JobState.CLOSED:
            return []
        assert trace.request is not None
        trace.request += line
        if trace.state is not JobState.SENT or trace.child is None:
            return []
        if job.state is JobState.ANSWERED:
            self._standstill.expect(trace.child, trace, now)
        return [Tell(trace.child, line)]

    def ended(self, trace: Job, tracer: Child, reply: Reply, now: float) -> list[Action]:
        """`tracer` is through with `trace`, maybe without having needed the external child."""
        actions = self._standstill.heard(tracer, trace, now)
        self._jobs.close(trace)
        job = trace.traces
        assert job is not None
        actions.append(Finished(job, reply))
        if job.state is not JobState.CLOSED:
            child, sent = job.child, job.state is JobState.SENT
            self._jobs.close(job, survived=True)
            reason = CancelReason.REVOKED
            actions += self._ending.free(child, job, sent, signal.SIGTERM, reason, now)
        return actions

    # -- what other events have noted

    def settle(self, now: float) -> list[Action]:
        """End the jobs whose trace was lost, and the traces whose job is over."""
        actions: list[Action] = []
        while self._jobs.orphans:
            job, lost, tracer = self._jobs.orphans.pop()
            actions += self._ending.lose(job, lost, tracer, now)
        while self._jobs.abandoned:
            actions += self._abandon(*self._jobs.abandoned.pop(), now)
        return actions

    def _abandon(self, trace: Job, outcome: Outcome, now: float) -> list[Action]:
        job, tracer = trace.traces, trace.child
        assert job is not None
        if trace.state is JobState.CLOSED:
            # It has ended since.
            return []
        if trace.state is not JobState.SENT or tracer is None:
            self._jobs.close(trace)
            released = [] if tracer is None else self._stopping.release(tracer, trace, now)
            return [Finished(job, None), *released]
        reason = CancelReason.TIME_LIMIT
        if isinstance(outcome, Terminated):
            reason = outcome.reason
        grace = tracer.group.settings.cancel_grace
        self._standstill.expect(tracer, trace, now)
        self._jobs.cancel(trace, tracer, reason, grace, "it was told that the job is over", now)
        return [Abandon(tracer, trace, revoked=reason is CancelReason.REVOKED)]
