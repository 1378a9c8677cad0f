"""The scheduler's decisions, event by event. The clock is a number, and no process is started."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from msgspec.structs import replace

from celery_subproc_pool.core.actions import (
    Accept,
    Action,
    CloseStdin,
    Finished,
    Forget,
    Interrupt,
    Kill,
    Overruled,
    Probe,
    Report,
    Resolve,
    SoftTimeout,
    Spawn,
    Stranded,
    Unkillable,
    Write,
)
from celery_subproc_pool.core.booting import EOF_GRACE, STARTUP_GRACE
from celery_subproc_pool.core.ending import HOLD
from celery_subproc_pool.core.exits import HELD
from celery_subproc_pool.core.model import (
    Cause,
    Child,
    ChildState,
    Group,
    Job,
    JobState,
)
from celery_subproc_pool.core.outcomes import (
    Answered,
    Dropped,
    Faulted,
    Lost,
    Terminated,
    TimedOut,
    describe_exit,
)
from celery_subproc_pool.core.scheduler import Scheduler
from celery_subproc_pool.core.spawning import BACKOFF_LAST
from celery_subproc_pool.core.states import CHILD_TRANSITIONS
from celery_subproc_pool.core.stopping import KILL_PATIENCE
from celery_subproc_pool.core.timers import LATE
from celery_subproc_pool.errors import TransitionError
from celery_subproc_pool.wire.messages import CancelReason, Ok, Progress, Ready
from tests.support.world import (
    BOOT,
    READ_ALL,
    READ_NOTHING,
    READY,
    STOP_TIMEOUT,
    World,
    child_of,
    ends,
    kills,
    kind,
    new_child,
    reports,
)

# -- states


@pytest.mark.parametrize("target", ChildState)
@pytest.mark.parametrize("source", ChildState)
def test_a_child_moves_as_the_table_says_and_no_other_way(
    source: ChildState, target: ChildState
) -> None:
    world = World(a=kind())
    child = Child(world.scheduler.groups["a"], world.slots()[0], 1)
    child.state = source
    if target in CHILD_TRANSITIONS[source]:
        child.move(target)
        assert child.state == target
    else:
        with pytest.raises(TransitionError, match=f"can't become {target.value}"):
            child.move(target)
        assert child.state is source


def test_every_state_is_in_the_table() -> None:
    assert set(CHILD_TRANSITIONS) == set(ChildState)
    assert CHILD_TRANSITIONS[ChildState.GONE] == frozenset()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "exitcode 0"),
        (3, "exitcode 3"),
        (-9, "signal 9 (SIGKILL)"),
        (-11, "signal 11 (SIGSEGV)"),
        (-99, "signal 99"),
    ],
)
def test_an_exit_status_in_words(status: int, text: str) -> None:
    assert describe_exit(status) == text


def test_jobs_and_children_tell_who_they_are() -> None:
    world = World(a=kind())
    job = world.submit()
    assert repr(job) == "<Job task.x[x] reserved>"
    assert repr(job.child) == "<Child a#0 pid 101 busy>"


# -- a job's normal life


def test_start_fills_every_slot() -> None:
    scheduler = Scheduler(
        {"a": Group("a", kind(2), 2), "b": Group("b", kind(1), 1)}, 10, lambda: 1.0
    )
    children = [action.child for action in scheduler.start(0.0) if isinstance(action, Spawn)]
    assert [(child.group.name, child.slot.number) for child in children] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
    ]
    assert [child.number for child in children] == [1, 2, 3]
    assert scheduler.spawned(children[0], 17, 0.0) == []
    assert (children[0].state, children[0].pid) == (ChildState.IDLE, 17)


def test_a_job_from_arrival_to_end() -> None:
    world = World(a=kind())
    scheduler = world.scheduler
    (child,) = world.children()
    job = Job("x", "task.x", "a")
    assert world.idle()

    assert world.note(scheduler.submit, job) == []
    assert not world.idle()
    world.now = 3.0
    assert world.turn() == [Accept(job, child, 3.0)]
    assert (job.state, child.state, scheduler.open_jobs) == (JobState.RESERVED, ChildState.BUSY, 1)

    assert world.tell(scheduler.provide, job, b"request") == [Write(child, job)]
    assert (job.state, job.request) == (JobState.SENT, b"request")

    reply = Ok(id="x", result=1)
    assert world.tell(scheduler.replied, child, reply) == [Resolve(job, Answered(reply), child)]
    assert (job.state, child.state, child.jobs_done) == (JobState.ANSWERED, ChildState.IDLE, 1)
    assert scheduler.open_jobs == 1
    assert not world.idle()

    assert world.tell(scheduler.finish, job) == [Finished(job)]
    assert (job.state, scheduler.open_jobs) == (JobState.CLOSED, 0)
    assert world.idle()


def test_a_child_takes_the_next_job_while_the_last_one_is_stored() -> None:
    world = World(a=kind())
    first, child = world.send("x")
    second = world.submit("y")
    assert world.tell(world.scheduler.replied, child, Ok(id="x"))[-1] == Accept(second, child, 0.0)
    assert world.tell(world.scheduler.finish, first) == [Finished(first)]
    assert second.child is child


def test_a_reply_without_an_id_is_trusted() -> None:
    world = World(a=kind())
    job, child = world.send()
    assert ends(world.tell(world.scheduler.replied, child, Ok())) == [
        Resolve(job, Answered(Ok()), child)
    ]


def test_the_warmest_child_serves_next() -> None:
    world = World(a=kind(3))
    first, second, third = world.children()
    one, two = world.send("x"), world.send("y")
    assert (one[1], two[1]) == (first, second)
    world.tell(world.scheduler.replied, first, Ok())
    world.tell(world.scheduler.replied, second, Ok())
    # Who has served last first, who has never served last: it may still be booting.
    assert [child_of(world.submit(name)) for name in "abc"] == [second, first, third]
    assert one[0].child is None


def test_a_replacement_serves_after_those_that_have_served() -> None:
    world = World(a=kind(2))
    (_, first), (_, second) = world.send("x"), world.send("y")
    world.tell(world.scheduler.replied, second, Ok())
    world.tell(world.scheduler.replied, first, Ok())
    world.tell(world.scheduler.exited, second, 1, READ_ALL)
    assert child_of(world.submit("z")) is first


def test_a_tracer_that_never_needs_the_child_gives_it_back() -> None:
    world = World(a=kind())
    job = world.submit()
    child = child_of(job)
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]
    assert (child.state, child.jobs, child.jobs_done) == (ChildState.IDLE, {}, 0)
    assert child_of(world.submit("y")) is child


def test_jobs_for_the_worker_itself_need_no_child() -> None:
    world = World(limit=2)
    job = Job("x", "celery.backend_cleanup", None, timeout=1.0)
    assert world.tell(world.scheduler.submit, job) == [Accept(job, None, 0.0)]
    assert world.tell(world.scheduler.provide, job, b"unused") == []
    assert world.at(100.0) == []
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]
    assert world.scheduler.open_jobs == 0


# -- order and limit


def test_jobs_are_accepted_in_order_of_arrival_across_groups() -> None:
    world = World(limit=10, a=kind(2), b=kind(2))
    jobs = [
        Job(str(number), "t", group) for number, group in enumerate(["b", None, "a", "b", None])
    ]
    for job in jobs:
        world.note(world.scheduler.submit, job)
    accepted = [action.job for action in world.turn() if isinstance(action, Accept)]
    assert accepted == jobs


def test_a_group_without_idle_children_does_not_hold_up_the_others() -> None:
    world = World(a=kind(1), b=kind(1))
    world.send("x", "a")
    waiting, served, local = (
        world.submit("y", "a"),
        world.submit("z", "b"),
        world.submit("l", None),
    )
    assert [job.state for job in (waiting, served, local)] == [
        JobState.QUEUED,
        JobState.RESERVED,
        JobState.RESERVED,
    ]


def test_the_limit_is_over_all_groups_together() -> None:
    world = World(limit=2, a=kind(2), b=kind(2))
    first, child = world.send("1", "a")
    world.send("2", "b")
    third, local = world.submit("3", "b"), world.submit("4", None)
    assert [job.accepted for job in (third, local)] == [False, False]

    # A reply frees the child; the job is open until its tracer is through.
    assert ends(world.tell(world.scheduler.replied, child, Ok())) == [
        Resolve(first, Answered(Ok()), child)
    ]
    assert [job.accepted for job in (third, local)] == [False, False]
    world.tell(world.scheduler.finish, first)
    assert [job.accepted for job in (third, local)] == [True, False]
    assert world.scheduler.open_jobs == 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_oldest_of_the_jobs_that_lost_their_children_is_served_first(
    order: tuple[int, int, int],
) -> None:
    world = World(a=kind(3))
    jobs = [world.submit(str(number)) for number in range(3)]
    for number in order:
        world.note(world.scheduler.exited, child_of(jobs[number]), 1, READ_ALL)
    assert list(world.scheduler.groups["a"].waiting) == jobs


# -- what a child does wrong


def test_a_wrong_id_costs_the_job_and_the_child() -> None:
    world = World(a=kind())
    job, child = world.send("x")
    actions = world.tell(world.scheduler.replied, child, Ok(id="other"))
    reason = "the reply's id is 'other', the request's 'x'"
    assert actions == [
        Resolve(job, Faulted(reason), child),
        Kill(child, signal.SIGKILL),
        Report(child, reason, (job,), 0.1),
    ]
    assert (job.state, child.state) == (JobState.ANSWERED, ChildState.STOPPING)
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]
    assert world.tell(world.scheduler.exited, child, -9, READ_ALL) == [Forget(child)]
    assert world.children() == []
    assert world.at(0.1) == [Spawn(world.children()[0])]


def test_garbage_costs_the_job_and_the_child() -> None:
    world = World(a=kind())
    job, child = world.send()
    actions = world.tell(world.scheduler.faulted, child, "not JSON")
    assert ends(actions) == [Resolve(job, Faulted("not JSON"), child)]
    assert kills(actions) == [signal.SIGKILL]


def test_garbage_from_an_idle_child_costs_the_child_alone() -> None:
    world = World(a=kind(2))
    child = world.children()[1]
    actions = world.tell(world.scheduler.faulted, child, "not JSON")
    assert actions == [Kill(child, signal.SIGKILL), Report(child, "not JSON", (), 0.1)]
    assert child_of(world.submit()) is world.children()[0]


def test_a_reply_that_nobody_asked_for_costs_the_child_before_it_gets_a_job() -> None:
    world = World(a=kind(2))
    child = world.children()[1]
    job = Job("x", "t", "a")
    world.note(world.scheduler.submit, job)
    actions = world.note(world.scheduler.replied, child, Ok(id="x"))
    assert kills(actions) == [signal.SIGKILL]
    assert reports(actions)[0].reason.startswith("a reply that nobody asked for: Ok(")
    assert world.turn() == [Accept(job, world.children()[0], 0.0)]


def test_an_unasked_reply_is_quoted_at_bounded_length() -> None:
    world = World(a=kind())
    (child,) = world.children()
    actions = world.tell(world.scheduler.replied, child, Ok(result="x" * 10_000))
    assert len(reports(actions)[0].reason) == 500


def test_two_replies_in_one_read_replace_the_child_before_it_gets_another_job() -> None:
    world = World(a=kind())
    job, child = world.send("x")
    waiting = world.submit("y")
    assert world.note(world.scheduler.replied, child, Ok(id="x")) == [
        Resolve(job, Answered(Ok(id="x")), child)
    ]
    actions = world.note(world.scheduler.replied, child, Ok(id="x"))
    assert kills(actions) == [signal.SIGKILL]
    assert ends(actions) == []
    # The child has done a job: its successor starts at once.
    (accepted,) = world.turn()
    assert accepted == Accept(waiting, new_child(actions), 0.0)
    assert job.state is JobState.ANSWERED


def test_a_reply_before_the_request_costs_the_child_and_spares_the_job() -> None:
    world = World(a=kind(2))
    job = world.submit()
    first = child_of(job)
    actions = world.tell(world.scheduler.replied, first, Ok(id="x"))
    assert ends(actions) == []
    assert not any(isinstance(action, Accept) for action in actions)
    assert child_of(job) is not first
    assert not first.jobs


def test_what_a_child_says_while_it_is_stopped_is_not_heard() -> None:
    world = World(a=kind())
    (child,) = world.children()
    world.tell(world.scheduler.faulted, child, "first")
    assert world.tell(world.scheduler.replied, child, Ok()) == []
    assert world.tell(world.scheduler.faulted, child, "second") == []
    assert world.tell(world.scheduler.stdout_closed, child) == []
    assert world.tell(world.scheduler.unwritten, child, "third", READ_NOTHING) == []
    assert child.reason == "first"


def test_a_child_that_is_gone_is_not_replaced_again() -> None:
    world = World(a=kind())
    (child,) = world.children()
    world.tell(world.scheduler.exited, child, 0, READ_ALL)
    assert world.tell(world.scheduler.faulted, child, "Report failed") == []


# -- exits


def test_an_exit_loses_the_job() -> None:
    world = World(a=kind())
    job, child = world.send()
    actions = world.tell(world.scheduler.exited, child, -11, READ_ALL)
    reason = "it exited: signal 11 (SIGSEGV)"
    assert actions == [
        Resolve(job, Lost(-11, ""), child),
        Report(child, reason, (job,), 0.1),
        Forget(child),
    ]
    assert (job.state, child.state) == (JobState.CLOSED, ChildState.GONE)
    assert world.scheduler.open_jobs == 0
    assert world.tell(world.scheduler.finish, job) == []


@pytest.mark.parametrize("closed_before", [False, True])
@pytest.mark.parametrize(("read", "spared"), [(11, False), (5, False), (4, True), (0, True)])
def test_an_exit_spares_the_job_whose_request_was_not_read(
    read: int, spared: bool, closed_before: bool
) -> None:
    world = World(a=kind(2))
    job, first = world.send()
    assert (job.request, job.offset) == (b"request", len(BOOT))
    if closed_before:
        world.tell(world.scheduler.stdout_closed, first)
    actions = world.tell(world.scheduler.exited, first, 1, read)
    if spared:
        assert ends(actions) == []
        assert actions[-1] == Write(world.children()[0], job)
        assert job.child is world.children()[0]
    else:
        assert [type(end.outcome) for end in ends(actions) if isinstance(end, Resolve)] == [Lost]
    assert world.scheduler.open_jobs == int(spared)


def test_an_unread_request_is_lost_all_the_same_once_the_worker_stops() -> None:
    world = World(a=kind(2))
    job, child = world.send()
    world.tell(world.scheduler.stop)
    actions = world.tell(world.scheduler.exited, child, -9, READ_NOTHING)
    assert ends(actions) == [Resolve(job, Lost(-9, "the worker stops"), child)]


def test_unread_bytes_of_a_job_that_is_answered_do_not_bring_it_back() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.replied, child, Ok())
    assert ends(world.tell(world.scheduler.exited, child, 0, READ_ALL)) == []
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]


def test_an_idle_child_that_exits_is_replaced() -> None:
    world = World(a=kind())
    (child,) = world.children()
    assert world.tell(world.scheduler.exited, child, 0, READ_ALL) == [
        Report(child, "it exited: exitcode 0", (), 0.1),
        Forget(child),
    ]


def test_a_job_that_is_only_reserved_goes_to_another_child_and_is_accepted_once() -> None:
    world = World(a=kind(2))
    job = world.submit()
    first = child_of(job)
    actions = world.tell(world.scheduler.exited, first, 1, READ_ALL)
    assert ends(actions) == []
    assert not any(isinstance(action, Accept) for action in actions)
    second = child_of(job)
    assert second is not first
    assert world.scheduler.open_jobs == 1
    assert world.tell(world.scheduler.provide, job, b"request") == [Write(second, job)]


def test_a_request_that_comes_while_its_job_waits_again_is_written_to_the_next_child() -> None:
    world = World(a=kind(1))
    job = world.submit()
    world.tell(world.scheduler.exited, child_of(job), 1, READ_ALL)
    assert job.state is JobState.QUEUED
    assert not world.idle()
    assert world.tell(world.scheduler.provide, job, b"request") == []
    actions = world.at(0.1)
    assert actions == [Spawn(child_of(job)), Write(child_of(job), job)]


def test_a_tracer_that_ends_while_its_job_waits_again() -> None:
    world = World(a=kind(1))
    job = world.submit()
    world.tell(world.scheduler.exited, child_of(job), 1, READ_ALL)
    assert world.scheduler.open_jobs == 0
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]
    assert world.scheduler.open_jobs == 0
    assert world.idle()
    assert len(world.at(0.1)) == 1


def test_eof_then_exit_loses_the_job_with_the_status() -> None:
    world = World(a=kind())
    job, child = world.send()
    actions = world.tell(world.scheduler.stdout_closed, child)
    assert actions == [Report(child, "it closed its stdout", (job,), 0.1)]
    world.now = 0.05
    actions = world.tell(world.scheduler.exited, child, 3, READ_ALL)
    assert ends(actions) == [Resolve(job, Lost(3, "it closed its stdout"), child)]
    assert actions[-1] == Forget(child)
    assert kills(world.at(1000.0)) == []


def test_eof_without_exit_is_killed_after_a_grace() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.stdout_closed, child)
    assert kills(world.at(EOF_GRACE - 0.01)) == []
    assert world.at(EOF_GRACE) == [Kill(child, signal.SIGKILL)]
    assert ends(world.at(EOF_GRACE + KILL_PATIENCE - 0.01)) == []
    actions = world.tell(world.scheduler.exited, child, -9, READ_ALL)
    assert ends(actions) == [Resolve(job, Lost(-9, "it closed its stdout"), child)]


def test_eof_of_an_idle_child_is_escalated_slowly() -> None:
    world = World(a=kind())
    (child,) = world.children()
    assert kills(world.tell(world.scheduler.stdout_closed, child)) == []
    assert kills(world.at(STOP_TIMEOUT - 0.01)) == []
    assert kills(world.at(STOP_TIMEOUT)) == [signal.SIGTERM]
    assert kills(world.at(2 * STOP_TIMEOUT)) == [signal.SIGKILL]


@pytest.mark.parametrize("event", ["unwritten", "faulted"])
def test_a_request_of_which_no_byte_was_written_goes_to_another_child(event: str) -> None:
    world = World(a=kind(2))
    world.writes = event
    job = world.submit()
    first = child_of(job)
    actions = world.note(world.scheduler.provide, job, b"request")
    world.writes = "written"
    actions += world.turn()
    assert ends(actions) == []
    assert reports(actions) == [Report(first, "third", (job,), 0.1)]
    second = child_of(job)
    assert second is not first
    assert actions[-1] == Write(second, job)
    assert kills(actions) == ([signal.SIGKILL] if event == "faulted" else [])
    assert ends(world.tell(world.scheduler.exited, first, 0, READ_ALL)) == []
    assert ends(world.tell(world.scheduler.replied, second, Ok(id="x"))) == [
        Resolve(job, Answered(Ok(id="x")), second)
    ]


def test_a_job_that_is_terminated_before_its_request_was_written_spares_the_child() -> None:
    world = World(a=kind())
    job = world.submit()
    child = child_of(job)
    # What it asks for has not been done yet.
    assert world.scheduler.provide(job, b"request", world.now) == [Write(child, job)]
    actions = world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert actions == [Resolve(job, Terminated(signal.SIGTERM), child)]
    assert (job.state, job.child, child.state) == (JobState.CLOSED, None, ChildState.IDLE)


# -- time limits and termination


def test_a_hard_limit_before_the_request_spares_the_child() -> None:
    world = World(a=kind())
    job = world.submit(timeout=5.0)
    child = child_of(job)
    assert world.at(4.9) == []
    assert world.at(5.0) == [Resolve(job, TimedOut(5.0), child)]
    assert child.state is ChildState.IDLE
    assert world.scheduler.open_jobs == 0
    assert world.tell(world.scheduler.provide, job, b"late") == []
    assert world.tell(world.scheduler.finish, job) == []


NO_ANSWER = (
    "its job took longer than 5 s (hard time limit); it has never answered: does it flush its"
    " stdout after each reply?"
)


def test_a_hard_limit_costs_the_child_that_has_the_request() -> None:
    world = World(a=kind())
    job, child = world.send(timeout=5.0)
    actions = world.at(5.0)
    assert actions == [
        Resolve(job, TimedOut(5.0), child),
        Kill(child, signal.SIGKILL),
        Report(child, NO_ANSWER, (job,), 0.0),
        Spawn(new_child(actions)),
    ]
    assert ends(world.tell(world.scheduler.exited, child, -9, READ_ALL)) == []


def test_at_the_hard_limit_a_child_may_have_a_moment_to_clean_up() -> None:
    world = World(a=kind(kill_grace=2.0))
    job, child = world.send(timeout=5.0)
    actions = world.at(5.0)
    assert actions == [
        Resolve(job, TimedOut(5.0), child),
        Kill(child, signal.SIGTERM),
        Report(child, NO_ANSWER, (job,), 0.0),
        Spawn(new_child(actions)),
    ]
    # Nobody waits for that.
    assert world.submit("next").child is new_child(actions)
    assert world.at(6.9) == []
    assert world.at(7.0) == [Kill(child, signal.SIGKILL)]
    assert world.tell(world.scheduler.exited, child, -9, READ_ALL) == [Forget(child)]
    assert world.at(100.0) == []


def test_a_child_that_has_cleaned_up_in_its_moment_is_not_killed() -> None:
    world = World(a=kind(kill_grace=2.0))
    _, child = world.send(timeout=5.0)
    world.at(5.0)
    assert world.tell(world.scheduler.exited, child, 0, READ_ALL) == [Forget(child)]
    assert world.at(100.0) == []


def test_a_child_that_goes_on_with_what_it_was_told_to_end_has_a_moment_too() -> None:
    world = world_of_many(1, 4, cancel_grace=3.0, kill_grace=2.0)
    _, child = world.send("runs", timeout=5.0)
    assert kills(world.at(5.0)) == []
    assert kills(world.at(8.0)) == [signal.SIGTERM]
    assert child.state is ChildState.STOPPING
    assert kills(world.at(10.0)) == [signal.SIGKILL]


def test_a_child_that_has_answered_before_flushes_its_stdout() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.replied, child, Ok())
    world.tell(world.scheduler.finish, job)
    world.send("y", timeout=5.0)
    [report] = reports(world.at(5.0))
    assert report.reason == "its job took longer than 5 s (hard time limit)"


def test_a_limit_of_a_job_that_was_answered_is_off() -> None:
    world = World(a=kind())
    job, child = world.send(timeout=5.0, soft_timeout=4.0)
    world.tell(world.scheduler.replied, child, Ok())
    assert world.at(5.0) == []
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]


def test_a_reply_in_the_turn_of_the_limit_wins() -> None:
    world = World(a=kind())
    job, child = world.send(timeout=5.0)
    world.now = 5.0
    assert world.tell(world.scheduler.replied, child, Ok()) == [Resolve(job, Answered(Ok()), child)]


def test_a_reply_after_the_limit_is_not_heard() -> None:
    world = World(a=kind())
    job, child = world.send(timeout=5.0)
    assert ends(world.at(5.0)) == [Resolve(job, TimedOut(5.0), child)]
    assert world.tell(world.scheduler.replied, child, Ok()) == []


@pytest.mark.parametrize("told", [True, False])
def test_a_soft_limit_signals_the_child_if_it_can_be_told(told: bool) -> None:
    world = World(a=kind(soft_timeout_signal="SIGUSR1" if told else None))
    job, child = world.send(timeout=5.0, soft_timeout=2.0)
    signum = signal.SIGUSR1 if told else None
    assert world.at(1.9) == []
    assert world.at(2.0) == [SoftTimeout(job, child, signum)]
    assert world.at(4.9) == []
    assert ends(world.at(5.0)) == [Resolve(job, TimedOut(5.0), child)]


def test_a_soft_limit_alone_is_told_once() -> None:
    world = World(a=kind(soft_timeout_signal="SIGUSR1"))
    job, child = world.send(soft_timeout=2.0)
    assert world.at(3.0) == [SoftTimeout(job, child, signal.SIGUSR1)]
    assert world.at(1000.0) == []
    assert world.scheduler.next_deadline is None


def test_a_soft_limit_before_the_request_signals_nobody() -> None:
    world = World(a=kind(soft_timeout_signal="SIGUSR1"))
    job = world.submit(soft_timeout=2.0)
    assert world.at(2.0) == [SoftTimeout(job, child_of(job), None)]


def test_both_limits_at_once_are_the_hard_one() -> None:
    world = World(a=kind())
    job, child = world.send(timeout=2.0, soft_timeout=2.0)
    actions = world.at(3.0)
    assert actions[0] == Resolve(job, TimedOut(2.0), child)
    assert not any(isinstance(action, SoftTimeout) for action in actions)


def test_the_limits_count_from_acceptance() -> None:
    world = World(a=kind())
    world.send("x")
    waiting = world.submit("y", timeout=5.0)
    assert world.at(100.0) == []
    world.tell(world.scheduler.replied, world.children()[0], Ok())
    assert waiting.deadline == 105.0


def test_terminating_a_job_that_waits_drops_it_from_the_queue() -> None:
    world = World(a=kind())
    world.send("x")
    job = world.submit("y")
    assert world.tell(world.scheduler.terminate, job, 15) == [Resolve(job, Terminated(15), None)]
    assert world.scheduler.open_jobs == 1
    assert not world.scheduler.groups["a"].waiting


def test_terminating_a_job_that_waits_again() -> None:
    world = World(a=kind())
    job = world.submit()
    world.tell(world.scheduler.exited, child_of(job), 1, READ_ALL)
    assert world.tell(world.scheduler.terminate, job, 15) == [Resolve(job, Terminated(15), None)]
    assert world.scheduler.open_jobs == 0
    assert world.tell(world.scheduler.provide, job, b"late") == []
    assert world.tell(world.scheduler.finish, job) == []


def test_terminating_a_job_before_its_request_spares_the_child() -> None:
    world = World(a=kind())
    job = world.submit()
    child = child_of(job)
    assert world.tell(world.scheduler.terminate, job, 15) == [Resolve(job, Terminated(15), child)]
    assert child.state is ChildState.IDLE
    assert world.tell(world.scheduler.provide, job, b"late") == []
    assert world.tell(world.scheduler.finish, job) == []


def test_terminating_a_job_signals_and_replaces_the_child_that_has_the_request() -> None:
    world = World(a=kind())
    job, child = world.send()
    actions = world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert actions == [
        Resolve(job, Terminated(signal.SIGTERM), child),
        Kill(child, signal.SIGTERM),
        Report(child, "its job was terminated", (job,), 0.0),
        Spawn(new_child(actions)),
    ]
    assert world.at(STOP_TIMEOUT - 0.1) == []
    assert world.at(STOP_TIMEOUT) == [Kill(child, signal.SIGKILL)]
    assert world.tell(world.scheduler.exited, child, -9, READ_ALL) == [Forget(child)]


def world_of_soft_signals(**settings: Any) -> World:
    return World(a=kind(soft_timeout_signal="SIGUSR1", **settings))


def test_revoking_by_the_signal_of_soft_limits_spares_a_child_that_answers() -> None:
    world = world_of_soft_signals()
    job, child = world.send()
    actions = world.tell(world.scheduler.terminate, job, signal.SIGUSR1)
    assert actions == [
        Resolve(job, Terminated(signal.SIGUSR1), child),
        Interrupt(child, signal.SIGUSR1),
    ]
    # It has that to end first.
    waiting = world.submit("waits")
    assert (waiting.state, world.scheduler.open_jobs) == (JobState.QUEUED, 0)
    world.now = STOP_TIMEOUT - 0.1
    actions = world.tell(world.scheduler.replied, child, Ok())
    assert actions == [Overruled(job), Accept(waiting, child, world.now)]
    assert world.at(100.0) == []


def test_revoking_by_the_signal_of_soft_limits_costs_a_child_that_goes_on_its_life() -> None:
    world = world_of_soft_signals(kill_grace=1.0)
    job, child = world.send()
    world.tell(world.scheduler.terminate, job, signal.SIGUSR1)
    assert world.at(STOP_TIMEOUT - 0.1) == []
    actions = world.at(STOP_TIMEOUT)
    reason = "it went on with task.x[x] for 10 s after it was sent SIGUSR1 (revoked)"
    assert actions == [
        Kill(child, signal.SIGTERM),
        Report(child, reason, (job,), 0.0),
        Spawn(new_child(actions)),
    ]
    assert world.scheduler.groups["a"].counters.replaced == {Cause.TERMINATED: 1}
    actions = world.tell(world.scheduler.exited, child, -15, READ_ALL)
    assert actions == [Overruled(job), Forget(child)]


def test_a_child_that_dies_of_the_signal_of_soft_limits_is_not_to_blame() -> None:
    world = world_of_soft_signals()
    job, child = world.send()
    world.tell(world.scheduler.terminate, job, signal.SIGUSR1)
    [report] = reports(world.tell(world.scheduler.exited, child, -signal.SIGUSR1, READ_ALL))
    assert (report.reason, report.delay) == ("it exited: signal 10 (SIGUSR1)", 0.0)
    assert world.scheduler.groups["a"].counters.replaced == {Cause.TERMINATED: 1}


def test_another_signal_costs_a_child_its_life_at_once() -> None:
    world = world_of_soft_signals()
    job, child = world.send()
    actions = world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert kills(actions) == [signal.SIGTERM]
    assert child.state is ChildState.STOPPING


def test_a_child_that_has_to_end_a_revoked_job_has_its_time_in_a_stop_too() -> None:
    world = world_of_soft_signals()
    job, child = world.send()
    world.tell(world.scheduler.terminate, job, signal.SIGUSR1)
    world.now = 1.0
    assert world.tell(world.scheduler.stop) == [CloseStdin(child)]
    assert world.at(STOP_TIMEOUT - 0.1) == []
    assert world.at(STOP_TIMEOUT) == [Kill(child, signal.SIGKILL)]


def test_terminating_an_answered_or_closed_job_does_nothing() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.replied, child, Ok())
    assert world.tell(world.scheduler.terminate, job, 15) == []
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]
    assert world.tell(world.scheduler.terminate, job, 15) == []


def test_terminating_a_job_of_the_worker_itself_settles_it() -> None:
    world = World()
    job = world.submit("x", None)
    assert world.tell(world.scheduler.terminate, job, 15) == [Resolve(job, Terminated(15), None)]
    assert world.tell(world.scheduler.finish, job) == []
    assert world.scheduler.open_jobs == 0


def test_terminating_a_job_whose_child_closed_its_stdout() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.stdout_closed, child)
    actions = world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert ends(actions) == [Resolve(job, Terminated(signal.SIGTERM), child)]
    assert reports(actions) == []
    assert signal.SIGKILL in kills(actions) + kills(world.at(STOP_TIMEOUT))
    assert ends(world.tell(world.scheduler.exited, child, -9, READ_ALL)) == []
    assert world.scheduler.open_jobs == 0


# -- backoff


def failing_delays(world: World, count: int) -> list[float]:
    delays = []
    for _ in range(count):
        (child,) = world.children()
        (report,) = reports(world.tell(world.scheduler.exited, child, 1, READ_ALL))
        delays.append(report.delay)
        assert world.children() == []
        assert world.at(world.now + report.delay * 0.99) == []
        world.at(world.now + report.delay * 0.02)
    return delays


def test_backoff_doubles_up_to_its_end() -> None:
    delays = failing_delays(World(a=kind()), 30)
    assert delays[:5] == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert delays[9:] == [BACKOFF_LAST] * 21


def test_backoff_has_jitter_of_up_to_a_half() -> None:
    numbers = iter([0.0, 0.5, 1.0])
    delays = failing_delays(World(a=kind(), random=lambda: next(numbers)), 3)
    assert delays == pytest.approx([0.05, 0.15, 0.4])


def test_backoff_begins_again_after_a_job_that_went_well() -> None:
    world = World(a=kind())
    failing_delays(world, 3)
    job, child = world.send()
    assert world.slots()[0].failures == 3
    world.tell(world.scheduler.replied, child, Ok())
    assert world.slots()[0].failures == 0
    world.tell(world.scheduler.finish, job)
    # It did a job: no backoff. The next one did not.
    assert reports(world.tell(world.scheduler.exited, child, 1, READ_ALL))[0].delay == 0.0
    assert failing_delays(world, 2) == [0.1, 0.2]


def test_a_child_that_did_a_job_is_replaced_at_once() -> None:
    world = World(a=kind())
    _, child = world.send("x")
    world.tell(world.scheduler.replied, child, Ok())
    actions = world.tell(world.scheduler.faulted, child, "garbage")
    assert actions == [
        Kill(child, signal.SIGKILL),
        Report(child, "garbage", (), 0.0),
        Spawn(new_child(actions)),
    ]
    assert new_child(actions).slot is child.slot


def test_slots_cool_down_each_for_itself() -> None:
    world = World(a=kind(2))
    first, second = world.children()
    world.tell(world.scheduler.exited, first, 1, READ_ALL)
    world.at(0.05)
    world.tell(world.scheduler.exited, second, 1, READ_ALL)
    assert new_child(world.at(0.1)).slot is first.slot
    assert new_child(world.at(0.2)).slot is second.slot


def test_a_spawn_that_fails_is_tried_again_later() -> None:
    world = World(a=kind())
    (child,) = world.children()
    world.spawns_fail = True
    world.tell(world.scheduler.exited, child, 1, READ_ALL)
    actions = world.at(0.1)
    failed = new_child(actions)
    assert actions == [Spawn(failed), Report(failed, "no such program", (), 0.2)]
    assert failed.state is ChildState.GONE
    assert world.children() == []
    world.spawns_fail = False
    assert world.at(0.2) == []
    assert new_child(world.at(0.31)).state is ChildState.IDLE


# -- the end


def test_close_and_flush_drop_only_what_was_not_accepted() -> None:
    world = World(limit=2, a=kind(1), b=kind(1))
    again = world.submit("again", "a")
    world.tell(world.scheduler.exited, child_of(again), 1, READ_ALL)
    waiting, other = world.submit("waiting", "a"), world.submit("other", "b")
    local, late = world.submit("local", None), world.submit("late", None)
    assert (again.state, waiting.state) == (JobState.QUEUED, JobState.QUEUED)
    assert [job.accepted for job in (other, local, late)] == [True, True, False]

    assert world.scheduler.flush() == [
        Resolve(late, Dropped(), None),
        Resolve(waiting, Dropped(), None),
    ]
    assert late.state is JobState.CLOSED
    assert list(world.scheduler.groups["a"].waiting) == [again]
    assert world.scheduler.flush() == []


def test_after_a_flush_jobs_are_taken_and_after_a_close_they_are_dropped() -> None:
    world = World(limit=1, a=kind())
    job, child = world.send("x")
    world.scheduler.flush()
    waiting = world.submit("y")
    assert waiting.state is JobState.QUEUED
    assert world.scheduler.close(world.now) == [Resolve(waiting, Dropped(), None)]

    late = Job("z", "t", "a")
    assert world.tell(world.scheduler.submit, late) == [Resolve(late, Dropped(), None)]
    assert late.state is JobState.CLOSED

    # What was accepted comes to its end.
    world.tell(world.scheduler.replied, child, Ok())
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]
    assert world.idle()


def test_an_idle_child_is_stopped_gently_then_less_gently() -> None:
    world = World(a=kind())
    (child,) = world.children()
    assert world.tell(world.scheduler.stop) == [CloseStdin(child)]
    assert world.at(STOP_TIMEOUT - 0.1) == []
    assert world.at(STOP_TIMEOUT) == [Kill(child, signal.SIGTERM)]
    assert world.at(2 * STOP_TIMEOUT - 0.1) == []
    assert world.at(2 * STOP_TIMEOUT) == [Kill(child, signal.SIGKILL)]
    assert world.tell(world.scheduler.exited, child, -9, READ_ALL) == [Forget(child)]
    assert world.at(1000.0) == []
    assert world.children() == []


# -- a stop, and jobs that have lost their children


def world_of_broken_boots(size: int = 1) -> tuple[World, Job]:
    """A job that has lost its child, and children that can't boot any more."""
    world = World(a=kind(size, handshake=True))
    for child in world.children():
        world.tell(world.scheduler.ready, child, READY, None)
    job, _ = world.send()
    while job.child is not None:
        world.tell(world.scheduler.exited, job.child, -9, READ_NOTHING)
    for child in world.children():
        fail(world, child)
    assert (job.state, job.accepted) == (JobState.QUEUED, True)
    return world, job


