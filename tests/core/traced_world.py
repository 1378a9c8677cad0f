"""A world with tracers: see `test_trace_properties`, which has its rules."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from celery_subproc_pool.core.actions import (
    Abandon,
    Action,
    CloseStdin,
    Finished,
    Resolve,
    StandsStill,
    Tell,
)
from celery_subproc_pool.core.model import Child, Job, JobState, Tracing
from celery_subproc_pool.settings import TRACERS, ChildSettings
from celery_subproc_pool.wire.messages import Reply

from . import test_properties
from .pretend_tracing import Owner, Part, Tracer, left_to_tracer
from .test_properties import KINDS, Process

#: The groups of the world. Tracers have little room, so that traces wait.
TRACED_KINDS = {
    "fixed": KINDS["fixed"],
    TRACERS: ChildSettings(
        argv=("true",),
        size=1,
        stop_timeout=7.0,
        handshake=True,
        max_in_flight=3,
        max_jobs=12,
        cancel_grace=2.0,
        kill_grace=1.0,
        max_crashes=2,
    ),
    "async": KINDS["async"],
}
WAYS = (*Tracing, Tracing.ALWAYS)


def has(child: Child, trace: Job) -> bool:
    """Whether `trace` is with `child`, which has its request."""
    return trace.state is JobState.SENT and child.jobs.get(trace.task_id) is trace


class TracedTurns(test_properties.World):
    """What happens in a turn, and what tracers are told in it."""

    kinds = TRACED_KINDS
    # Most jobs are those of children.
    groups = ("fixed", "async", "fixed", "async", TRACERS)
    limit = 7

    def __init__(self) -> None:
        self.callbacks: deque[Callable[[], None]] = deque()
        #: Tracers that are written to, or told that they can't be, when all else is done.
        self.unwritable: deque[Tracer] = deque()
        self.finished: Counter[Job] = Counter()
        self.final: Counter[Job] = Counter()
        self.last_reply: dict[Job, Reply | None] = {}
        self.abandons: Counter[tuple[Job, Child]] = Counter()
        self.held_until: float | None = None
        self.owner = Owner(
            lambda event, *arguments: self.note(getattr(self.scheduler, event), *arguments),
            self.name_of,
            self.tracers_have_let_go_of,
        )
        super().__init__()
        # Celery is told by the owner.
        self.ends = self.owner.told

    def name_of(self, job: Job) -> bytes:
        return b"%d" % self.jobs.index(job)

    def job_of(self, line: bytes) -> Job:
        return self.jobs[int(line.split()[1])]

    # -- how events are told, and actions performed

    def count_end(self, action: Action) -> None:
        if isinstance(action, Resolve) and not left_to_tracer(action.job, action.outcome):
            self.final[action.job] += 1
        elif isinstance(action, Finished):
            self.finished[action.job] += 1
            self.last_reply[action.job] = action.reply
        elif isinstance(action, Abandon):
            assert has(action.child, action.job), "nothing is told after the end"
            self.abandons[action.job, action.child] += 1
        elif isinstance(action, Tell):
            trace = self.job_of(action.line).trace
            assert trace is not None
            assert has(action.child, trace), "nothing is told after the end"
        elif isinstance(action, StandsStill):
            assert all(has(action.child, trace) for trace in action.jobs)

    def perform(self, action: Action) -> None:
        super().perform(action)
        callback = self.owner.callback_of(action)
        if callback is not None:
            self.callbacks.append(callback)
        if isinstance(action, Tell):
            self.say(action.child, self.job_of(action.line), action.line)
        elif isinstance(action, Abandon):
            assert action.job.traces is not None
            part = self.say(action.child, action.job.traces, b"abandon\n")
            if part is not None:
                part.abandoned = True
        elif isinstance(action, CloseStdin):
            for process in self.tracers():
                process.told_to_exit |= process.child is action.child

    def settle(self, action: Resolve) -> None:
        """Whoever loses a job, its child or its tracer, may count crashes."""

    def go_on(self) -> bool:
        if self.callbacks:
            self.callbacks.popleft()()
        elif self.unwritable:
            process = self.unwritable.popleft()
            if process in self.processes and not process.told_to_exit:
                end = self.stop_reading(process, len(self.jobs) % 3)
                self.note(self.scheduler.unwritten, process.child, "it closed its stdin", end)
        else:
            return False
        return True

    def tick(self) -> None:
        super().tick()
        if self.held_until is not None and self.now >= self.held_until:
            self.held_until = None

    def has_place(self, job: Job) -> bool:
        if job.traces is not None:
            return True
        return self.held_until is None and super().has_place(job)

    def is_over(self, job: Job) -> bool:
        return bool(self.final[job] or self.finished[job])

    # -- what tracers are told

    def tracers(self) -> list[Tracer]:
        return [process for process in self.processes if isinstance(process, Tracer)]

    def process_of(self, child: Child) -> Process:
        return Tracer(child) if child.group.name == TRACERS else Process(child)

    def submit_one(self, *arguments: Any) -> None:
        # As `worker.slots`: Celery hands over no more jobs than may be open.
        under_way = sum(not self.ends[job] for job in self.jobs)
        if under_way < self.scheduler.limit:
            super().submit_one(*arguments)

    def prepare(self, job: Job, pick: int) -> None:
        if job.group != TRACERS:
            job.tracing = WAYS[pick // 7 % len(WAYS)]
        if job.tracing is not Tracing.ALWAYS:
            job.request = b"request %d\n" % len(self.jobs)

    def deliver(self, process: Process, job: Job) -> None:
        request = job.request
        assert request is not None
        assert self.job_of(request) is (job.traces or job), "each gets its own request"
        super().deliver(process, job)
        if isinstance(process, Tracer):
            process.begin(job)

    def fail_to_write(self, process: Process, job: Job) -> None:
        if not isinstance(process, Tracer):
            super().fail_to_write(process, job)
            return
        # What is for a child with many jobs is written at the end of a turn.
        process.close_stdin()
        if process.told_to_exit:
            return
        self.deliver(process, job)
        self.unwritable.append(process)

    def say(self, child: Child, job: Job, line: bytes) -> Part | None:
        """Write `line`, which is about `job`, to a tracer."""
        process = next((each for each in self.tracers() if each.child is child), None)
        if process is None or process.told_to_exit:
            return None
        if not process.stdin_open:
            self.unwritable.append(process)
            return None
        return process.hear(job, line)

    def stop_reading(self, process: Process, read: int) -> int:
        if not isinstance(process, Tracer):
            return super().stop_reading(process, read)
        process.close_stdin()
        end = super().stop_reading(process, process.most_likely(read))
        process.parts = {task_id: process.parts[task_id] for task_id in process.asked}
        process.readable = end
        return end

    def tracers_have_let_go_of(self, job: Job) -> None:
        """Celery is told of the end of `job`: no tracer may store an earlier state after that."""
        for process in self.tracers():
            part = process.parts.get(job.task_id)
            if part is not None and part.trace.traces is job:
                assert process.killed or process.child.unkillable
