"""Jobs that are terminated on request: revoked, or at a shutdown."""

from __future__ import annotations

import signal
from typing import Any

from celery_subproc_pool.core.actions import (
    Accept,
    CloseStdin,
    Forget,
    Interrupt,
    Kill,
    Overruled,
    Report,
    Resolve,
    Spawn,
    Write,
)
from celery_subproc_pool.core.ending import HOLD
from celery_subproc_pool.core.model import (
    Cause,
    ChildState,
    Job,
    JobState,
)
from celery_subproc_pool.core.outcomes import (
    Dropped,
    Terminated,
)
from celery_subproc_pool.wire.messages import CancelReason, Ok, Progress
from celery_subproc_pool.wire.python import Traced
from tests.support.world import (
    READ_ALL,
    STOP_TIMEOUT,
    World,
    child_of,
    ends,
    kills,
    kind,
    new_child,
    reports,
    world_of_many,
    world_of_tracers,
)


def test_a_job_that_is_terminated_before_its_request_was_written_spares_the_child() -> None:
    world = World(a=kind())
    [child] = world.children()
    job = Job("x", "task.x", "a")
    job.request = b"request"
    world.note(world.scheduler.submit, job)
    # What it asks for has not been done yet.
    assert world.scheduler.dispatch(world.now)[0] == Write(child, job)
    actions = world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert actions == [Resolve(job, Terminated(signal.SIGTERM), child)]
    assert (job.state, job.child, child.state) == (JobState.CLOSED, None, ChildState.IDLE)


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
    assert world.idle()


def test_terminating_a_job_before_its_request_spares_the_child() -> None:
    world = World(a=kind())
    job = world.submit()
    child = child_of(job)
    assert world.tell(world.scheduler.terminate, job, 15) == [Resolve(job, Terminated(15), child)]
    assert child.state is ChildState.IDLE


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


def test_revoking_by_the_signal_of_soft_limits_ends_a_child_that_goes_on() -> None:
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


def test_revoking_by_another_signal_ends_the_child_at_once() -> None:
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
    world = world_of_tracers()
    job, child, tracer = world.send_traced()
    world.tell(world.scheduler.replied, child, Ok())
    assert job.state is JobState.ANSWERED
    assert world.tell(world.scheduler.terminate, job, 15) == []
    world.tell(world.scheduler.replied, tracer, Traced(id="x"))
    assert job.state is JobState.CLOSED
    assert world.tell(world.scheduler.terminate, job, 15) == []


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


def test_progress_of_a_job_that_is_over_but_not_answered_is_ignored() -> None:
    world = world_of_many(1, 4)
    job, child = world.send("runs")
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert world.tell(world.scheduler.progressed, child, Progress(id="runs", meta={})) == []
    assert child.serves
    world.tell(world.scheduler.faulted, child, "no JSON")
    assert world.tell(world.scheduler.progressed, child, Progress(id="runs", meta={})) == []
