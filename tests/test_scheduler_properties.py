"""The scheduler against a pretend world in which anything happens in any order.

The world is as the supervisor makes it: in a turn, first what processes did is told, then what is
due, then what other threads asked for; then jobs are dispatched, and only then actions performed.
Its processes are the worst: they ignore the end of stdin and SIGTERM, and exit when they like.
"""

from __future__ import annotations

import signal
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from celery_subproc_pool.config import ChildSettings
from celery_subproc_pool.protocol import Ok
from celery_subproc_pool.records import (
    Accept,
    Action,
    Answered,
    Child,
    ChildState,
    Faulted,
    Finished,
    Forget,
    Group,
    Job,
    JobState,
    Kill,
    Lost,
    Measure,
    Probe,
    Settle,
    Spawn,
    Write,
)
from celery_subproc_pool.scheduler import Scheduler

REQUEST = b"request"
BIG = 2**20
HELD = (JobState.RESERVED, JobState.SENT, JobState.ANSWERED)
PICK = st.integers(0, 1000)

Event = Callable[..., list[Action]]


class Process:
    """A child's process."""

    def __init__(self, child: Child) -> None:
        self.child = child
        #: What it has been asked and has not answered.
        self.asked: Job | None = None
        self.stdout_open = True
        self.killed = False
        #: Whether it has still to say that it is ready.
        self.boots = child.group.settings.handshake


