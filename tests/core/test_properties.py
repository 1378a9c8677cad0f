"""The scheduler against a pretend world in which anything happens in any order.

The order of a turn is that of the supervisor: events of processes, what is due, events of other
threads, `dispatch`, and then the actions. The processes behave as badly as they can: they ignore
the end of stdin and SIGTERM, and exit at any time.
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

from celery_subproc_pool.core.actions import (
    Accept,
    Action,
    Forget,
    Kill,
    Measure,
    Probe,
    Report,
    Resolve,
    Spawn,
    Write,
)
from celery_subproc_pool.core.model import Child, ChildState, Group, Job, JobState
from celery_subproc_pool.core.outcomes import Answered, Lost
from celery_subproc_pool.core.scheduler import Scheduler
from celery_subproc_pool.settings import TRACERS, ChildSettings
from celery_subproc_pool.wire.messages import Error, Feature, Log, Ok, Progress, Ready, Reply

REQUEST = b"request"
BIG = 2**20
HELD = (JobState.RESERVED, JobState.SENT, JobState.ANSWERED)
PICK = st.integers(0, 1000)

Event = Callable[..., list[Action] | None]


class Process:
    """A child's process."""

    def __init__(self, child: Child) -> None:
        self.child = child
        #: What it has been asked and has not answered, by id; in order.
        self.asked: dict[str, Job] = {}
        #: How many bytes were written to it, and where the request of each job begins.
        self.written = 0
        self.offsets: dict[Job, int] = {}
        self.stdin_open = self.stdout_open = True
        self.killed = False
        #: Whether it has still to say that it is ready.
        self.boots = child.group.settings.handshake


#: The groups of the world.
KINDS = {
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
        kill_grace=1.0,
    ),
    "async": ChildSettings(
        argv=("true",),
        size=2,
        stop_timeout=3.0,
        handshake=True,
        max_in_flight=3,
        max_jobs=9,
        cancel_grace=2.0,
        inactivity_timeout=6.0,
    ),
    "async elastic": ChildSettings(
        argv=("true",),
        size=None,
        stop_timeout=3.0,
        handshake=True,
        max_in_flight=2,
        cancel_grace=1.0,
        max_crashes=1,
    ),
}


def greeting(child: Child) -> Ready:
    """What a child says of itself: some can be told to end a job, and some can't."""
    if child.group.name == TRACERS:
        return Ready(protocol=1, features=("multiplex",))
    if not child.group.name.startswith("async"):
        return Ready(protocol=1)
    features = ("multiplex", "progress", "log", "cancel")[: 4 if child.number % 3 else 3]
    return Ready(protocol=1, features=features, max_in_flight=child.number % 3 + 2)


