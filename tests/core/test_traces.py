"""Jobs with a tracer: the order of events, and who is lost with whom."""

from __future__ import annotations

import signal
from typing import Any

import msgspec
import pytest

from celery_subproc_pool.core.actions import (
    Abandon,
    Accept,
    Action,
    Cancel,
    CloseStdin,
    Finished,
    Forget,
    Kill,
    Resolve,
    Spawn,
    StandsStill,
    Tell,
    Write,
)
from celery_subproc_pool.core.jobs import MAX_REQUEUES
from celery_subproc_pool.core.model import Child, ChildState, Job, JobState, Tracing
from celery_subproc_pool.core.outcomes import (
    Answered,
    Faulted,
    Lost,
    Outcome,
    SoftTimedOut,
    Terminated,
    TimedOut,
)
from celery_subproc_pool.settings import TRACERS
from celery_subproc_pool.wire.messages import CancelReason, Error, Ok, Reply
from celery_subproc_pool.wire.python import Ask, Released, Traced
from tests.support.world import (
    MANY,
    READ_ALL,
    READ_NOTHING,
    READY_TO_TRACE,
    STOP_TIMEOUT,
    TASK,
    World,
    child_of,
    ends,
    kills,
    kind,
    new_child,
    reports,
    trace_of,
    world_of_tracers,
)

LINE = b"what the child said"


def tracers_of(world: World) -> list[Child]:
    return world.children(TRACERS)


def reply(world: World, child: Child, answer: Reply) -> list[Action]:
    return world.tell(world.scheduler.replied, child, answer)


def answer(world: World, job: Job) -> None:
    """Let the child of `job` answer, and its tracer be told."""
    reply(world, child_of(job), Ok(id=job.task_id))
    world.tell(world.scheduler.tell, job, LINE)
    assert job.state is JobState.ANSWERED


def lost_with(actions: list[Action]) -> list[tuple[Job, Outcome, Child | None]]:
    """The jobs that were resolved, how, and whose fault it was."""
    return [(end.job, end.outcome, end.child) for end in ends(actions) if isinstance(end, Resolve)]


def sorted_by_id(found: list[tuple[Job, Outcome, Child | None]]) -> list[Any]:
    return sorted(found, key=lambda each: each[0].task_id)


def stands_still(world: World) -> list[StandsStill]:
    return [each for each in world.standstills if isinstance(each, StandsStill)]


def next_tracer(world: World) -> Child:
    """Let time pass until there is another tracer, which is ready."""
    [tracer] = (action.child for action in world.at(world.now + 60.0) if isinstance(action, Spawn))
    world.tell(world.scheduler.ready, tracer, READY_TO_TRACE, None)
    return tracer


# -- the order of events


def test_a_traced_job_from_arrival_to_end() -> None:
    world = world_of_tracers()
    scheduler = world.scheduler
    [child], [tracer] = world.children(), tracers_of(world)
    job = Job("x", "task.x", "a", tracing=Tracing.ALWAYS, timeout=9.0, retries=2)

    assert world.tell(scheduler.submit, job) == [Accept(job, child, 0.0)]
    assert (job.state, job.trace, scheduler.open_jobs) == (JobState.RESERVED, None, 1)

    assert world.tell(scheduler.trace, job, TASK) == [Write(tracer, trace_of(job))]
    trace = trace_of(job)
    assert (trace.state, trace.request, trace.traces) == (JobState.SENT, TASK, job)
    assert (trace.task_id, trace.task_name, trace.retries) == ("x", "task.x", 2)
    assert scheduler.open_jobs == 1

    assert world.ask(job) == [Write(child, job)]
    assert (job.state, job.request) == (JobState.SENT, b"request\n")

    answered = Answered(Ok(id="x"))
    assert reply(world, child, answered.reply) == [Resolve(job, answered, child)]
    assert (job.state, child.state, scheduler.open_jobs) == (JobState.ANSWERED, ChildState.IDLE, 1)
    assert not world.idle()

    assert world.tell(scheduler.tell, job, LINE) == [Tell(tracer, LINE)]
    traced = Traced(id="x", result="1")
    assert reply(world, tracer, traced) == [Finished(job, traced)]
    assert (job.state, trace.state) == (JobState.CLOSED, JobState.CLOSED)
    assert (tracer.state, tracer.jobs_done) == (ChildState.IDLE, 1)
    assert (scheduler.open_jobs, world.idle(), world.at(100.0)) == (0, True, [])


def test_what_is_told_of_a_job_whose_trace_waits_is_read_with_the_trace() -> None:
    world = world_of_tracers(children=2, most=1)
    world.tell(world.scheduler.trace, world.submit("x"), TASK)
    job = world.submit("y")
    world.tell(world.scheduler.trace, job, TASK)
    assert trace_of(job).state is JobState.QUEUED
    assert world.tell(world.scheduler.tell, job, LINE) == []
    assert trace_of(job).request == TASK + LINE


def test_tracers_that_may_not_be_needed_need_not_start() -> None:
    group = world_of_tracers().scheduler.groups[TRACERS]
    assert group.must_start
    group.on_demand = True
    assert not group.must_start


def test_a_job_on_the_fast_path_needs_no_tracer_if_it_is_ok() -> None:
    world = world_of_tracers()
    job, child = world.send(tracing=Tracing.UNLESS_OK)
    answered = Answered(Ok(id="x"))
    assert reply(world, child, answered.reply) == [Resolve(job, answered, child)]
    assert (job.state, job.trace, world.idle()) == (JobState.CLOSED, None, True)