def fail(world: World, child: Child) -> list[Action]:
    actions = world.tell(world.scheduler.boot_failed, child, "no licence\nor none that counts")
    return actions + world.tell(world.scheduler.exited, child, 1, READ_NOTHING)


WHY = "no child of the group a can start: no licence"
STRANDED = Lost(None, f"the worker stops, and {WHY}", stranded=True)


def test_a_stop_gives_up_jobs_that_no_child_can_have_after_one_more_try() -> None:
    world, job = world_of_broken_boots()
    # The next try is at once, whenever it would have been.
    child = new_child(world.tell(world.scheduler.close))
    assert job.state is JobState.QUEUED
    actions = fail(world, child)
    assert [action for action in actions if isinstance(action, (Stranded, Resolve))] == [
        Stranded(world.scheduler.groups["a"], WHY, (job,)),
        Resolve(job, STRANDED, None),
    ]
    assert world.idle()


def test_a_stop_waits_for_a_child_that_boots_and_does_what_has_lost_its_own() -> None:
    world, job = world_of_broken_boots()
    child = new_child(world.tell(world.scheduler.close))
    assert ends(world.at(50.0)) == []
    world.tell(world.scheduler.ready, child, READY, None)
    assert job.child is child


def test_a_stop_gives_up_jobs_whose_children_say_that_they_are_ready_and_die() -> None:
    world, job = world_of_broken_boots()
    child = new_child(world.tell(world.scheduler.close))
    world.tell(world.scheduler.ready, child, READY, None)
    assert job.child is child
    actions = world.tell(world.scheduler.exited, child, 3, READ_NOTHING)
    reason = "no child of the group a can start: it exited: exitcode 3"
    assert ends(actions) == [
        Resolve(job, replace(STRANDED, reason=f"the worker stops, and {reason}"), None)
    ]


