"""Jobs with tracers against a pretend world in which anything happens in any order.

The world is that of `test_properties`. Here, it has tracers too, and an owner of the jobs that does
what `worker.runner` does. Tracers let a trace end at any time, also before it has asked for its
child; they say nothing; they let go of jobs late or never.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from functools import partial

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from celery_subproc_pool.core.actions import Write
from celery_subproc_pool.core.ending import HOLD
from celery_subproc_pool.core.model import ChildState, Job, JobState, Tracing
from celery_subproc_pool.settings import TRACERS
from celery_subproc_pool.wire.messages import CancelReason
from celery_subproc_pool.wire.python import Ask, Released, Traced

from . import test_properties
from .pretend_tracing import Tracer
from .test_properties import PICK, Process
from .traced_world import TracedTurns, has

#: What may go wrong, or change. The world does not shrink: then a job that has lost its child may
#: wait for a place, and its tracer, which can't be empty before, for an isolated trace to begin.
HARMS = (
    *("id", "no id", "garbage", "unwritten", "unsolicited", "stdout", "stdin", "spawns"),
    *("stdin", "flush", "grow", "restart"),
)


class TracedWorld(TracedTurns):
    """See this module's docstring."""

    # -- what tracers say

    def answer(
        self, process: Process, task_id: str, with_id: bool, retire: bool | None, well: bool
    ) -> None:
        """A tracer is through with a job, or has let go of it."""
        if not isinstance(process, Tracer):
            super().answer(process, task_id, with_id, retire, well)
            return
        part = process.speak(task_id, ends=True)
        trace = part.trace
        lets_go = part.heard.startswith(b"probe") or (part.abandoned and well)
        reply = (Released if lets_go else Traced)(id=task_id, retire=retire)
        counts = trace.state is JobState.SENT
        if process.child.state is ChildState.STOPPING:
            counts = counts and not self.scheduler.stopping
        self.by_process(self.scheduler.replied, process.child, reply)
        found = [job for job, last in self.last_reply.items() if last is reply]
        if trace.traces is None:
            assert found == []
            assert (self.answered.get(trace) is reply) == counts
        else:
            assert found == ([trace.traces] if counts else [])

    @rule(pick=PICK, turn=st.booleans())
    def ask(self, pick: int, turn: bool) -> None:
        if self.told_by_threads:
            self.end_turn()
        asking = [
            (process, task_id)
            for process in self.tracers()
            for task_id, part in process.parts.items()
            if part.exchanges and process.stdout_open
        ]
        if asking:
            self.ask_for(*asking[pick % len(asking)])
        if turn:
            self.end_turn()

    def ask_for(self, process: Tracer, task_id: str) -> None:
        part = process.speak(task_id, ends=False)
        part.asked = True
        job = part.trace.traces
        assert job is not None
        awaited = part.trace.state is job.state is JobState.SENT
        assert not awaited, "no child works before its tracer has asked"
        expected = part.trace.state is JobState.SENT and job.state is JobState.RESERVED
        before = len(self.pending)
        request = msgspec.Raw(b"request " + self.name_of(job))
        self.by_process(self.scheduler.asked, process.child, Ask(id=task_id, request=request))
        writes = [each for each in list(self.pending)[before:] if isinstance(each, Write)]
        assert [each.job for each in writes] == ([job] if expected else [])

    def end_work(self, process: Process) -> None:
        if not isinstance(process, Tracer):
            super().end_work(process)
            return
        for task_id, part in list(process.parts.items()):
            if part.exchanges:
                self.ask_for(process, task_id)
            elif part.can_end:
                self.answer(process, task_id, True, None, True)

    def next_steps(self) -> list[Callable[[], None]]:
        """What processes that do as they should may do next."""
        steps: list[Callable[[], None]] = []
        for process in self.processes:
            if process.boots and process.stdout_open:
                steps.append(partial(self.greet, process))
            for task_id in process.asked if process.stdout_open else ():
                part = process.parts[task_id] if isinstance(process, Tracer) else None
                if isinstance(process, Tracer) and part is not None and part.exchanges:
                    steps.append(partial(self.ask_for, process, task_id))
                elif part is None or part.can_end:
                    steps.append(partial(self.answer, process, task_id, True, None, True))
        return steps

    def greet(self, process: Process) -> None:
        process.boots = False
        greeting = test_properties.greeting(process.child)
        self.by_process(self.scheduler.ready, process.child, greeting, None)

    @rule(picks=st.lists(PICK, min_size=2, max_size=12))
    def work(self, picks: list[int]) -> None:
        """Let some things go well. If only chance did, most traces would not get far."""
        for pick in picks:
            self.end_turn()
            steps = self.next_steps()
            if steps:
                steps[pick % len(steps)]()

    # -- what goes wrong. As rules of their own, these would leave few traces to look at

    misbehave = close_stdout = spoil_the_next_write = fail_the_next_spawns = None  # type: ignore[assignment]
    flush = grow = shrink = restart = None  # type: ignore[assignment]

    @rule(pick=PICK, how=st.sampled_from(HARMS), turn=st.booleans())
    def go_wrong(self, pick: int, how: str, turn: bool) -> None:
        world = super()
        if how in ("id", "no id", "garbage") and self.processes:
            world.misbehave(pick, how, turn)
        elif how in ("unwritten", "unsolicited"):
            world.spoil_the_next_write(how)
        elif how == "stdout" and self.processes:
            world.close_stdout(pick, turn)
        elif how == "stdin" and self.tracers():
            # Nobody notices before the next line for it.
            self.tracers()[pick % len(self.tracers())].close_stdin()
        elif how == "spawns":
            world.fail_the_next_spawns(pick % 3 + 1)
        elif how == "flush":
            world.flush()
            self.held_until = None
        elif not self.scheduler.stopping:
            self.change(pick, how, turn)

    def change(self, pick: int, how: str, turn: bool) -> None:
        world = super()
        if how == "grow" and self.scheduler.limit <= self.limit:
            world.grow(pick % 2 + 1, turn)
        elif how == "restart":
            groups = list(self.scheduler.groups.values())
            self.by_thread(self.scheduler.restart, [groups[pick % len(groups)]])

    # -- what becomes of jobs

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK, turn=st.booleans())
    def end_for_shutdown(self, pick: int, turn: bool) -> None:
        """Celery ends a job because it stops, or has lost its broker."""
        recent = self.jobs[-6:]
        job = recent[pick % len(recent)]
        terminate, reason = self.scheduler.terminate, CancelReason.SHUTDOWN
        self.by_thread(lambda now: terminate(job, signal.SIGTERM, now, reason))
        self.held_until = self.now + HOLD
        if turn:
            self.end_turn()

    @precondition(lambda self: self.accepts)
    @rule(pick=PICK, turn=st.booleans())
    def give_up(self, pick: int, turn: bool) -> None:
        recent = list(self.accepts)[-6:]
        job = recent[pick % len(recent)]
        if job.state is JobState.CLOSED or self.ends[job]:
            return
        self.give_up_one(job)
        if turn:
            self.end_turn()

    def give_up_one(self, job: Job) -> None:
        if not self.told_by_threads:
            self.told_by_threads = True
            self.tick()
        self.owner.give_up(job)

    # -- what must hold at any time

    def a_group_is_recycled_by_the_quarter(self) -> None:
        """Not here: a child may lose the job by which it reaches `max_jobs`, while its
        successor boots already."""

    @invariant()
    def each_trace_ends_at_most_once(self) -> None:
        assert all(count == 1 for count in self.final.values())
        assert all(count == 1 for count in self.abandons.values())
        begun = Counter(trace.traces for trace in self.owner.traces)
        assert all(count <= begun[job] for job, count in self.finished.items())

    @invariant()
    def a_tracer_is_due_to_speak_of_jobs_that_it_has(self) -> None:
        for child in self.scheduler.groups[TRACERS].children.values():
            if child.state is not ChildState.STOPPING:
                assert all(has(child, trace) for trace in child.due)
                assert (child.quiet_since is None) == (child.warn_at is None) == (not child.due)

    @invariant()
    def jobs_and_traces_agree_between_turns(self) -> None:
        if self.pending or self.callbacks or self.told_by_threads:
            return
        for trace in self.owner.traces:
            job = trace.traces
            assert job is not None
            if trace.state is JobState.CLOSED:
                assert job.state is JobState.CLOSED, "no job goes on without its trace"
            elif job.state is JobState.CLOSED and job not in self.owner.probed:
                assert trace.kill_at is not None, "its tracer was told that the job is over"
            elif job.state is JobState.ANSWERED:
                assert trace.deadline == job.deadline
        for job in self.jobs:
            if job.state is JobState.ANSWERED:
                assert job.trace is not None, "somebody will end it"
            if job.state is JobState.SENT and job.tracing is Tracing.ALWAYS:
                assert job.trace is not None
                assert job.trace.state is JobState.SENT, "no child works for nobody"
        self.tracers_know_all()

    def tracers_know_all(self) -> None:
        """What a tracer was told of a trace is all that there is to tell."""
        for process in self.tracers():
            if process.stdin_open and not process.told_to_exit and not process.killed:
                for part in process.parts.values():
                    if has(process.child, part.trace):
                        told = part.heard.replace(b"abandon\n", b"")
                        assert told == part.trace.request

    def deadlines(self) -> list[float]:
        found = super().deadlines()
        for child in self.scheduler.groups[TRACERS].children.values():
            if child.warn_at is not None and child.state is not ChildState.STOPPING:
                found.append(child.warn_at)
        if self.held_until is not None and self.held_until > self.now:
            found.append(self.held_until)
        return found

    # -- what must hold in the end

    def teardown(self) -> None:
        super().teardown()
        assert all(job.state is JobState.CLOSED for job in (*self.jobs, *self.owner.traces))
        for group in self.scheduler.groups.values():
            assert not group.waiting
            for child in group.children.values():
                assert not child.jobs
                assert not child.due
        ends = self.final + self.finished
        for job in self.jobs:
            traces = sum(trace.traces is job for trace in self.owner.traces)
            assert max(traces, 1) <= ends[job] <= traces + 1