@pytest.mark.parametrize("how", ["error", "fault", "soft limit"])
def test_a_tracer_takes_over_a_job_that_leaves_the_fast_path(how: str) -> None:
    world = world_of_tracers()
    world.scheduler.groups["a"].slots[0].child.features = MANY.known_features  # type: ignore[union-attr]
    job, child = world.send(tracing=Tracing.UNLESS_OK, timeout=50.0, soft_timeout=1.0)
    outcome: Outcome
    if how == "error":
        outcome = Answered(Error(id="x"))
        actions = reply(world, child, outcome.reply)
    elif how == "fault":
        outcome = Faulted("no JSON")
        actions = world.tell(world.scheduler.faulted, child, "no JSON")
    else:
        world.at(1.0)
        outcome = SoftTimedOut(1.0)
        actions = world.at(1.0 + child.group.settings.cancel_grace)
    assert ends(actions) == [Resolve(job, outcome, child)]
    assert (job.state, world.scheduler.open_jobs) == (JobState.ANSWERED, 1)

    [tracer] = tracers_of(world)
    actions = world.tell(world.scheduler.trace, job, TASK + LINE)
    assert actions == [Write(tracer, trace_of(job))]
    # It is about to read the answer; what it asks for is known.
    assert world.ask(job) == []
    traced = Traced(id="x")
    assert reply(world, tracer, traced) == [Finished(job, traced)]
    assert (job.state, world.scheduler.open_jobs) == (JobState.CLOSED, 0)


def test_a_child_takes_the_next_job_while_the_last_one_is_stored() -> None:
    world = world_of_tracers()
    job, child, _ = world.send_traced()
    waiting = world.submit("y")
    assert reply(world, child, Ok(id="x"))[-1] == Accept(waiting, child, 0.0)
    assert (job.state, world.scheduler.open_jobs) == (JobState.ANSWERED, 2)


def test_a_job_is_open_until_its_trace_is_over() -> None:
    world = world_of_tracers(2, limit=1)
    job, _, tracer = world.send_traced()
    waiting = world.submit("y")
    answer(world, job)
    assert waiting.state is JobState.QUEUED
    reply(world, tracer, Traced(id="x"))
    assert waiting.state is JobState.RESERVED


def test_a_trace_needs_no_place_below_the_limit() -> None:
    """Otherwise those that are open might wait for those that can't begin."""
    world = world_of_tracers(2, limit=1)
    job = world.submit()
    # The worker may even shrink meanwhile, or lose its broker.
    world.tell(world.scheduler.shrink, 1)
    other = world.submit("y")
    world.perform(world.scheduler.terminate(other, 15, world.now, CancelReason.SHUTDOWN))
    assert world.trace(job).state is JobState.SENT
    assert world.scheduler.open_jobs == 1


@pytest.mark.parametrize("waits", [False, True])
def test_a_trace_that_does_not_need_the_child_gives_it_back(waits: bool) -> None:
    world = world_of_tracers()
    job = world.submit()
    trace, child = world.trace(job), child_of(job)
    if waits:
        world.tell(world.scheduler.exited, child, 1, READ_ALL)
        assert job.state is JobState.QUEUED
    traced = Traced(id="x")
    assert reply(world, child_of(trace), traced) == [Finished(job, traced)]
    assert (job.state, world.scheduler.open_jobs, world.idle()) == (JobState.CLOSED, 0, True)
    assert waits or (child.state, child.jobs) == (ChildState.IDLE, {})


def test_a_trace_that_ends_while_the_child_works_costs_the_child() -> None:
    """It would answer when it has the next job."""
    world = world_of_tracers()
    job, child, tracer = world.send_traced()
    traced = Traced(id="x")
    actions = reply(world, tracer, traced)
    assert ends(actions) == [Finished(job, traced)]
    assert kills(actions) == [signal.SIGTERM]
    assert (child.state, child.reason) == (ChildState.STOPPING, "its job was terminated")
    assert ends(world.tell(world.scheduler.exited, child, -15, READ_ALL)) == []
    assert world.idle()


# -- what a tracer asks for


def test_a_tracer_that_asks_too_late_or_for_nothing_changes_nothing() -> None:
    world = world_of_tracers()
    job = world.submit()
    trace = world.trace(job)
    tracer = child_of(trace)

    def ask(task_id: str) -> list[Action]:
        request = Ask(id=task_id, request=msgspec.Raw(b"{}"))
        return world.tell(world.scheduler.asked, tracer, request)

    assert ask("nobody's") == []
    # A job of Celery's own, which it does by itself.
    own = world.submit("own", TRACERS, Tracing.NEVER)
    assert own.child is tracer
    assert ask("own") == []
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert ask("x") == []
    assert (job.state, job.child) == (JobState.CLOSED, None)
    reply(world, tracer, Released(id="x"))
    assert ask("x") == []


def test_a_tracer_does_tasks_of_celerys_own_within_the_limit() -> None:
    world = world_of_tracers(limit=1)
    [tracer] = tracers_of(world)
    own, _ = world.send("own", TRACERS)
    waiting = world.submit("y")
    assert waiting.state is JobState.QUEUED
    traced = Traced(id="own")
    assert ends(reply(world, tracer, traced)) == [Resolve(own, Answered(traced), tracer)]
    assert (own.state, waiting.state) == (JobState.CLOSED, JobState.RESERVED)


# -- a tracer is lost

CRASH = Lost(-11, "")


def test_a_tracer_that_exits_costs_a_child_nothing_that_has_no_request() -> None:
    world = world_of_tracers()
    job = world.submit()
    trace, child = world.trace(job), child_of(job)
    tracer = child_of(trace)
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    assert ends(actions) == [Resolve(job, CRASH, tracer)]
    assert actions[-1] == Forget(tracer)
    assert (child.state, child.jobs, kills(actions)) == (ChildState.IDLE, {}, [])
    assert (job.state, trace.state, world.scheduler.open_jobs) == (
        JobState.CLOSED,
        JobState.CLOSED,
        0,
    )