def test_a_stop_gives_up_when_all_places_of_a_group_have_been_tried() -> None:
    world, job = world_of_broken_boots(2)
    world.tell(world.scheduler.close)
    first, second = world.children()
    assert ends(fail(world, first)) == []
    assert ends(fail(world, second)) == [Resolve(job, STRANDED, None)]


def test_a_stop_gives_up_jobs_of_a_pool_of_nobody() -> None:
    world, job = world_of_broken_boots()
    world.tell(world.scheduler.shrink, world.scheduler.limit)
    [end] = ends(world.tell(world.scheduler.close))
    assert end == Resolve(
        job,
        replace(
            STRANDED,
            reason="the worker stops, and no child of the group a can start, for it has none",
        ),
        None,
    )


# -- children that can't be killed


def test_a_child_that_may_not_be_killed_is_waited_for_no_more() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.stdout_closed, child)
    assert kills(world.at(EOF_GRACE)) == [signal.SIGKILL]
    lost = Lost(None, "its child can't be killed: it runs as root")
    assert world.tell(world.scheduler.unkillable, child, "it runs as root") == [
        Unkillable(child, "it runs as root", (job,)),
        CloseStdin(child),
        Resolve(job, lost, child),
    ]
    assert (child.state, child.jobs) == (ChildState.STOPPING, {})
    # Once is enough.
    assert world.tell(world.scheduler.unkillable, child, "it runs as root") == []
    assert kills(world.at(100.0)) == []
    assert world.tell(world.scheduler.stop) == [CloseStdin(world.slots()[0].child)]
    # If it exits one day, it is gone.
    assert world.tell(world.scheduler.exited, child, 0, READ_ALL) == [Forget(child)]