class ClosingWorld(TracedWorld):
    """The worker stops, and tracers start only when they are needed."""

    on_demand = TRACERS

    @precondition(lambda self: len(self.jobs) > 5)
    @rule(turn=st.booleans())
    def close(self, turn: bool) -> None:
        self.by_thread(self.scheduler.close)
        self.held_until = None
        if turn:
            self.end_turn()

    @precondition(lambda self: len(self.jobs) > 9 and not self.scheduler.stopping)
    @rule(turns=st.integers(0, 3), turn=st.booleans())
    def stop(self, turns: int, turn: bool) -> None:
        """Children stop when Celery knows how all jobs have ended."""
        self.close(True)
        for _ in range(turns):
            self.let_all_go_well()
        for job in self.jobs:
            if job.state is not JobState.CLOSED:
                self.give_up_one(job)
        self.end_turn()
        if all(self.ends[job] for job in self.jobs):
            self.by_thread(self.scheduler.stop)
            if turn:
                self.end_turn()

    def come_to_rest(self) -> None:
        if not self.scheduler.stopping:
            super().come_to_rest()
            return
        while self.processes:
            # All ignore what they are told, until they are killed.
            for process in [process for process in self.processes if process.killed]:
                self.exit_of(process, -9)
            self.end_turn()
            self.now = min((due for due in self.deadlines() if due > self.now), default=self.now)
            self.end_turn()


for world in (TracedWorld, ClosingWorld):
    world.TestCase.settings = settings(
        max_examples=400 if world is TracedWorld else 150,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
TestTraces = TracedWorld.TestCase
TestClosing = ClosingWorld.TestCase