def test_a_tracer_that_exits_costs_the_child_that_works_for_it() -> None:
    world = world_of_tracers()
    job, child, tracer = world.send_traced()
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    assert lost_with(actions) == [(job, CRASH, tracer)]
    assert kills(actions) == [signal.SIGTERM]
    assert child.reason == "its job was terminated"
    assert new_child(actions).slot is child.slot
    # What it says now is nobody's.
    assert reply(world, child, Ok(id="x")) == []
    assert ends(world.tell(world.scheduler.exited, child, 0, READ_ALL)) == []
    assert world.idle()


def world_of_multiplexing_children(*features: str) -> World:
    settings = {"handshake": True, "max_in_flight": 9, "cancel_grace": 3.0}
    world = World(a=kind(1, **settings), tracers=kind(1, **settings))
    for group, more in (("a", features), (TRACERS, ())):
        ready = msgspec.structs.replace(READY_TO_TRACE, features=("multiplex", *more))
        world.tell(world.scheduler.ready, world.children(group)[0], ready, None)
    return world


def test_a_child_that_can_cancel_does_so_if_a_tracer_exits() -> None:
    world = world_of_multiplexing_children("cancel")
    job, child, tracer = world.send_traced()
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    assert lost_with(actions) == [(job, CRASH, tracer)]
    assert Cancel(child, job, CancelReason.REVOKED) in actions
    assert kills(actions) == []
    assert ends(reply(world, child, Error(id="x"))) == []
    assert (child.state, child.jobs) == (ChildState.IDLE, {})


def test_a_child_with_other_jobs_is_spared_if_a_tracer_exits() -> None:
    world = world_of_multiplexing_children()
    job, child, tracer = world.send_traced()
    world.submit("other")
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    assert lost_with(actions) == [(job, CRASH, tracer)]
    assert kills(actions) == []
    # It has its grace, all the same.
    assert kills(world.at(2.9)) == []
    assert kills(world.at(3.0)) == [signal.SIGKILL]
    assert child.reason.startswith("it went on with task.x[x] for 3 s after that was over")


def test_a_tracer_that_exits_while_it_stores_loses_the_job() -> None:
    world = world_of_tracers()
    job, child, tracer = world.send_traced()
    answer(world, job)
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    assert lost_with(actions) == [(job, CRASH, tracer)]
    assert (child.state, world.idle()) == (ChildState.IDLE, True)


def test_a_tracer_that_exits_loses_a_job_that_waits_for_its_next_child() -> None:
    world = world_of_tracers()
    job, child, tracer = world.send_traced()
    world.tell(world.scheduler.exited, child, 1, READ_NOTHING)
    assert job.state is JobState.QUEUED
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    assert lost_with(actions) == [(job, CRASH, tracer)]
    assert world.idle()


def test_a_tracer_that_does_not_say_whether_the_backend_answers_is_replaced() -> None:
    world = world_of_tracers()
    job = world.submit("x", tracing=Tracing.AT_END)
    [child], [tracer] = world.children(), tracers_of(world)
    world.tell(world.scheduler.exited, child, -11, READ_ALL)
    assert job.state is JobState.CLOSED
    world.tell(world.scheduler.follow_up, job, TASK)
    assert kills(world.at(2.9)) == []
    assert kills(world.at(3.0)) != []
    assert ends(world.tell(world.scheduler.exited, tracer, -9, READ_ALL)) == [Finished(job, None)]


def test_a_tracer_that_exits_loses_a_job_that_left_the_fast_path() -> None:
    world = world_of_tracers()
    job, child = world.send(tracing=Tracing.UNLESS_OK)
    reply(world, child, Error(id="x"))
    tracer = child_of(world.trace(job))
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    assert lost_with(actions) == [(job, CRASH, tracer)]


def test_a_job_that_ends_in_the_turn_in_which_its_tracer_fails_ends_once() -> None:
    world = world_of_tracers()
    job, child, tracer = world.send_traced()
    actions = world.note(world.scheduler.faulted, tracer, "garbage")
    assert ends(actions) == []
    actions = world.note(world.scheduler.terminate, job, signal.SIGTERM) + world.turn()
    assert ends(actions) == [Resolve(job, Terminated(signal.SIGTERM), child)]


def test_a_trace_that_was_not_read_goes_to_another_tracer() -> None:
    world = world_of_tracers(tracers=2)
    job = world.submit()
    trace = world.trace(job, TASK + LINE)
    first = child_of(trace)
    actions = world.tell(world.scheduler.exited, first, -11, READ_NOTHING)
    assert ends(actions) == []
    [second] = (each for each in tracers_of(world) if each is not first and each.proven)
    assert actions[-1] == Write(second, trace)
    assert (trace.child, trace.state, trace.request) == (second, JobState.SENT, TASK + LINE)
    assert world.ask(job) == [Write(child_of(job), job)]


def test_a_job_whose_tracers_end_before_they_read_it_is_given_up() -> None:
    world = world_of_tracers()
    job = world.submit()
    child, tracer = child_of(job), child_of(world.trace(job))
    for _ in range(MAX_REQUEUES):
        assert ends(world.tell(world.scheduler.exited, tracer, 1, READ_NOTHING)) == []
        assert next_tracer(world) is child_of(trace_of(job))
        tracer = child_of(trace_of(job))
    actions = world.tell(world.scheduler.exited, tracer, 1, READ_NOTHING)
    reason = "4 children in a row ended before they had read the job"
    assert lost_with(actions) == [(job, Lost(None, reason), tracer)]
    assert (child.state, world.idle()) == (ChildState.IDLE, True)


def test_a_job_that_is_given_up_while_its_tracer_boots_ends_before_its_trace() -> None:
    """Otherwise Celery would be told that the trace has ended without a reason."""
    world = World(a=kind(1), tracers=kind(1, handshake=True, max_in_flight=9))
    job = world.submit()
    assert world.trace(job).state is JobState.QUEUED
    for _ in range(MAX_REQUEUES):
        assert ends(world.tell(world.scheduler.exited, child_of(job), 1, READ_NOTHING)) == []
        world.at(world.now + 1.0)
    child = child_of(job)
    actions = world.tell(world.scheduler.exited, child, 1, READ_NOTHING)
    lost = Lost(None, "4 children in a row ended before they had read the job")
    assert ends(actions) == [Resolve(job, lost, child, unfinished=True), Finished(job, None)]