def test_a_child_that_does_not_exit_after_sigkill_is_waited_for_no_more() -> None:
    world = World(a=kind())
    job, child = world.send(timeout=5.0)
    assert kills(world.at(5.0)) == [signal.SIGKILL]
    assert world.at(5.0 + KILL_PATIENCE - 0.1) == []
    assert world.at(5.0 + KILL_PATIENCE) == [Unkillable(child, HELD, (job,)), CloseStdin(child)]
    assert world.at(100.0) == []


def test_a_child_that_never_booted_and_cannot_be_killed_does_not_keep_the_start_waiting() -> None:
    world = World(a=kind(handshake=True, start_timeout=3.0))
    (child,) = world.children()
    assert kills(world.at(3.0)) == [signal.SIGKILL]
    assert world.scheduler.booting
    world.tell(world.scheduler.unkillable, child, "it runs as root")
    assert not world.scheduler.booting


def test_stop_kills_what_is_busy_and_spawns_nothing() -> None:
    world = World(a=kind(3))
    job, busy = world.send()
    gone, idle = (child for child in world.children() if child is not busy)
    world.tell(world.scheduler.faulted, gone, "garbage")
    actions = world.tell(world.scheduler.stop)
    assert actions == [
        Kill(busy, signal.SIGKILL),
        Report(busy, "the worker stops", (job,), 0.1),
        CloseStdin(idle),
    ]
    assert ends(world.tell(world.scheduler.exited, busy, -9, READ_ALL)) == [
        Resolve(job, Lost(-9, "the worker stops"), busy)
    ]
    assert world.tell(world.scheduler.exited, idle, 0, READ_ALL) == [Forget(idle)]
    assert world.tell(world.scheduler.exited, gone, -9, READ_ALL) == [Forget(gone)]
    assert world.at(1000.0) == []
    assert world.tell(world.scheduler.stop) == []