class World(RuleBasedStateMachine):
    """See this module's docstring."""

    #: The settings of all groups, and the names of those that there are.
    kinds: dict[str, ChildSettings] = KINDS
    groups: tuple[str, ...] = tuple(KINDS)
    #: The group that spawns no child until a job waits for one; empty if there is none.
    on_demand = ""
    #: How many jobs may be open at first.
    limit = 4

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        limit = self.limit
        jitter = Random(1).random
        self.scheduler = Scheduler(
            {
                name: Group(name, kind, kind.size_for(limit), on_demand=name == self.on_demand)
                for name, kind in self.kinds.items()
                if name in self.groups
            },
            limit,
            jitter,
        )
        self.pending: deque[Action] = deque()
        self.told_by_threads = False
        self.failing_spawns = 0
        self.next_write = "written"
        self.processes: list[Process] = []
        self.jobs: list[Job] = []
        self.accepts: Counter[Job] = Counter()
        self.ends: Counter[Job] = Counter()
        self.answered: dict[Job, Reply] = {}
        self.writes: Counter[tuple[Job, Child]] = Counter()
        self.written_to: dict[Job, Child] = {}
        self.note(self.scheduler.start)
        self.end_turn()

    # -- how events are told, and actions performed

    def note(self, event: Event, *arguments: Any) -> None:
        self.keep(event(*arguments, self.now) or [])

    def keep(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Resolve) and isinstance(action.outcome, Answered):
                self.answered[action.job] = action.outcome.reply
            if isinstance(action, Accept):
                self.accepts[action.job] += 1
            else:
                self.count_end(action)
        self.pending.extend(actions)

    def count_end(self, action: Action) -> None:
        if isinstance(action, Resolve):
            self.ends[action.job] += 1

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
        if bound is not None and bound <= self.now and not self.scheduler.stopping:
            deadline = min(self.deadlines(), default=None)
            if not any(isinstance(action, Report) for action in self.pending):
                # Of a child that went in this tick, something may have been noted before.
                assert self.scheduler.next_deadline == deadline, "tick makes the bound exact"

    def end_turn(self) -> None:
        if not self.told_by_threads:
            self.tick()
        self.told_by_threads = False
        while True:
            self.dispatch()
            if not self.pending and not self.go_on():
                return
            while self.pending:
                self.perform(self.pending.popleft())

    def go_on(self) -> bool:
        """Do one thing that comes after all actions. Return whether there was one."""
        return False

    def dispatch(self) -> None:
        before = self.scheduler.open_jobs
        self.note(self.scheduler.dispatch)
        assert self.scheduler.open_jobs <= max(self.scheduler.limit, before)
        for group in self.scheduler.groups.values():
            for job in group.waiting:
                for child in group.available if self.has_place(job) else ():
                    could = job.task_id not in child.jobs and not (job.isolated and child.jobs)
                    assert not could, "a job waits while a child could have it"
                if job.isolated:
                    # Those behind it wait until a child is free of others.
                    break

    def has_place(self, job: Job) -> bool:
        """Whether `job`, which waits, may begin if a child can have it."""
        return self.scheduler.open_jobs < self.scheduler.limit

    def perform(self, action: Action) -> None:
        if isinstance(action, Spawn):
            self.spawn(action.child)
        elif isinstance(action, (Probe, Measure)):
            self.look(action)
        elif isinstance(action, Write):
            self.write(action.child, action.job)
        elif isinstance(action, Resolve):
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
            self.scheduler.probed(child, 0 if boots else 10**9, self.now)
        else:
            # It grows with every job.
            self.scheduler.measured(child, child.jobs_done * BIG // 2, self.now)

    def spawn(self, child: Child) -> None:
        if self.failing_spawns:
            self.failing_spawns -= 1
            self.note(self.scheduler.spawn_failed, child, "no such program")
        else:
            self.processes.append(self.process_of(child))
            self.note(self.scheduler.spawned, child, 1000 + child.number)

    def process_of(self, child: Child) -> Process:
        """Make the process of `child`."""
        return Process(child)

    def write(self, child: Child, job: Job) -> None:
        if job.child is not child or job.state is not JobState.RESERVED:
            # As the supervisor: it was taken from the child since.
            return
        self.writes[job, child] += 1
        process = next((each for each in self.processes if each.child is child), None)
        assert process is not None, "the process is there"
        outcome, self.next_write = self.next_write, "written"
        if not process.stdout_open or process.killed:
            process.stdout_open = False
            self.note(self.scheduler.stdout_closed, child)
        elif outcome == "unwritten" or not process.stdin_open:
            # It may answer what it has read, all the same.
            process.stdin_open = False
            self.fail_to_write(process, job)
        elif outcome == "unsolicited" and not child.may_speak:
            self.note(self.scheduler.faulted, child, "it wrote too early")
        else:
            self.deliver(process, job)

    def fail_to_write(self, process: Process, job: Job) -> None:
        end = self.stop_reading(process, process.child.number % 4)
        self.note(self.scheduler.unwritten, process.child, "it closed its stdin", end)

    def deliver(self, process: Process, job: Job) -> None:
        child = process.child
        assert job.task_id not in process.asked, "a child has an id once at a time"
        assert len(process.asked) < child.capacity <= child.group.settings.max_in_flight
        assert job not in self.written_to, "no job is written twice"
        process.asked[job.task_id] = job
        process.offsets[job] = process.written
        self.note(self.scheduler.written, child, job, process.written)
        process.written += len(job.request or b"")
        self.written_to[job] = child

    def settle(self, action: Resolve) -> None:
        """Look at an outcome."""
        job = action.job
        if isinstance(action.outcome, Lost) and job.group == "fixed":
            unread = action.outcome.status is None
            # More than one, if a job of the same id has crashed a child of another group.
            assert bool(action.outcome.crashes) != unread

    # -- what jobs do

    @rule(
        pick=PICK,
        count=st.integers(1, 5),
        timeout=st.sampled_from([None, None, 1.0, 20.0]),
        soft_timeout=st.sampled_from([None, None, 0.5, 30.0]),
        turn=st.booleans(),
    )
    def submit(
        self,
        pick: int,
        count: int,
        timeout: float | None,
        soft_timeout: float | None,
        turn: bool,
    ) -> None:
        for number in range(count):
            group = self.groups[(pick + number) % len(self.groups)]
            self.submit_one(group, timeout, soft_timeout, pick + number)
        if turn:
            self.end_turn()

    def submit_one(
        self, group: str, timeout: float | None, soft_timeout: float | None, pick: int
    ) -> None:
        # Some messages are delivered again while their job goes on.
        task_id = str(len(self.jobs) // 2)
        job = Job(task_id, "task", group, timeout, soft_timeout)
        self.prepare(job, pick)
        self.jobs.append(job)
        self.by_thread(self.scheduler.submit, job)

    def prepare(self, job: Job, pick: int) -> None:
        """Give `job`, which is about to be submitted, what it needs."""
        job.request = REQUEST

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK, signum=st.sampled_from((signal.SIGTERM, signal.SIGUSR1)), turn=st.booleans())
    def terminate(self, pick: int, signum: int, turn: bool) -> None:
        recent = self.jobs[-6:]
        self.by_thread(self.scheduler.terminate, recent[pick % len(recent)], signum)
        if turn:
            self.end_turn()

    @rule()
    def flush(self) -> None:
        self.by_thread(self.scheduler.flush)

    @precondition(lambda self: self.scheduler.limit <= self.limit)
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
        groups = list(self.scheduler.groups.values())[fixed:][:1]
        self.by_thread(self.scheduler.restart, groups)
        if turn:
            self.end_turn()

    # -- what processes do

    def some_process(self, pick: int) -> Process:
        # Those that have a request are the interesting ones.
        asked = [process for process in self.processes if process.asked]
        choice = asked if asked and pick % 4 else self.processes
        return choice[pick // 4 % len(choice)]

    @precondition(lambda self: any(process.asked for process in self.processes))
    @rule(
        pick=PICK,
        with_id=st.booleans(),
        retire=st.sampled_from([None, None, None, True]),
        well=st.sampled_from([True, True, False]),
        turn=st.booleans(),
    )
    def reply(self, pick: int, with_id: bool, retire: bool | None, well: bool, turn: bool) -> None:
        if self.told_by_threads:
            self.end_turn()
        asked = [each for each in self.processes if each.asked and each.stdout_open]
        if not asked:
            return
        process = asked[pick % len(asked)]
        # In any order.
        task_id = list(process.asked)[pick // 7 % len(process.asked)]
        self.answer(process, task_id, with_id, retire, well)
        if turn:
            self.end_turn()

    def answer(
        self, process: Process, task_id: str, with_id: bool, retire: bool | None, well: bool
    ) -> None:
        job = process.asked.pop(task_id)
        named = with_id or process.child.capacity > 1
        reply = (Ok if well else Error)(id=task_id if named else None, retire=retire)
        awaited = job.state is JobState.SENT
        if process.child.state is ChildState.STOPPING:
            awaited = awaited and well and not self.scheduler.stopping
        self.by_process(self.scheduler.replied, process.child, reply)
        # A reply that came counts, for nobody else, and what is over is over.
        has_it = [each for each, answer in self.answered.items() if answer is reply]
        assert has_it == ([job] if awaited else [])

    @precondition(lambda self: any(process.asked for process in self.processes))
    @rule(pick=PICK, log=st.booleans(), turn=st.booleans())
    def tell(self, pick: int, log: bool, turn: bool) -> None:
        if self.told_by_threads:
            self.end_turn()
        telling = [
            (each.child, task_id)
            for each in self.processes
            for task_id in each.asked
            if each.stdout_open and Feature.LOG in each.child.features
        ]
        if not telling:
            return
        child, task_id = telling[pick % len(telling)]
        if log:
            self.by_process(self.scheduler.logged, child, Log(id=task_id, message="on my way"))
        else:
            self.by_process(self.scheduler.progressed, child, Progress(id=task_id))
        if turn:
            self.end_turn()

    @precondition(lambda self: any(process.boots for process in self.processes))
    @rule(
        pick=PICK,
        count=st.sampled_from([1, 9, 9]),
        well=st.sampled_from([True, True, True, False]),
        turn=st.booleans(),
    )
    def boot(self, pick: int, count: int, well: bool, turn: bool) -> None:
        if self.told_by_threads:
            self.end_turn()
        booting = [each for each in self.processes if each.boots and each.stdout_open]
        if not booting:
            return
        start = pick % len(booting)
        for process in booting[start : start + count]:
            process.boots = False
            child = process.child
            if well:
                self.by_process(self.scheduler.ready, child, greeting(child), 5000 + child.number)
            else:
                self.by_process(self.scheduler.boot_failed, child, "no such module\nat all")
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
        good = wrong == "no id" and process.asked and process.child.capacity == 1
        if wrong == "garbage" or process.boots or good:
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
    @rule(
        pick=PICK,
        status=st.sampled_from([0, 1, -11]),
        read=st.sampled_from([0, 0, 1, 2, 9]),
        answers=st.integers(0, 2),
        turn=st.booleans(),
    )
    def exit(self, pick: int, status: int, read: int, answers: int, turn: bool) -> None:
        if self.told_by_threads:
            self.end_turn()
        process = self.some_process(pick)
        for task_id in list(process.asked)[:answers] if process.stdout_open else ():
            # What it wrote is heard before its exit is seen.
            self.answer(process, task_id, True, None, True)
        self.exit_of(process, status, read)
        if turn:
            self.end_turn()

    def exit_of(self, process: Process, status: int, read: int = 9) -> None:
        """It exits, and has read the first `read` requests of those that it has not answered."""
        self.processes.remove(process)
        self.by_process(
            self.scheduler.exited, process.child, status, self.stop_reading(process, read)
        )

    def stop_reading(self, process: Process, read: int) -> int:
        """It reads no more than the first `read` requests of those that it has not answered. Return
        how many bytes it has read in all."""
        unread = list(process.asked.items())[read:]
        for task_id, job in unread:
            # The worker takes back what stands in the pipe still: it was never written.
            self.written_to.pop(job, None)
            del process.asked[task_id]
        if unread:
            process.written = process.offsets[unread[0][1]]
        return process.written

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
        assert all(count == 1 for count in self.ends.values())

    @invariant()
    def no_request_goes_twice_to_a_child(self) -> None:
        assert all(count == 1 for count in self.writes.values())

    @invariant()
    def open_jobs_are_those_that_are_accepted_and_not_finished(self) -> None:
        unfinished = [job for job in self.accepts if not self.is_over(job)]
        # What lost its child gives its place to others while it waits for the next.
        held = [job for job in unfinished if job.state is not JobState.QUEUED]
        assert self.scheduler.open_jobs == len(held)
        assert all(job.state in HELD for job in held)
        assert self.scheduler.idle == (
            not held and not any(group.waiting for group in self.scheduler.groups.values())
        )

    def is_over(self, job: Job) -> bool:
        return bool(self.ends[job])

    @invariant()
    def jobs_and_children_agree_on_who_has_whom(self) -> None:
        for group in self.scheduler.groups.values():
            children = list(group.children.values())
            jobs = [
                job
                for child in children
                for job in child.jobs.values()
                if job.state in (JobState.RESERVED, JobState.SENT)
            ]
            assert len(jobs) == len(set(jobs)), "no two children have one job"
            for child in children:
                serves = child.serves and child.slot.child is child and child.has_room
                assert serves == (child in group.available)
                assert child.serves == (bool(child.jobs) == (child.state is ChildState.BUSY)) or (
                    not child.serves
                )
                assert len(child.jobs) <= child.capacity
                if child.serves:
                    told = [job for job in child.jobs.values() if job.kill_at is not None]
                    assert child.pending_cancels == len(told)
                assert len(child.jobs) < 2 or not any(job.isolated for job in child.jobs.values())
                for job in child.jobs.values():
                    over = job.state in (JobState.ANSWERED, JobState.CLOSED)
                    assert job.child is (None if over else child)
                    # What is over and still there was cancelled, and will be no more.
                    assert not (over and child.serves) or job.kill_at is not None
            assert all(job.child is None for job in group.waiting)
            assert [job.number for job in group.waiting] == sorted(
                job.number for job in group.waiting
            )

    @invariant()
    def slots_and_children_agree_on_who_is_whose(self) -> None:
        if self.scheduler.stopping:
            return
        for group in self.scheduler.groups.values():
            for slot in group.slots if not group.on_demand else ():
                assert slot.child is not None or slot.spawn_at is not None, "somebody will come"
                assert slot.successor is None or (
                    slot.child is not None and slot.child.recycle_reason
                )
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
            # Apart from successors of children that get no more jobs, few boot at a time.
            early = [
                slot
                for slot in group.slots
                if slot.successor and slot.child and not slot.child.max_jobs_reached
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
            if not self.scheduler.stopping:
                found += [slot.spawn_at for slot in group.slots]
            found += [job.deadline for job in group.waiting if job.accepted]
            for child in group.children.values():
                found += [child.boot_deadline, child.stop_deadline]
                found += [child.startup_grace_until, child.max_age_at]
                for job in child.jobs.values() if child.state is ChildState.BUSY else ():
                    found += [job.deadline, job.soft_deadline, job.silence_deadline, job.kill_at]
        return [deadline for deadline in found if deadline is not None]

    # -- what must hold in the end

    def teardown(self) -> None:
        """Let all go well from now on, until nothing is left to happen."""
        self.failing_spawns, self.next_write = 0, "written"
        self.end_turn()
        self.come_to_rest()
        self.each_job_ends_at_most_once()
        self.no_request_goes_twice_to_a_child()
        assert self.scheduler.idle
        assert self.scheduler.open_jobs == 0
        assert [job for job in self.jobs if not self.ends[job]] == [], "each job ends"
        if not self.scheduler.stopping:
            self.all_children_are_idle()

    def come_to_rest(self) -> None:
        if self.scheduler.limit == 0:
            # With a limit of 0, no job would ever begin.
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

    def all_children_are_idle(self) -> None:
        for group in self.scheduler.groups.values():
            if group.on_demand:
                # Nobody has needed it.
                assert not group.children
                continue
            assert len(group.children) == len(group.slots), "each group is at full size"
            idle = [child for child in group.available if child.state is ChildState.IDLE]
            assert len(idle) == len(group.slots), "each child is idle"
            assert group.came_up
        assert not self.scheduler.booting
        for group in self.scheduler.groups.values():
            assert len(group.slots) == group.settings.size_for(self.scheduler.limit)

    def at_rest(self) -> bool:
        """Whether nothing is due but that children grow old."""
        ages = [
            child.max_age_at
            for group in self.scheduler.groups.values()
            for child in group.children.values()
            if child.max_age_at is not None and not child.recycle_reason
        ]
        return len(self.deadlines()) == len(ages) and not any(
            slot.successor or (slot.child and slot.child.recycle_reason)
            for group in self.scheduler.groups.values()
            for slot in group.slots
        )

    def at_work(self) -> bool:
        return any(each.killed or each.asked or each.boots for each in self.processes)

    def let_all_go_well(self) -> None:
        for process in [process for process in self.processes if process.killed]:
            for task_id in list(process.asked):
                # It was done when it was killed for another.
                self.answer(process, task_id, True, None, True)
            self.exit_of(process, -9)
        for process in [process for process in self.processes if process.stdout_open]:
            self.end_work(process)
            if process.boots:
                process.boots = False
                self.by_process(self.scheduler.ready, process.child, greeting(process.child), None)
        self.end_turn()

    def end_work(self, process: Process) -> None:
        """`process` answers all that it was asked."""
        for task_id in process.asked:
            self.by_process(self.scheduler.replied, process.child, Ok(id=task_id))
        process.asked.clear()


class ManyJobsWorld(World):
    """Only children that may have many jobs at a time."""

    groups = ("async", "async elastic")


for world in (World, ManyJobsWorld):
    world.TestCase.settings = settings(
        max_examples=400 if world is ManyJobsWorld else 150,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
TestScheduler = World.TestCase
TestManyJobs = ManyJobsWorld.TestCase