def test_a_tracer_that_cannot_be_killed_loses_its_jobs() -> None:
    world = world_of_tracers(2)
    job, _, tracer = world.send_traced()
    over, _, _ = world.send_traced("over")
    world.tell(world.scheduler.terminate, over, signal.SIGTERM)
    world.tell(world.scheduler.stdout_closed, tracer)
    actions = world.tell(world.scheduler.unkillable, tracer, "it runs as root")
    lost = Lost(None, "its child can't be killed: it runs as root")
    assert ends(actions) == [Finished(over, None), Resolve(job, lost, tracer)]
    assert world.idle()


def test_a_tracer_that_takes_no_more_lines_has_stop_timeout_to_end_what_it_can() -> None:
    """It can't be told what children answer: their jobs would never end."""
    world = world_of_tracers(2)
    job, _, tracer = world.send_traced()
    other, _, _ = world.send_traced("other")
    answer(world, other)
    actions = world.tell(world.scheduler.unwritten, tracer, "it closed its stdin", READ_ALL)
    assert ends(actions) == kills(actions) == []
    assert (tracer.state, tracer.draining) == (ChildState.BUSY, True)
    traced = Traced(id="other")
    assert ends(reply(world, tracer, traced)) == [Finished(other, traced)]
    assert kills(world.at(STOP_TIMEOUT - 0.1)) == []
    assert kills(world.at(STOP_TIMEOUT)) == [signal.SIGTERM]
    actions = world.tell(world.scheduler.exited, tracer, 0, READ_ALL)
    assert lost_with(actions) == [(job, Lost(0, "it closed its stdin"), tracer)]


def test_a_tracer_that_has_stood_still_is_watched_anew() -> None:
    world = world_of_tracers(2)
    for name in ("x", "y"):
        world.trace(world.submit(name))
    [tracer] = tracers_of(world)
    world.at(40.0)
    reply(world, tracer, Traced(id="x"))
    assert world.scheduler.next_deadline == 45.0
    world.at(45.0)
    assert [each.seconds for each in stands_still(world)] == [40.0, 5.0]


def test_a_tracer_that_takes_no_more_lines_is_ended_despite_a_task_of_celerys_own() -> None:
    """Nothing else would ever end the job that it traces."""
    world = world_of_tracers()
    job, _, tracer = world.send_traced()
    world.submit("own", TRACERS, Tracing.NEVER)
    world.tell(world.scheduler.unwritten, tracer, "it closed its stdin", READ_ALL)
    reply(world, tracer, Traced(id="own"))
    assert kills(world.at(STOP_TIMEOUT)) == [signal.SIGTERM]
    actions = world.tell(world.scheduler.exited, tracer, 0, READ_ALL)
    assert [each for each, _, _ in lost_with(actions)] == [job]


def test_a_trace_that_is_taken_back_has_no_cancel_pending() -> None:
    world = world_of_tracers(2)
    _, _, tracer = world.send_traced("read")
    job = world.submit()
    world.trace(job).offset = READ_NOTHING + 1
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert tracer.pending_cancels == 1
    actions = world.tell(world.scheduler.unwritten, tracer, "it closed its stdin", READ_NOTHING + 1)
    assert ends(actions) == [Finished(job, None)]
    assert (list(tracer.jobs), tracer.pending_cancels) == (["read"], 0)


@pytest.mark.parametrize("others", [0, 1])
def test_a_tracer_that_reads_no_more_does_not_stand_still_for_what_it_has_not_read(
    others: int,
) -> None:
    world = world_of_tracers(3)
    _, _, tracer = world.send_traced()
    for _ in range(others):
        world.trace(world.submit("other"))
    unread = world.trace(world.submit("unread"))
    unread.offset = READ_NOTHING + 1
    world.tell(world.scheduler.unwritten, tracer, "it closed its stdin", READ_NOTHING + 1)
    assert (unread.state, list(tracer.jobs)) == (JobState.QUEUED, ["x", "other"][: others + 1])
    world.at(5.0)
    assert [(each.child, len(each.jobs)) for each in stands_still(world)] == [(tracer, 1)] * others


# -- a tracer breaks the protocol


@pytest.mark.parametrize("wrong", ["garbage", "a stranger's id", "no id"])
def test_a_tracer_that_breaks_the_protocol_loses_all_its_jobs(wrong: str) -> None:
    world = world_of_tracers(3)
    jobs = [world.send_traced(name)[0] for name in "xy"]
    unasked = world.submit("z")
    world.trace(unasked)
    [tracer] = tracers_of(world)
    if wrong == "garbage":
        actions = world.tell(world.scheduler.faulted, tracer, "not JSON")
    else:
        actions = reply(world, tracer, Traced(id="nobody" if wrong == "a stranger's id" else None))
    assert kills(actions)[0] == signal.SIGKILL
    assert {each[0] for each in lost_with(actions)} == {*jobs, unasked}
    assert {each[2] for each in lost_with(actions)} == {tracer}
    assert all(isinstance(each[1], Lost) for each in lost_with(actions))
    assert world.idle()
    # What it says after that is not heard.
    assert reply(world, tracer, Traced(id="x")) == []


def test_a_tracer_that_replies_before_it_can_have_read_the_task_is_replaced() -> None:
    world = world_of_tracers(tracers=2)
    job = world.submit()
    world.note(world.scheduler.trace, job, TASK)
    actions = world.scheduler.dispatch(world.now)
    [write] = actions
    assert isinstance(write, Write)
    assert write.job.state is JobState.RESERVED
    actions = reply(world, write.child, Traced(id="x"))
    assert kills(actions) == [signal.SIGKILL]
    assert ends(actions) == []
    assert trace_of(job).child not in (None, write.child)