def test_a_child_that_was_starting_when_the_worker_stopped_is_stopped_too() -> None:
    world = World(a=kind())
    (old,) = world.children()
    world.tell(world.scheduler.exited, old, 1, READ_ALL)
    world.now = 0.1
    (spawn,) = world.scheduler.tick(world.now)
    assert isinstance(spawn, Spawn)
    world.note(world.scheduler.stop)
    # The stop came before the process did: only now it has a stdin to close.
    assert CloseStdin(spawn.child) in world.tell(world.scheduler.spawned, spawn.child, 17)
    assert spawn.child.state is ChildState.STOPPING
    assert kills(world.at(0.1 + STOP_TIMEOUT)) == [signal.SIGTERM]
    assert world.tell(world.scheduler.exited, spawn.child, -15, READ_ALL) == [Forget(spawn.child)]


def test_a_child_that_could_not_start_when_the_worker_stopped_is_gone() -> None:
    world = World(a=kind())
    (old,) = world.children()
    world.tell(world.scheduler.exited, old, 1, READ_ALL)
    world.now = 0.1
    (spawn,) = world.scheduler.tick(world.now)
    assert isinstance(spawn, Spawn)
    world.note(world.scheduler.stop)
    world.note(world.scheduler.spawn_failed, spawn.child, "no such program")
    assert world.children() == []
    assert world.at(1000.0) == []