class World(RuleBasedStateMachine):
    """See this module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        kinds = {
            "elastic": ChildSettings(
                argv=("true",), size=None, stop_timeout=3.0, max_memory=BIG, recycle_jitter=0.0
            ),
            "fixed": ChildSettings(
                argv=("true",),
                size=2,
                stop_timeout=3.0,
                soft_timeout_signal="SIGUSR1",
                max_jobs=2,
                max_crashes=1,
            ),
            "tracing": ChildSettings(
                argv=("true",),
                size=5,
                stop_timeout=3.0,
                handshake=True,
                start_timeout=7.0,
                max_age=20.0,
            ),
        }
        limit = 3
        jitter = Random(1).random
        self.scheduler = Scheduler(
            {name: Group(name, kind, kind.size or limit) for name, kind in kinds.items()},
            limit,
            jitter,
        )
        self.pending: deque[Action] = deque()
        self.told_by_threads = False
        self.failing_spawns = 0
        self.next_write = "written"
        self.processes: list[Process] = []
        self.jobs: list[Job] = []
        #: Jobs by what their tracers are at.
        self.preparing: list[Job] = []
        self.exchanging: list[Job] = []
        self.concluding: list[Job] = []
        self.accepts: Counter[Job] = Counter()
        self.answers: Counter[Job] = Counter()
        self.ends: Counter[Job] = Counter()
        self.writes: Counter[tuple[Job, Child]] = Counter()
        self.written_to: dict[Job, Child] = {}
        self.note(self.scheduler.start)
        self.end_turn()

    # -- how events are told, and actions performed

    def note(self, event: Event, *arguments: Any) -> None:
        self.keep(event(*arguments, self.now))

    def keep(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Accept):
                self.accepts[action.job] += 1
            elif self.is_answer(action):
                self.answers[action.job] += 1
            elif isinstance(action, (Settle, Finished)):
                self.ends[action.job] += 1
        self.pending.extend(actions)

    @staticmethod
    def is_answer(action: Action) -> bool:
        """Whether a tracer here goes on with the outcome."""
        return (
            isinstance(action, Settle)
            and isinstance(action.outcome, (Answered, Faulted))
            and action.job.traced_here
        )

    def by_process(self, event: Event, *arguments: Any) -> None:
        """An event that a descriptor tells: the first thing in a turn."""
        if self.told_by_threads:
            self.end_turn()
        self.note(event, *arguments)

    def by_thread(self, event: Event, *arguments: Any) -> None:
        """An event that another thread posts: told after what is due."""
        if not self.told_by_threads:
            self.told_by_threads = True
            self.tick()
        self.note(event, *arguments)

    def tick(self) -> None:
        bound = self.scheduler.next_deadline
        self.note(self.scheduler.tick)
        if bound is not None and bound <= self.now:
            deadline = min(self.deadlines(), default=None)
            assert self.scheduler.next_deadline == deadline, "tick makes the bound exact"

    def end_turn(self) -> None:
        if not self.told_by_threads:
            self.tick()
        self.told_by_threads = False
        while True:
            self.dispatch()
            if not self.pending:
                return
            while self.pending:
                self.perform(self.pending.popleft())

    def dispatch(self) -> None:
        before = self.scheduler.open_jobs
        self.note(self.scheduler.dispatch)
        assert self.scheduler.open_jobs <= max(self.scheduler.limit, before)
        if self.scheduler.open_jobs < self.scheduler.limit:
            for group in self.scheduler.groups.values():
                assert not (group.waiting and group.idle), "a job waits while a child is idle"

    def perform(self, action: Action) -> None:
        if isinstance(action, Spawn):
            self.spawn(action.child)
        elif isinstance(action, (Probe, Measure)):
            self.look(action)
        elif isinstance(action, Write):
            self.write(action.child, action.job)
        elif isinstance(action, Accept) and action.job.traced_here:
            self.preparing.append(action.job)
        elif isinstance(action, Settle):
            self.settle(action)
        elif isinstance(action, Kill) and action.signum == signal.SIGKILL:
            for process in self.processes:
                if process.child is action.child:
                    process.killed = True
        elif isinstance(action, Forget):
            assert action.child.state is ChildState.GONE

    def look(self, action: Probe | Measure) -> None:
        child = action.child
        if isinstance(action, Probe):
            # Every other child takes a second to boot.
            boots = child.number % 2 and self.now < child.spawned_at + 1.0
            self.scheduler.probed(child, 10**9 if boots else 0, self.now)
        else:
            # It grows with every job.
            self.scheduler.measured(child, child.jobs_done * BIG // 2, self.now)

    def spawn(self, child: Child) -> None:
        if self.failing_spawns:
            self.failing_spawns -= 1
            self.note(self.scheduler.spawn_failed, child, "no such program")
        else:
            self.processes.append(Process(child))
            self.note(self.scheduler.spawned, child, 1000 + child.number)

    def write(self, child: Child, job: Job) -> None:
        self.writes[job, child] += 1
        process = next((each for each in self.processes if each.child is child), None)
        assert process is not None, "the process is there"
        outcome, self.next_write = self.next_write, "written"
        if not process.stdout_open or process.killed:
            outcome = "unwritten"
        if outcome == "unwritten":
            process.stdout_open = False
            self.note(self.scheduler.unwritten, child, "it closed its stdin")
        elif outcome == "unsolicited":
            self.note(self.scheduler.unsolicited, child, "it wrote too early")
        else:
            assert process.asked is None, "a child has one job at a time"
            assert job not in self.written_to, "no job is written twice"
            process.asked = job
            self.written_to[job] = child

    def settle(self, action: Settle) -> None:
        """What an outcome means to the tracer: go on with it, or be abandoned."""
        job = action.job
        if isinstance(action.outcome, Lost) and job.group == "fixed":
            unread = action.outcome.status is None
            assert action.outcome.crashes == (0 if unread else 1)
        if job in self.exchanging:
            self.exchanging.remove(job)
            if self.is_answer(action):
                self.concluding.append(job)
        else:
            assert not self.is_answer(action), "nobody waits for it"

    # -- what jobs and tracers do

    @rule(
        group=st.sampled_from(["elastic", "fixed", "tracing", "elastic", "fixed", "tracing", None]),
        timeout=st.sampled_from([None, None, 1.0, 20.0]),
        soft_timeout=st.sampled_from([None, None, 0.5, 30.0]),
        turn=st.booleans(),
    )
    def submit(
        self, group: str | None, timeout: float | None, soft_timeout: float | None, turn: bool
    ) -> None:
        traced_here = group != "tracing"
        job = Job(str(len(self.jobs)), "task", group, timeout, soft_timeout, traced_here)
        if not traced_here:
            job.request = REQUEST
        self.jobs.append(job)
        self.by_thread(self.scheduler.submit, job)
        if turn:
            self.end_turn()

    @precondition(lambda self: any(job.group for job in self.preparing))
    @rule(pick=PICK, turn=st.booleans())
    def provide(self, pick: int, turn: bool) -> None:
        able = [job for job in self.preparing if job.group]
        job = able[pick % len(able)]
        self.preparing.remove(job)
        if job.state is not JobState.CLOSED:
            self.exchanging.append(job)
        self.by_thread(self.scheduler.provide, job, REQUEST)
        if turn:
            self.end_turn()

    @precondition(lambda self: self.preparing)
    @rule(pick=PICK, turn=st.booleans())
    def finish_without_a_child(self, pick: int, turn: bool) -> None:
        self.by_thread(self.scheduler.finish, self.preparing.pop(pick % len(self.preparing)))
        if turn:
            self.end_turn()

    @precondition(lambda self: self.concluding)
    @rule(pick=PICK, turn=st.booleans())
    def finish(self, pick: int, turn: bool) -> None:
        self.by_thread(self.scheduler.finish, self.concluding.pop(pick % len(self.concluding)))
        if turn:
            self.end_turn()

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK, turn=st.booleans())
    def terminate(self, pick: int, turn: bool) -> None:
        recent = self.jobs[-6:]
        self.by_thread(self.scheduler.terminate, recent[pick % len(recent)], signal.SIGTERM)
        if turn:
            self.end_turn()

    @rule()
    def flush(self) -> None:
        self.by_thread(lambda now: self.scheduler.flush())

    @precondition(lambda self: self.scheduler.limit < 5)
    @rule(count=st.integers(1, 2), turn=st.booleans())
    def grow(self, count: int, turn: bool) -> None:
        self.by_thread(self.scheduler.grow, count)
        if turn:
            self.end_turn()

    @rule(count=st.integers(0, 2), turn=st.booleans())
    def shrink(self, count: int, turn: bool) -> None:
        try:
            self.scheduler.check_shrink(count)
        except ValueError:
            return
        self.by_thread(self.scheduler.shrink, count)
        if turn:
            self.end_turn()

    @rule(fixed=st.booleans(), turn=st.booleans())
    def restart(self, fixed: bool, turn: bool) -> None:
        groups = [self.scheduler.groups["fixed" if fixed else "elastic"]]
        self.by_thread(self.scheduler.restart, groups)
        if turn:
            self.end_turn()

    # -- what processes do

    def some_process(self, pick: int) -> Process:
        # Those that have a request are the interesting ones.
        asked = [process for process in self.processes if process.asked is not None]
        choice = asked if asked and pick % 4 else self.processes
        return choice[pick // 4 % len(choice)]

    @precondition(lambda self: any(process.asked for process in self.processes))
    @rule(
        pick=PICK,
        with_id=st.booleans(),
        retire=st.sampled_from([None, None, None, True]),
        turn=st.booleans(),
    )
    def reply(self, pick: int, with_id: bool, retire: bool | None, turn: bool) -> None:
        if self.told_by_threads:
            self.end_turn()
        asked = [each for each in self.processes if each.asked and each.stdout_open]
        if not asked:
            return
        process = asked[pick % len(asked)]
        job, process.asked = process.asked, None
        assert job is not None
        reply = Ok(id=job.task_id if with_id else None, retire=retire)
        self.by_process(self.scheduler.replied, process.child, reply)
        if turn:
            self.end_turn()

    @precondition(lambda self: any(process.boots for process in self.processes))
    @rule(pick=PICK, well=st.sampled_from([True, True, False]), turn=st.booleans())
    def boot(self, pick: int, well: bool, turn: bool) -> None:
        if self.told_by_threads:
            self.end_turn()
        booting = [each for each in self.processes if each.boots and each.stdout_open]
        if not booting:
            return
        process = booting[pick % len(booting)]
        process.boots = False
        if well:
            self.by_process(self.scheduler.ready, process.child, 5000 + process.child.number)
        else:
            self.by_process(self.scheduler.boot_failed, process.child, "no such module\nat all")
        if turn:
            self.end_turn()

    @precondition(lambda self: self.processes)
    @rule(pick=PICK, wrong=st.sampled_from(["id", "no id", "garbage"]), turn=st.booleans())
    def misbehave(self, pick: int, wrong: str, turn: bool) -> None:
        if self.told_by_threads:
            self.end_turn()
        process = self.some_process(pick)
        if not process.stdout_open:
            return
        # A reply without an id, where there is a job, would be a good one.
        if wrong == "garbage" or process.boots or (wrong == "no id" and process.asked):
            self.by_process(self.scheduler.faulted, process.child, "not JSON")
        else:
            reply = Ok(id="nobody's" if wrong == "id" else None)
            self.by_process(self.scheduler.replied, process.child, reply)
        if turn:
            self.end_turn()

    @precondition(lambda self: self.processes)
    @rule(pick=PICK, turn=st.booleans())
    def close_stdout(self, pick: int, turn: bool) -> None:
        if self.told_by_threads:
            self.end_turn()
        process = self.some_process(pick)
        if process.stdout_open:
            process.stdout_open = False
            self.by_process(self.scheduler.stdout_closed, process.child)
        if turn:
            self.end_turn()

    @precondition(lambda self: self.processes)
    @rule(pick=PICK, status=st.sampled_from([0, 1, -11]), read=st.booleans(), turn=st.booleans())
    def exit(self, pick: int, status: int, read: bool, turn: bool) -> None:
        if self.told_by_threads:
            self.end_turn()
        self.exit_of(self.some_process(pick), status, read)
        if turn:
            self.end_turn()

    def exit_of(self, process: Process, status: int, read: bool = True) -> None:
        self.processes.remove(process)
        unread = 0
        if process.asked is not None and not read:
            # The worker took back what stood in the pipe still: it was never written.
            self.written_to.pop(process.asked, None)
            unread = len(REQUEST)
        self.by_process(self.scheduler.exited, process.child, status, unread)

    @rule(outcome=st.sampled_from(["unwritten", "unsolicited"]))
    def spoil_the_next_write(self, outcome: str) -> None:
        self.next_write = outcome

    @rule(count=st.integers(1, 3))
    def fail_the_next_spawns(self, count: int) -> None:
        self.failing_spawns = count

    @rule(seconds=st.sampled_from([0.05, 0.2, 0.5, 1.0, 3.0, 40.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.end_turn()
        self.now += seconds
        self.end_turn()

    # -- what must hold at any time

    @invariant()
    def each_job_ends_at_most_once(self) -> None:
        assert all(count == 1 for count in self.accepts.values())
        assert all(count == 1 for count in self.answers.values())
        assert all(count == 1 for count in self.ends.values())

    @invariant()
    def no_request_goes_twice_to_a_child(self) -> None:
        assert all(count == 1 for count in self.writes.values())

    @invariant()
    def open_jobs_are_those_that_are_accepted_and_not_finished(self) -> None:
        unfinished = [job for job in self.accepts if not self.ends[job]]
        # What lost its child gives its place to others while it waits for the next.
        held = [job for job in unfinished if job.state is not JobState.QUEUED]
        assert self.scheduler.open_jobs == len(held)
        assert all(job.state in HELD for job in held)
        assert self.scheduler.idle == (
            not held and not any(job.state is JobState.QUEUED for job in self.jobs)
        )

    @invariant()
    def jobs_and_children_agree_on_who_has_whom(self) -> None:
        for group in self.scheduler.groups.values():
            children = list(group.children.values())
            jobs = [child.job for child in children if child.job is not None]
            assert len(jobs) == len(set(jobs)), "no two children have one job"
            for child in children:
                assert (child.state is ChildState.IDLE) == (child in group.idle)
                assert child.state is not ChildState.BUSY or child.job is not None
                assert child.job is None or child.job.child is child
            assert all(job.child is None for job in group.waiting)
            assert [job.number for job in group.waiting] == sorted(
                job.number for job in group.waiting
            )

    @invariant()
    def slots_and_children_agree_on_who_is_whose(self) -> None:
        for group in self.scheduler.groups.values():
            for slot in group.slots:
                assert slot.child is not None or slot.spawn_at is not None, "somebody will come"
                assert slot.successor is None or (slot.child is not None and slot.child.worn)
                for child in (slot.child, slot.successor):
                    assert child is None or child.state not in (
                        ChildState.STOPPING,
                        ChildState.GONE,
                    )
                assert slot.successor is None or slot.successor.state is ChildState.STARTING
            successors = [slot.successor for slot in group.slots if slot.successor is not None]
            assert group.successors == len(successors)
            for child in group.children.values():
                replaced = child not in (child.slot.child, child.slot.successor)
                assert not replaced or child.state in (ChildState.BUSY, ChildState.STOPPING)

    @invariant()
    def no_child_does_more_than_its_share(self) -> None:
        for process in self.processes:
            most = process.child.group.settings.max_jobs
            assert most is None or process.child.jobs_begun <= most

    @invariant()
    def a_group_is_recycled_by_the_quarter(self) -> None:
        for group in self.scheduler.groups.values():
            # But for those that do no more jobs at all, the worker serves with all it has.
            early = [
                slot
                for slot in group.slots
                if slot.successor is not None and slot.child is not None and not slot.child.spent
            ]
            # A group may have shrunk since.
            assert len(early) <= max(1, max(len(group.slots), 5) // 4)

    @invariant()
    def the_next_deadline_is_a_lower_bound(self) -> None:
        deadlines = self.deadlines()
        if deadlines:
            assert self.scheduler.next_deadline is not None
            assert self.scheduler.next_deadline <= min(deadlines)

    def deadlines(self) -> list[float]:
        found: list[float | None] = []
        for group in self.scheduler.groups.values():
            found += [slot.spawn_at for slot in group.slots]
            found += [job.deadline for job in group.waiting if job.accepted]
            for child in group.children.values():
                found += [child.deadline, child.settle_at, child.retire_at]
                if child.job is not None and child.state is ChildState.BUSY:
                    found += [child.job.deadline, child.job.soft_deadline]
        return [deadline for deadline in found if deadline is not None]

    # -- what must hold in the end

    def teardown(self) -> None:
        """Let all go well from now on, until nothing is left to happen."""
        self.failing_spawns, self.next_write = 0, "written"
        self.end_turn()
        if self.scheduler.limit == 0:
            # A pool of nobody does no jobs.
            self.by_thread(self.scheduler.grow, 1)
            self.end_turn()
        for _ in range(200):
            self.let_all_go_well()
            self.end_turn()
            if not self.at_rest():
                due = [deadline for deadline in self.deadlines() if deadline > self.now]
                self.now = min(due, default=self.now)
                self.end_turn()
            elif not self.at_work():
                break
        else:
            raise AssertionError("it never comes to rest")
        self.each_job_ends_at_most_once()
        self.no_request_goes_twice_to_a_child()
        assert self.scheduler.idle
        assert self.scheduler.open_jobs == 0
        assert [job for job in self.jobs if not self.ends[job]] == [], "each job ends"
        for group in self.scheduler.groups.values():
            assert len(group.children) == len(group.slots), "each group is at full size"
            assert len(group.idle) == len(group.slots), "each child is idle"
            assert group.came_up
        assert not self.scheduler.booting
        assert len(self.scheduler.groups["fixed"].slots) == 2
        assert len(self.scheduler.groups["elastic"].slots) == self.scheduler.limit

    def at_rest(self) -> bool:
        """Whether nothing is due but that children grow old."""
        ages = [
            child.retire_at
            for group in self.scheduler.groups.values()
            for child in group.children.values()
            if child.retire_at is not None and not child.worn
        ]
        return len(self.deadlines()) == len(ages) and not any(
            slot.successor or (slot.child and slot.child.worn)
            for group in self.scheduler.groups.values()
            for slot in group.slots
        )

    def at_work(self) -> bool:
        return bool(
            self.preparing
            or self.exchanging
            or self.concluding
            or any(each.killed or each.asked or each.boots for each in self.processes)
        )

    def let_all_go_well(self) -> None:
        for process in [process for process in self.processes if process.killed]:
            self.exit_of(process, -9)
        for process in [process for process in self.processes if process.stdout_open]:
            if process.asked is not None:
                self.by_process(self.scheduler.replied, process.child, Ok(id=process.asked.task_id))
                process.asked = None
            if process.boots:
                process.boots = False
                self.by_process(self.scheduler.ready, process.child, None)
        self.end_turn()
        for job in self.preparing[:]:
            self.preparing.remove(job)
            if job.group is None or job.state is JobState.CLOSED:
                self.by_thread(self.scheduler.finish, job)
            else:
                self.exchanging.append(job)
                self.by_thread(self.scheduler.provide, job, REQUEST)
        while self.concluding:
            self.by_thread(self.scheduler.finish, self.concluding.pop())


World.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestScheduler = World.TestCase