# -- a job ends while it is traced

STATES = [JobState.QUEUED, JobState.RESERVED, JobState.SENT]


def job_with_trace(world: World, state: JobState, **limits: float) -> Job:
    """A job that its child has, with a trace in `state`."""
    job = world.submit(**limits)
    world.note(world.scheduler.trace, job, TASK)
    if state is not JobState.QUEUED:
        decided = world.scheduler.dispatch(world.now)
        if state is JobState.SENT:
            world.perform(decided)
    assert trace_of(job).state is state
    return job


@pytest.mark.parametrize("how", ["terminated", "timed out", "given up"])
@pytest.mark.parametrize("state", STATES)
def test_if_a_job_ends_its_tracer_lets_go_of_it(state: JobState, how: str) -> None:
    world = world_of_tracers()
    [tracer] = tracers_of(world)
    job = job_with_trace(world, state, timeout=4.0)
    trace, child = trace_of(job), child_of(job)
    outcome: Outcome
    if how == "terminated":
        outcome = Terminated(signal.SIGTERM)
        actions = world.note(world.scheduler.terminate, job, signal.SIGTERM)
    elif how == "timed out":
        outcome = TimedOut(4.0)
        world.now = 4.0
        actions = world.scheduler.tick(world.now)
    else:
        outcome = Lost(None, "a bug")
        actions = world.note(world.scheduler.give_up, job, "a bug")
    assert actions == [Resolve(job, outcome, child, unfinished=True)]
    assert (job.state, child.state) == (JobState.CLOSED, ChildState.IDLE)

    actions = world.turn()
    if state is JobState.SENT:
        assert actions == [Abandon(tracer, trace, revoked=how == "terminated")]
        actions = reply(world, tracer, Released(id="x"))
        assert actions == [Finished(job, Released(id="x"))]
    else:
        # The tracer has not begun it.
        assert actions == [Finished(job, None)]
    assert (trace.state, tracer.state, tracer.jobs) == (JobState.CLOSED, ChildState.IDLE, {})
    assert tracer in tracer.group.available
    assert (world.idle(), world.at(100.0)) == (True, [])


def test_a_job_that_is_ended_because_the_worker_stops_is_not_revoked() -> None:
    """Celery has stored RETRY, and its message comes again."""
    world = world_of_tracers()
    job, _, tracer = world.send_traced()
    reason = CancelReason.SHUTDOWN
    actions = world.perform(world.scheduler.terminate(job, 15, world.now, reason)) + world.turn()
    assert lost_with(actions)[0][1] == Terminated(15, reason)
    assert Abandon(tracer, trace_of(job), revoked=False) in actions


def test_if_a_child_loses_a_job_its_tracer_lets_go_of_it() -> None:
    world = world_of_tracers()
    job, child, tracer = world.send_traced()
    actions = world.tell(world.scheduler.exited, child, -11, READ_ALL)
    assert ends(actions) == [Resolve(job, CRASH, child, unfinished=True)]
    assert Abandon(tracer, trace_of(job), revoked=False) in actions
    assert reply(world, tracer, Released(id="x")) == [Finished(job, Released(id="x"))]


def test_the_end_of_a_trace_that_comes_before_its_tracer_was_told_counts() -> None:
    world = world_of_tracers()
    job, child, tracer = world.send_traced()
    actions = world.note(world.scheduler.terminate, job, signal.SIGTERM)
    assert actions[0] == Resolve(job, Terminated(signal.SIGTERM), child, unfinished=True)
    traced = Traced(id="x")
    assert world.note(world.scheduler.replied, tracer, traced) == [Finished(job, traced)]
    # There is nothing to let go of any more.
    assert not any(isinstance(action, Abandon) for action in world.turn())
    assert tracer.state is ChildState.IDLE


def test_the_end_of_a_trace_may_cross_with_the_news_that_its_job_is_over() -> None:
    world = world_of_tracers()
    job, _, tracer = world.send_traced()
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    traced = Traced(id="x")
    assert reply(world, tracer, traced) == [Finished(job, traced)]
    assert (tracer.state, world.idle()) == (ChildState.IDLE, True)


def test_nobody_tells_a_tracer_of_a_job_that_is_over() -> None:
    world = world_of_tracers()
    job, _, tracer = world.send_traced()
    reply(world, tracer, Traced(id="x"))
    assert world.tell(world.scheduler.tell, job, LINE) == []
    assert world.tell(world.scheduler.trace, job, TASK) == []


def test_a_job_that_is_over_before_its_trace_begins_is_not_traced() -> None:
    world = world_of_tracers()
    job = world.submit()
    assert ends(world.tell(world.scheduler.terminate, job, signal.SIGTERM)) == [
        Resolve(job, Terminated(signal.SIGTERM), world.children()[0])
    ]
    assert world.tell(world.scheduler.trace, job, TASK) == []
    assert (job.trace, world.idle()) == (None, True)


def test_a_tracer_that_has_to_let_go_gets_no_other_trace_until_it_has() -> None:
    """It may have to die, with all that it has."""
    world = world_of_tracers(2)
    job, _, tracer = world.send_traced()
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    trace = world.trace(world.submit("y"))
    assert trace.state is JobState.QUEUED
    reply(world, tracer, Released(id="x"))
    assert trace.child is tracer


def test_a_tracer_that_does_not_let_go_is_ended() -> None:
    world = world_of_tracers(2)
    other, _, tracer = world.send_traced("other")
    job, _, _ = world.send_traced()
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert world.at(2.9) == []
    actions = world.at(3.0)
    reason = "it went on with task.x[x] for 3 s after it was told that the job is over (revoked)"
    assert Kill(tracer, signal.SIGKILL) in actions
    assert [report.reason for report in reports(actions)] == [reason]
    assert ends(actions) == []
    actions = world.tell(world.scheduler.exited, tracer, -9, READ_ALL)
    # It took another one with it.
    assert ends(actions) == [Finished(job, None), Resolve(other, Lost(-9, reason), tracer)]
    assert world.idle()