def test_a_child_that_starts_after_the_order_to_kill_all_is_stopped() -> None:
    scheduler = Scheduler({"a": Group("a", kind(), 1)}, 1)
    child = new_child(scheduler.start(0.0))
    # As `Supervisor.kill_all` does, which may interrupt a turn.
    scheduler.abandon()
    assert scheduler.spawned(child, 17, 0.0) == [CloseStdin(child)]


# -- size


def test_grow_adds_to_the_limit_and_to_groups_without_a_size() -> None:
    world = World(limit=2, a=kind(None), b=kind(1))
    actions = world.tell(world.scheduler.grow, 2)
    assert world.scheduler.limit == 4
    assert [slot.number for slot in world.slots("a")] == [0, 1, 2, 3]
    assert len(world.children("a")) == 4
    assert len(world.children("b")) == 1
    assert len(actions) == 2


def test_grow_serves_a_job_that_waits_for_the_limit() -> None:
    world = World(limit=1, a=kind(None))
    world.send("x")
    waiting = world.submit("y")
    actions = world.tell(world.scheduler.grow, 1)
    assert actions == [Spawn(child_of(waiting)), Accept(waiting, child_of(waiting), 0.0)]


def test_shrink_takes_the_last_children_that_are_not_busy() -> None:
    world = World(limit=3, a=kind(None), b=kind(1))
    first, second, third = world.children("a")
    job, busy = world.send()
    assert busy is first
    world.scheduler.check_shrink(1)
    assert world.tell(world.scheduler.shrink, 1) == [CloseStdin(third)]
    assert world.scheduler.limit == 2
    assert world.tell(world.scheduler.exited, third, 0, READ_ALL) == [Forget(third)]
    assert world.children("a") == [first, second]
    assert world.at(1000.0) == []
    assert job.child is busy
    assert len(world.children("b")) == 1


def test_shrink_takes_a_slot_that_cools_down() -> None:
    world = World(limit=2, a=kind(None))
    first, second = world.children()
    world.tell(world.scheduler.exited, second, 1, READ_ALL)
    world.scheduler.check_shrink(1)
    assert world.tell(world.scheduler.shrink, 1) == []
    assert world.at(1000.0) == []
    assert world.children() == [first]


@pytest.mark.parametrize(("count", "refused"), [(1, False), (2, True), (3, True), (4, True)])
def test_shrink_is_refused_if_too_few_children_would_do(count: int, refused: bool) -> None:
    world = World(limit=3, a=kind(None))
    world.send("x")
    world.send("y")
    if refused:
        with pytest.raises(ValueError, match=r"Can't shrink pool\. All processes busy!"):
            world.scheduler.check_shrink(count)
    else:
        world.scheduler.check_shrink(count)


def test_shrink_may_take_the_last_one() -> None:
    world = World(limit=2, a=kind(None), b=kind(1))
    world.scheduler.check_shrink(2)
    world.tell(world.scheduler.shrink, 2)
    job = world.submit()
    assert job.state is JobState.QUEUED
    with pytest.raises(ValueError, match="Can't shrink pool"):
        world.scheduler.check_shrink(1)
    world.tell(world.scheduler.grow, 1)
    assert job.state is JobState.RESERVED


def test_shrink_by_nothing_takes_nothing() -> None:
    world = World(limit=3, a=kind(None))
    assert world.tell(world.scheduler.shrink, 0) == []
    assert world.scheduler.limit == 3
    assert len(world.slots()) == 3


def test_shrink_of_a_child_that_is_still_starting() -> None:
    world = World(limit=1, a=kind(None))
    (spawn,) = world.scheduler.grow(1, world.now)
    assert isinstance(spawn, Spawn)
    world.note(world.scheduler.shrink, 1)
    assert CloseStdin(spawn.child) in world.tell(world.scheduler.spawned, spawn.child, 17)
    assert spawn.child.state is ChildState.STOPPING
    assert world.tell(world.scheduler.exited, spawn.child, 0, READ_ALL) == [Forget(spawn.child)]
    assert len(world.children()) == 1


def test_shrink_of_a_child_that_could_not_start() -> None:
    world = World(limit=1, a=kind(None))
    (spawn,) = world.scheduler.grow(1, world.now)
    assert isinstance(spawn, Spawn)
    world.note(world.scheduler.shrink, 1)
    world.note(world.scheduler.spawn_failed, spawn.child, "no such program")
    assert world.at(1000.0) == []
    assert len(world.children()) == len(world.slots()) == 1


def test_shrink_while_the_worker_stops() -> None:
    world = World(limit=2, a=kind(None))
    world.tell(world.scheduler.stop)
    assert world.tell(world.scheduler.shrink, 1) == []
    for child in world.children():
        world.tell(world.scheduler.exited, child, 0, READ_ALL)
    assert world.children() == []


def test_grow_while_the_worker_stops_spawns_nothing() -> None:
    world = World(limit=1, a=kind(None))
    world.tell(world.scheduler.stop)
    assert world.tell(world.scheduler.grow, 1) == []


# -- deadlines


def test_without_anything_due_there_is_no_deadline() -> None:
    world = World(a=kind())
    assert world.scheduler.next_deadline is None
    assert world.at(1000.0) == []
    world.send()
    assert world.scheduler.next_deadline is None


def test_the_next_deadline_is_a_lower_bound_that_tick_makes_exact() -> None:
    world = World(a=kind(2))
    _, first = world.send("x", timeout=5.0)
    _, second = world.send("y", timeout=9.0, soft_timeout=7.0)
    assert world.scheduler.next_deadline == 5.0
    world.tell(world.scheduler.replied, first, Ok())
    # Too early now, which costs one idle tick.
    assert world.scheduler.next_deadline == 5.0
    assert world.at(4.9) == []
    assert world.scheduler.next_deadline == 5.0
    assert world.at(5.0) == []
    assert world.scheduler.next_deadline == 7.0
    world.at(7.0)
    assert world.scheduler.next_deadline == 9.0
    world.at(9.0)
    # When the child's replacement has proved itself.
    assert world.scheduler.next_deadline == 9.0 + STARTUP_GRACE
    world.at(9.5)
    # When the child must be gone.
    assert world.scheduler.next_deadline == 9.0 + KILL_PATIENCE
    world.tell(world.scheduler.exited, second, -9, READ_ALL)
    world.at(9.0 + KILL_PATIENCE)
    assert world.scheduler.next_deadline is None