@pytest.mark.parametrize("mine", [True, False])
def test_what_a_tracer_says_while_it_is_ended_counts(mine: bool) -> None:
    world = world_of_tracers(2)
    other, _, tracer = world.send_traced("other")
    job, _, _ = world.send_traced()
    answer(world, other)
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    world.at(3.0)
    assert tracer.state is ChildState.STOPPING
    last = Released(id="x") if mine else Traced(id="other")
    assert ends(reply(world, tracer, last)) == [Finished(job if mine else other, last)]
    actions = world.tell(world.scheduler.exited, tracer, -9, READ_ALL)
    left = {end.job for end in ends(actions) if isinstance(end, (Resolve, Finished))}
    assert left == ({other} if mine else {job})
    assert world.idle()


def test_a_tracer_that_dies_has_let_go_of_all() -> None:
    world = world_of_tracers()
    job, _, tracer = world.send_traced()
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    assert ends(actions) == [Finished(job, None)]
    assert world.idle()


def test_a_trace_of_a_job_that_is_over_goes_to_no_other_tracer() -> None:
    world = world_of_tracers(tracers=2)
    job = world.submit()
    first = child_of(world.trace(job))
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    actions = world.tell(world.scheduler.exited, first, -11, READ_NOTHING)
    assert ends(actions) == [Finished(job, None)]
    assert not any(isinstance(action, Write) for action in actions)
    assert world.idle()


# -- limits


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.SENT])
def test_the_hard_limit_goes_on_while_a_tracer_stores(state: JobState) -> None:
    world = world_of_tracers()
    job, child = world.send(tracing=Tracing.UNLESS_OK, timeout=5.0, soft_timeout=4.0)
    [tracer] = tracers_of(world)
    if state is JobState.QUEUED:
        world.tell(world.scheduler.exited, tracer, 1, READ_ALL)
        world.spawns_fail = True
    reply(world, child, Error(id="x"))
    trace = world.trace(job)
    assert trace.state is state
    assert ends(world.at(4.9)) == []
    actions = world.at(5.0)
    over = Resolve(job, TimedOut(5.0), None, unfinished=True)
    if state is JobState.QUEUED:
        assert ends(actions) == [over, Finished(job, None)]
    else:
        assert actions == [over, Abandon(tracer, trace, revoked=False)]
        assert ends(reply(world, tracer, Released(id="x"))) == [Finished(job, Released(id="x"))]
    assert world.idle()


def test_a_traced_job_hands_its_hard_limit_over_to_its_trace() -> None:
    world = world_of_tracers()
    job, _, tracer = world.send_traced(timeout=5.0)
    trace = trace_of(job)
    assert trace.deadline is None
    answer(world, job)
    assert trace.deadline == 5.0
    assert world.at(5.0) == [
        Resolve(job, TimedOut(5.0), None, unfinished=True),
        Abandon(tracer, trace, revoked=False),
    ]


def test_the_hard_limit_of_a_job_is_over_once() -> None:
    world = world_of_tracers(2)
    job, _, tracer = world.send_traced(timeout=5.0)
    answer(world, job)
    world.send_traced("y", timeout=6.0)
    world.at(5.0)
    # The tracer is looked at again while it has still to let go of the first one.
    actions = world.at(6.0)
    assert [each.task_id for each, _, _ in lost_with(actions)] == ["y"]
    assert reply(world, tracer, Released(id="x")) == [Finished(job, Released(id="x"))]


def test_a_trace_counts_for_no_limit_before_its_job_is_answered() -> None:
    world = world_of_tracers()
    job, child, tracer = world.send_traced(soft_timeout=2.0)
    world.at(2.0)
    assert world.at(1000.0) == []
    assert (job.state, tracer.state) == (JobState.SENT, ChildState.BUSY)
    assert reply(world, child, Ok(id="x")) != []


# -- which tracer


def test_the_least_busy_tracer_gets_the_next_trace() -> None:
    world = world_of_tracers(9, tracers=2)
    jobs = [world.send_traced(str(number))[0] for number in range(4)]
    first, second = tracers_of(world)
    assert [len(first.jobs), len(second.jobs)] == [2, 2]
    # One stands still, the other goes on.
    for job in jobs:
        tracer = child_of(trace_of(job))
        if tracer is first:
            reply(world, first, Traced(id=job.task_id))
    assert [child_of(world.trace(world.submit(name))) for name in ("a", "b")] == [first, first]
    assert len(first.jobs) == len(second.jobs) == 2


def test_a_tracer_has_no_more_traces_than_it_may() -> None:
    world = world_of_tracers(3, most=2)
    traces = [world.trace(world.submit(name)) for name in "xyz"]
    assert [trace.state for trace in traces] == [JobState.SENT, JobState.SENT, JobState.QUEUED]
    reply(world, tracers_of(world)[0], Traced(id="x"))
    assert traces[2].state is JobState.SENT


def test_two_traces_of_one_id_are_never_in_one_tracer() -> None:
    """A message may be delivered again while its job runs, or before a tracer has let go of it."""
    world = world_of_tracers(3)
    job, _, tracer = world.send_traced("x")
    again = world.submit("x")
    trace = world.trace(again)
    assert (again.state, trace.state) == (JobState.RESERVED, JobState.QUEUED)
    # Those behind it do not wait for it.
    assert world.trace(world.submit("y")).child is tracer
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert trace.state is JobState.QUEUED
    assert Finished(job, Released(id="x")) in reply(world, tracer, Released(id="x"))
    assert trace.child is tracer
    traced = Traced(id="x")
    assert ends(reply(world, tracer, traced)) == [Finished(again, traced)]


def test_two_traces_of_one_id_may_be_in_two_tracers() -> None:
    world = world_of_tracers(2, tracers=2)
    first, second = (world.submit("x") for _ in range(2))
    assert child_of(world.trace(first)) is not child_of(world.trace(second))


# -- tracers that crash


def test_jobs_in_a_tracer_that_crashes_are_traced_alone_when_they_come_again() -> None:
    world = world_of_tracers(9, most=9, max_crashes=2)
    jobs = [world.send_traced(name)[0] for name in ("poison", "one")]
    [tracer] = tracers_of(world)
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    # Which one it was is unknown.
    assert sorted_by_id(lost_with(actions)) == [(job, CRASH, tracer) for job in jobs[::-1]]
    tracer = next_tracer(world)
    # They are delivered again, and others come.
    jobs = [world.submit(name) for name in ("poison", "one", "x")]
    for job in jobs:
        world.trace(job)
    assert list(tracer.jobs) == ["poison"]
    world.ask(jobs[0])
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    assert lost_with(actions) == [(jobs[0], CRASH, tracer)]
    tracer = next_tracer(world)
    assert list(tracer.jobs) == ["one"]
    world.ask(jobs[1])
    answer(world, jobs[1])
    reply(world, tracer, Traced(id="one"))
    # It is suspected no more.
    assert list(tracer.jobs) == ["x"]
    assert world.trace(world.submit("one")).child is tracer
    for name in ("x", "one"):
        reply(world, tracer, Traced(id=name))
    # The other one has crashed one alone, and does so again.
    last, _, _ = world.send_traced("poison")
    actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
    assert lost_with(actions) == [(last, Lost(-11, "", crashes=2), tracer)]


@pytest.mark.parametrize("state", [JobState.SENT, JobState.ANSWERED])
def test_a_job_is_suspected_until_its_trace_has_ended(state: JobState) -> None:
    world = world_of_tracers(max_crashes=3)
    crashes = []
    for _ in range(3):
        job, _, tracer = world.send_traced()
        if state is JobState.ANSWERED:
            # Its child has survived it.
            answer(world, job)
        [(_, lost, _)] = lost_with(world.tell(world.scheduler.exited, tracer, -11, READ_ALL))
        assert isinstance(lost, Lost)
        crashes.append(lost.crashes)
        next_tracer(world)
    assert crashes == [0, 0, 3]


def test_a_tracer_that_lets_go_of_a_job_does_not_clear_it() -> None:
    world = world_of_tracers()
    crashes = []
    for _ in range(3):
        _, child, tracer = world.send_traced()
        [(_, lost, _)] = lost_with(world.tell(world.scheduler.exited, child, -11, READ_ALL))
        assert isinstance(lost, Lost)
        crashes.append(lost.crashes)
        reply(world, tracer, Released(id="x"))
        world.at(world.now + 60.0)
    assert crashes == [0, 0, 3]


def test_the_end_of_a_trace_clears_a_job() -> None:
    world = world_of_tracers(max_crashes=2)
    crashes = []
    for ends_well in (False, True, False):
        job, _, tracer = world.send_traced()
        answer(world, job)
        if ends_well:
            reply(world, tracer, Traced(id="x"))
            continue
        actions = world.tell(world.scheduler.exited, tracer, -11, READ_ALL)
        [(_, lost, _)] = lost_with(actions)
        assert isinstance(lost, Lost)
        crashes.append(lost.crashes)
        if not tracer.jobs_done:
            next_tracer(world)
    assert crashes == [0, 0]


# -- tracers on demand


def world_on_demand(size: int = 1) -> World:
    tracers = kind(size, handshake=True, max_in_flight=9)
    return World(a=kind(2), tracers=tracers, on_demand=TRACERS)


def test_tracers_on_demand_start_with_the_first_trace() -> None:
    world = world_on_demand(2)
    assert (tracers_of(world), world.scheduler.booting) == ([], False)
    world.send("fast", tracing=Tracing.UNLESS_OK)
    assert world.at(100.0) == []
    assert tracers_of(world) == []
    job = world.submit()
    actions = world.tell(world.scheduler.trace, job, TASK)
    assert [action.child for action in actions if isinstance(action, Spawn)] == tracers_of(world)
    assert len(tracers_of(world)) == 2
    assert trace_of(job).state is JobState.QUEUED
    [tracer, _] = tracers_of(world)
    assert Write(tracer, trace_of(job)) in world.tell(
        world.scheduler.ready, tracer, READY_TO_TRACE, None
    )
    # From now on they are like all children.
    actions = world.tell(world.scheduler.exited, tracer, 1, READ_ALL)
    assert next_tracer(world).slot is tracer.slot


def test_tracers_on_demand_start_for_a_task_of_celerys_own() -> None:
    world = world_on_demand()
    own = world.submit("own", TRACERS, Tracing.NEVER)
    [tracer] = tracers_of(world)
    world.tell(world.scheduler.ready, tracer, READY_TO_TRACE, None)
    assert own.child is tracer


def test_a_restart_starts_no_tracers_that_nobody_needs() -> None:
    world = world_on_demand()
    assert world.tell(world.scheduler.restart, [world.scheduler.groups[TRACERS]]) == []
    assert tracers_of(world) == []
    world.trace(world.submit())
    assert len(tracers_of(world)) == 1


def test_a_trace_that_begins_while_the_worker_closes_has_its_tracer() -> None:
    world = world_on_demand()
    job = world.submit()
    assert world.tell(world.scheduler.close) == []
    tracer = new_child(world.tell(world.scheduler.trace, job, TASK))
    world.tell(world.scheduler.ready, tracer, READY_TO_TRACE, None)
    assert trace_of(job).child is tracer