def test_the_next_deadline_knows_of_children_and_slots_too() -> None:
    world = World(a=kind(2), b=kind(1))
    first, second = world.children("a")
    world.tell(world.scheduler.exited, first, 1, READ_ALL)
    assert world.scheduler.next_deadline == 0.1
    world.tell(world.scheduler.stdout_closed, second)
    world.tell(world.scheduler.stdout_closed, world.children("b")[0])
    world.at(0.1)
    assert world.scheduler.next_deadline == pytest.approx(0.1 + STARTUP_GRACE)
    world.at(2 * STARTUP_GRACE)
    assert world.scheduler.next_deadline == STOP_TIMEOUT
    world.tell(world.scheduler.exited, second, 0, READ_ALL)
    world.at(STOP_TIMEOUT)
    assert world.scheduler.next_deadline == 2 * STOP_TIMEOUT


# -- children that boot slowly


def test_the_limit_of_a_first_job_counts_from_when_its_child_reads_it() -> None:
    world = World(a=kind(), boot_slowly=True)
    job, child = world.send(timeout=2.0, soft_timeout=1.0)
    assert world.at(1.0) == [Probe(child)]
    assert world.tell(world.scheduler.probed, child, READ_NOTHING) == []
    world.at(1.9)
    world.tell(world.scheduler.probed, child, READ_NOTHING)
    assert world.at(2.0) == [Probe(child)]
    assert world.tell(world.scheduler.probed, child, READ_ALL) == []
    assert child.has_read
    assert world.at(2.9) == []
    assert world.at(3.0) == [SoftTimeout(job, child, None)]
    assert ends(world.at(4.0)) == [Resolve(job, TimedOut(2.0), child)]


@pytest.mark.parametrize("limits", [{"timeout": 2.0}, {"timeout": 9.0, "soft_timeout": 2.0}])
def test_a_child_that_had_read_its_first_job_in_time_gets_no_more(
    limits: dict[str, float],
) -> None:
    world = World(a=kind(), boot_slowly=True)
    job, child = world.send(**limits)
    assert world.at(2.0) == [Probe(child)]
    (action,) = world.tell(world.scheduler.probed, child, READ_ALL)[:1]
    if "soft_timeout" in limits:
        assert action == SoftTimeout(job, child, None)
    else:
        assert action == Resolve(job, TimedOut(2.0), child)


def test_a_probe_that_comes_too_late_changes_nothing() -> None:
    world = World(a=kind(), boot_slowly=True)
    job, child = world.send(timeout=2.0)
    world.at(2.0)
    world.tell(world.scheduler.replied, child, Ok())
    assert world.tell(world.scheduler.probed, child, READ_ALL) == []
    assert job.state is JobState.ANSWERED


def test_a_child_that_never_reads_is_replaced_and_its_job_begins_anew() -> None:
    world = World(a=kind(), boot_slowly=True)
    job, child = world.send(timeout=2.0)
    assert world.at(59.0) == [Probe(child)]
    assert world.tell(world.scheduler.probed, child, READ_NOTHING) == []
    assert world.at(61.0) == [Probe(child)]
    assert Kill(child, signal.SIGKILL) in world.tell(world.scheduler.probed, child, READ_NOTHING)
    assert child.reason == "it did not read its first request within 60 s (start_timeout)"
    # It never read the job, whose time has not begun.
    assert ends(world.tell(world.scheduler.exited, child, -9, READ_NOTHING)) == []
    world.at(61.2)
    assert (job.state, child_of(job).pid) == (JobState.SENT, 102)
    assert Probe(child_of(job)) in world.at(63.0)


def test_a_child_that_is_first_looked_at_after_a_long_job_has_begun_it() -> None:
    world = World(a=kind(), boot_slowly=True)
    job, child = world.send(timeout=600.0)
    assert world.at(600.0) == [Probe(child)]
    assert ends(world.tell(world.scheduler.probed, child, READ_ALL)) == [
        Resolve(job, TimedOut(600.0), child)
    ]


def test_a_job_that_lost_its_child_keeps_its_limit_while_it_waits() -> None:
    world = World(a=kind())
    job = world.submit(timeout=2.0)
    world.tell(world.scheduler.exited, child_of(job), 1, READ_ALL)
    other = world.submit("y", timeout=2.0)
    assert job.state is JobState.QUEUED
    world.spawns_fail = True
    assert ends(world.at(1.0)) == []
    assert ends(world.at(2.0)) == [Resolve(job, TimedOut(2.0), None)]
    assert other.state is JobState.QUEUED


def test_a_job_whose_children_end_before_they_read_it_is_given_up() -> None:
    world = World(a=kind())
    job, child = world.send()
    for attempt in range(4):
        assert job.state is not JobState.CLOSED
        actions = world.tell(world.scheduler.exited, child, 1, READ_NOTHING)
        if attempt < 3:
            assert ends(actions) == []
            world.at(world.now + 100)
            child = child_of(job)
    reason = "4 children in a row ended before they had read the job"
    assert ends(actions) == [Resolve(job, Lost(None, reason), child)]


def test_a_child_that_stops_in_the_midst_of_its_only_request_has_some_time_to_say_so() -> None:
    world = World(a=kind())
    job, child = world.send()
    closed = world.now
    world.tell(world.scheduler.unwritten, child, "it closed its stdin", len(BOOT) + 1)
    assert (child.draining, job.state) == (True, JobState.SENT)
    assert kills(world.at(closed + STOP_TIMEOUT - 0.1)) == []
    assert kills(world.at(closed + STOP_TIMEOUT)) == [signal.SIGTERM]
    assert kills(world.at(closed + 2 * STOP_TIMEOUT)) == [signal.SIGKILL]


def test_a_child_that_has_read_its_request_has_as_long_as_that_takes() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.unwritten, child, "it closed its stdin", READ_ALL)
    assert (child.draining, job.state) == (True, JobState.SENT)
    assert kills(world.at(world.now + 10 * STOP_TIMEOUT)) == []


def test_a_child_that_ends_its_jobs_and_is_killed_then_is_counted_once() -> None:
    world = World(a=kind())
    job, child = world.send(timeout=5.0)
    world.tell(world.scheduler.unwritten, child, "it closed its stdin", READ_ALL)
    actions = world.at(world.now + 5.0)
    assert ends(actions) == [Resolve(job, TimedOut(5.0), child)]
    assert kills(actions) == [signal.SIGKILL]
    assert world.scheduler.groups["a"].counters.replaced == {Cause.EXITED: 1}


def test_an_idle_child_that_is_found_closed_is_replaced() -> None:
    world = World(a=kind())
    (child,) = world.children()
    world.tell(world.scheduler.unwritten, child, "it closed its stdin", READ_NOTHING)
    assert child.state is ChildState.STOPPING
    assert world.children()[0].reason == "it closed its stdin"


# -- children that can have many jobs at a time

#: As many as their group lets them have.
MANY = Ready(protocol=1, features=("multiplex", "cancel", "progress"))


def world_of_many(size: int | None, most: int, limit: int = 10, **settings: Any) -> World:
    """A world whose children have said that they are ready, and may have `most` jobs each."""
    settings = {"handshake": True, "max_in_flight": most, **settings}
    world = World(limit=limit, a=kind(size, **settings))
    for child in world.children():
        world.tell(world.scheduler.ready, child, MANY, None)
    return world


def test_silence_that_nobody_could_hear_is_no_silence() -> None:
    """The engine was not turned: children may have waited for room in their pipes."""
    world = world_of_many(1, 4, inactivity_timeout=5.0)
    job, _ = world.send()
    assert ends(world.at(5.0 + LATE + 0.1)) == []
    assert ends(world.at(world.now + 4.9)) == []
    [end] = ends(world.at(world.now + 0.2))
    assert isinstance(end, Resolve)
    assert end.outcome == TimedOut(5.0, silent=True)
    assert job.state is JobState.CLOSED