def test_a_trace_that_waits_for_its_tracers_start_survives_a_close() -> None:
    world = world_on_demand()
    job = world.submit()
    world.note(world.scheduler.trace, job, TASK)
    tracer = new_child(world.tell(world.scheduler.close))
    assert tracer.group.name == TRACERS
    assert (trace_of(job).state, ends(world.at(1.0))) == (JobState.QUEUED, [])


def test_no_tracer_starts_once_the_worker_stops() -> None:
    world = world_on_demand()
    job = world.submit()
    world.tell(world.scheduler.stop)
    assert not [
        action
        for action in world.tell(world.scheduler.trace, job, TASK)
        if isinstance(action, Spawn)
    ]


# -- the worker stops


def world_without_tracers(state: JobState) -> tuple[World, Job]:
    """A world whose tracers can't start, and a job in `state` whose trace waits."""
    world = world_of_tracers()
    if state is JobState.ANSWERED:
        job, child = world.send(tracing=Tracing.UNLESS_OK)
        reply(world, child, Error(id="x"))
    else:
        job = world.submit()
    [tracer] = tracers_of(world)
    world.tell(world.scheduler.exited, tracer, 1, READ_ALL)
    world.trace(job)
    assert (job.state, trace_of(job).state) == (state, JobState.QUEUED)
    return world, job


@pytest.mark.parametrize("state", [JobState.RESERVED, JobState.ANSWERED])
def test_a_job_is_given_up_that_no_tracer_can_trace(state: JobState) -> None:
    world, job = world_without_tracers(state)
    tracer = new_child(world.tell(world.scheduler.close))
    assert ends(world.at(1.0)) == []
    world.note(world.scheduler.boot_failed, tracer, "no licence")
    # All of it at once: nothing else may happen.
    actions = world.perform(world.scheduler.dispatch(world.now))
    why = "the worker stops, and no child of the group tracers can start: no licence"
    # Its message may come again without harm only if its child has not begun it.
    lost = Lost(None, why, stranded=state is JobState.RESERVED)
    assert [each[:2] for each in lost_with(actions)] == [(job, lost)]
    assert world.idle()
    assert world.children()[0].state is ChildState.IDLE


def test_a_trace_of_a_job_that_is_given_up_is_over_at_once() -> None:
    world = world_of_tracers()
    job = world.submit()
    trace, child = world.trace(job), child_of(job)
    tracer = child_of(trace)
    world.tell(world.scheduler.exited, child, 1, READ_ALL)
    child = new_child(world.tell(world.scheduler.close))
    world.note(world.scheduler.exited, child, 1, READ_ALL)
    actions = world.perform(world.scheduler.dispatch(world.now))
    assert Abandon(tracer, trace, revoked=False) in actions


def test_traces_wait_for_no_limit_when_the_worker_closes() -> None:
    world = world_on_demand()
    job = world.submit()
    world.tell(world.scheduler.trace, job, TASK)
    world.tell(world.scheduler.shrink, 10)
    assert ends(world.tell(world.scheduler.close)) == []
    [tracer] = tracers_of(world)
    world.tell(world.scheduler.ready, tracer, READY_TO_TRACE, None)
    assert trace_of(job).child is tracer


def test_a_stop_gives_back_what_is_traced() -> None:
    world = world_of_tracers()
    job, child, tracer = world.send_traced()
    actions = world.tell(world.scheduler.stop)
    assert {Kill(child, signal.SIGKILL), Kill(tracer, signal.SIGKILL)} <= {*actions}
    # What it says now counts no more.
    assert reply(world, tracer, Traced(id="x")) == []
    lost = Lost(-9, "the worker stops")
    actions = world.tell(world.scheduler.exited, tracer, -9, READ_ALL)
    assert lost_with(actions) == [(job, lost, tracer)]
    assert ends(world.tell(world.scheduler.exited, child, -9, READ_ALL)) == []
    assert world.idle()


@pytest.mark.parametrize("grace", [1.0, 60.0])
def test_a_tracer_that_has_to_let_go_has_its_time_in_a_stop_too(grace: float) -> None:
    world = world_of_tracers(cancel_grace=grace)
    job, _, tracer = world.send_traced()
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert world.idle()
    assert CloseStdin(tracer) in world.tell(world.scheduler.stop)
    # Not longer than it would have to exit without that.
    last = min(grace, tracer.group.settings.stop_timeout)
    assert Kill(tracer, signal.SIGKILL) not in world.at(last - 0.1)
    assert Kill(tracer, signal.SIGKILL) in world.at(last)
    actions = world.tell(world.scheduler.exited, tracer, -9, READ_ALL)
    assert ends(actions) == [Finished(job, None)]


# -- jobs that can't be brought to their end


@pytest.mark.parametrize("state", [JobState.RESERVED, JobState.SENT, JobState.ANSWERED])
def test_a_job_may_be_given_up(state: JobState) -> None:
    world = world_of_tracers()
    job = world.submit()
    child, tracer = child_of(job), child_of(world.trace(job))
    if state is not JobState.RESERVED:
        world.ask(job)
    if state is JobState.ANSWERED:
        answer(world, job)
    assert job.state is state
    actions = world.tell(world.scheduler.give_up, job, "a bug")
    culprit = None if state is JobState.ANSWERED else child
    assert actions[0] == Resolve(job, Lost(None, "a bug"), culprit, unfinished=True)
    assert Abandon(tracer, trace_of(job), revoked=False) in actions
    assert kills(actions) == ([signal.SIGTERM] if state is JobState.SENT else [])
    assert world.tell(world.scheduler.give_up, job, "a bug") == []
    reply(world, tracer, Released(id="x"))
    assert world.idle()


def test_a_job_without_a_trace_may_be_given_up() -> None:
    world = world_of_tracers()
    job = world.submit()
    child = child_of(job)
    actions = world.tell(world.scheduler.give_up, job, "it can't be sent")
    assert actions == [Resolve(job, Lost(None, "it can't be sent"), child)]
    assert (child.state, world.idle()) == (ChildState.IDLE, True)