def test_shrinking_lets_a_child_with_many_jobs_end_them_first() -> None:
    world = world_of_many(None, 2, limit=4)
    jobs = [world.send(f"{number}")[0] for number in range(4)]
    [stays, goes] = world.children()
    world.scheduler.check_shrink(2)
    assert world.tell(world.scheduler.shrink, 2) == []
    assert [slot.child for slot in world.slots()] in ([stays], [goes])
    if world.slots()[0].child is goes:
        stays, goes = goes, stays
    theirs = [job for job in jobs if job.child is goes]
    later = world.submit("later")
    first, last = theirs
    actions = world.tell(world.scheduler.replied, goes, Ok(id=first.task_id))
    assert goes.state is ChildState.BUSY
    actions += world.tell(world.scheduler.replied, goes, Ok(id=last.task_id))
    assert CloseStdin(goes) in actions
    assert [end.job for end in ends(actions) if isinstance(end, Resolve)] == theirs
    assert later.child is not goes
    actions = world.tell(world.scheduler.exited, goes, 0, READ_ALL)
    assert reports(actions) == []
    assert world.children() == [stays]


def test_a_child_with_many_jobs_that_has_to_go_may_die_first() -> None:
    world = world_of_many(None, 2, limit=4)
    for number in range(4):
        world.send(f"{number}")
    before = world.children()
    world.tell(world.scheduler.shrink, 2)
    [goes] = {*before} - {slot.child for slot in world.slots()}
    actions = world.tell(world.scheduler.exited, goes, 1, READ_ALL)
    assert [type(end.outcome) for end in ends(actions) if isinstance(end, Resolve)] == [Lost] * 2
    assert not [action for action in actions if isinstance(action, Spawn)]


def test_a_busy_child_with_one_job_at_a_time_is_not_taken_away() -> None:
    world = world_of_many(None, 1, limit=1)
    world.send()
    with pytest.raises(ValueError, match="All processes busy"):
        world.scheduler.check_shrink(1)


def test_a_task_that_only_a_newer_child_announces_waits_for_it() -> None:
    """While children are replaced by those of another program."""
    world = World(a=kind(2, handshake=True))
    old, new = world.children()
    world.tell(world.scheduler.ready, old, Ready(protocol=1, tasks=("task.old",)), None)
    ready = Ready(protocol=1, tasks=("task.old", "task.new"))
    world.tell(world.scheduler.ready, new, ready, None)
    first, second = (Job(f"{number}", "task.new", "a") for number in range(2))
    world.tell(world.scheduler.submit, first)
    assert first.child is new
    world.tell(world.scheduler.submit, second)
    assert second.state is JobState.QUEUED
    # One that was announced by nobody is any child's, also behind one that has to wait.
    other = world.submit("other")
    assert other.child is old
    world.tell(world.scheduler.provide, first, b"request")
    world.tell(world.scheduler.replied, new, Ok(id="0"))
    assert second.child is new


def test_jobs_that_were_together_when_a_child_died_come_again_one_by_one() -> None:
    """So that the one that kills is found out, and costs the others no more children."""
    world = world_of_many(1, 4, max_crashes=2)
    for name in ("poison", "one", "two"):
        world.send(name)
    [child] = world.children()
    world.send("innocent")
    world.tell(world.scheduler.replied, child, Ok(id="innocent"))
    actions = world.tell(world.scheduler.exited, child, 1, READ_ALL)
    assert [end.outcome.crashes for end in ends(actions)] == [0, 0, 0]  # type: ignore[union-attr]
    world.at(1.0)

    def boot() -> Child:
        [child] = world.children()
        world.tell(world.scheduler.ready, child, MANY, None)
        return child

    # They are delivered again, and others come.
    child = boot()
    first, again, one, last = (world.submit(name) for name in ("x", "poison", "one", "y"))
    assert (first.child, again.state, last.state) == (child, JobState.QUEUED, JobState.QUEUED)
    world.tell(world.scheduler.provide, first, b"request")
    world.tell(world.scheduler.replied, child, Ok(id="x"))
    assert list(child.jobs) == ["poison"]
    world.tell(world.scheduler.provide, again, b"request")
    world.tell(world.scheduler.exited, child, 1, READ_ALL)
    world.at(world.now + 1.0)
    # The next one had nothing to do with it, and is cleared by its answer.
    child = boot()
    assert list(child.jobs) == ["one"]
    world.tell(world.scheduler.provide, one, b"request")
    world.tell(world.scheduler.replied, child, Ok(id="one"))
    world.tell(world.scheduler.provide, last, b"request")
    assert list(child.jobs) == ["y"]
    assert world.submit("one").child is child
    # The other one has cost a second child now, and is to cost no more.
    world.tell(world.scheduler.replied, child, Ok(id="y"))
    world.tell(
        world.scheduler.finish, world.scheduler.groups["a"].children[child.number].jobs["one"]
    )
    third = world.submit("poison")
    world.tell(world.scheduler.provide, third, b"request")
    actions = world.tell(world.scheduler.exited, child, 1, READ_ALL)
    assert ends(actions) == [Resolve(third, Lost(1, "", crashes=2), child)]


def test_no_waiting_job_gets_the_place_of_one_that_a_shutdown_has_ended() -> None:
    world = World(limit=1, a=kind(2))
    job, _ = world.send("runs")
    waiting = world.submit("waits")
    world.perform(world.scheduler.terminate(job, signal.SIGTERM, world.now, CancelReason.SHUTDOWN))
    world.turn()
    assert waiting.state is JobState.QUEUED
    [end] = ends(world.note(world.scheduler.close))
    assert end == Resolve(waiting, Dropped(), None)


def test_if_the_shutdown_does_not_come_waiting_jobs_go_on() -> None:
    world = World(limit=1, a=kind(2))
    job, _ = world.send("runs")
    waiting = world.submit("waits")
    world.perform(world.scheduler.terminate(job, signal.SIGTERM, world.now, CancelReason.SHUTDOWN))
    world.turn()
    world.at(HOLD - 0.1)
    assert waiting.state is JobState.QUEUED
    world.at(HOLD)
    assert waiting.state is JobState.RESERVED


def test_a_child_that_has_to_end_a_job_gets_no_other_until_it_has() -> None:
    """It may have to die, with all that it has."""
    world = world_of_many(1, 4)
    job, child = world.send("runs")
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    waiting = world.submit("waits")
    assert waiting.state is JobState.QUEUED
    world.tell(world.scheduler.replied, child, Ok(id="runs"))
    assert waiting.child is child


def test_progress_of_a_job_that_is_over_but_not_answered_is_no_news() -> None:
    world = world_of_many(1, 4)
    job, child = world.send("runs")
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert world.tell(world.scheduler.progressed, child, Progress(id="runs", meta={})) == []
    assert child.serves
    world.tell(world.scheduler.faulted, child, "no JSON")
    assert world.tell(world.scheduler.progressed, child, Progress(id="runs", meta={})) == []


def test_one_that_was_told_before_gets_no_more_time() -> None:
    world = world_of_many(1, 4, cancel_grace=3.0)
    job, child = world.send("runs", soft_timeout=1.0, timeout=2.0)
    world.at(1.0)
    assert job.kill_at == 4.0
    world.at(2.0)
    assert (job.kill_at, job.cancelled) == (4.0, CancelReason.TIME_LIMIT)
    assert kills(world.at(4.0)) == [signal.SIGKILL]
    assert child.state is ChildState.STOPPING


def test_silence_costs_a_child_that_cannot_be_told_its_life() -> None:
    world = World(a=kind(inactivity_timeout=5.0))
    job, child = world.send()
    actions = world.at(5.0)
    assert ends(actions) == [Resolve(job, TimedOut(5.0, silent=True), child)]
    assert kills(actions) == [signal.SIGKILL]
    [report] = reports(actions)
    assert report.reason.startswith("it told nothing of its job for 5 s (inactivity_timeout)")


def test_a_group_tells_progress_once_a_child_of_it_can() -> None:
    """Its jobs are traced from their beginning then."""
    world = World(a=kind(2, handshake=True))
    first, second = world.children()
    group = world.scheduler.groups["a"]
    world.tell(world.scheduler.ready, first, READY, None)
    assert not group.tells_progress
    world.tell(world.scheduler.ready, second, MANY, None)
    assert group.tells_progress
