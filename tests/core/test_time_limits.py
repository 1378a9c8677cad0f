"""Hard limits, soft limits and `inactivity_timeout` of running jobs."""

from __future__ import annotations

import signal

import pytest

from celery_subproc_pool.core.actions import (
    Cancel,
    Forget,
    Kill,
    Report,
    Resolve,
    SoftTimeout,
    Spawn,
)
from celery_subproc_pool.core.model import (
    ChildState,
    JobState,
)
from celery_subproc_pool.core.outcomes import (
    Answered,
    TimedOut,
)
from celery_subproc_pool.core.timers import LATE
from celery_subproc_pool.wire.messages import CancelReason, Ok
from tests.support.world import (
    READ_ALL,
    World,
    child_of,
    ends,
    kills,
    kind,
    new_child,
    reports,
    world_of_many,
)


def test_a_hard_limit_before_the_request_spares_the_child() -> None:
    world = World(a=kind())
    job = world.submit(timeout=5.0)
    child = child_of(job)
    assert world.at(4.9) == []
    assert world.at(5.0) == [Resolve(job, TimedOut(5.0), child)]
    assert child.state is ChildState.IDLE
    assert world.scheduler.open_jobs == 0


NO_ANSWER = (
    "its job took longer than 5 s (hard time limit); it has never answered: does it flush its"
    " stdout after each reply?"
)


def test_a_hard_limit_replaces_the_child_that_has_the_request() -> None:
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


def test_kill_grace_lets_a_child_clean_up_at_the_hard_limit() -> None:
    world = World(a=kind(kill_grace=2.0))
    job, child = world.send(timeout=5.0)
    actions = world.at(5.0)
    assert actions == [
        Resolve(job, TimedOut(5.0), child),
        Kill(child, signal.SIGTERM),
        Report(child, NO_ANSWER, (job,), 0.0),
        Spawn(new_child(actions)),
    ]
    # Its slot is filled at once.
    assert world.submit("next").child is new_child(actions)
    assert world.at(6.9) == []
    assert world.at(7.0) == [Kill(child, signal.SIGKILL)]
    assert world.tell(world.scheduler.exited, child, -9, READ_ALL) == [Forget(child)]
    assert world.at(100.0) == []


def test_a_child_that_exits_within_kill_grace_is_not_killed() -> None:
    world = World(a=kind(kill_grace=2.0))
    _, child = world.send(timeout=5.0)
    world.at(5.0)
    assert world.tell(world.scheduler.exited, child, 0, READ_ALL) == [Forget(child)]
    assert world.at(100.0) == []


def test_kill_grace_follows_cancel_grace() -> None:
    world = world_of_many(1, 4, cancel_grace=3.0, kill_grace=2.0)
    _, child = world.send("runs", timeout=5.0)
    assert kills(world.at(5.0)) == []
    assert kills(world.at(8.0)) == [signal.SIGTERM]
    assert child.state is ChildState.STOPPING
    assert kills(world.at(10.0)) == [signal.SIGKILL]


def test_a_child_that_has_answered_before_is_not_suspected_of_buffering() -> None:
    world = World(a=kind())
    _, child = world.send()
    world.tell(world.scheduler.replied, child, Ok())
    world.send("y", timeout=5.0)
    [report] = reports(world.at(5.0))
    assert report.reason == "its job took longer than 5 s (hard time limit)"


def test_a_limit_of_a_job_that_was_answered_is_off() -> None:
    world = World(a=kind())
    job, child = world.send(timeout=5.0, soft_timeout=4.0)
    world.tell(world.scheduler.replied, child, Ok())
    assert world.at(5.0) == []
    assert job.state is JobState.CLOSED


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


def test_a_child_may_go_on_after_a_soft_limit_that_need_not_end_the_job() -> None:
    world = world_of_many(1, 5, cancel_grace=1.0)
    world.scheduler.groups["a"].ends_at_soft_limit = False
    job, child = world.send(soft_timeout=2.0, timeout=9.0)
    told = Cancel(child, job, CancelReason.SOFT_TIME_LIMIT)
    assert world.at(2.0) == [told, SoftTimeout(job, child, None)]
    other, _ = world.send("other")
    assert other.child is child
    actions = world.at(9.0)
    assert actions == [
        Resolve(job, TimedOut(9.0), child),
        Cancel(child, job, CancelReason.TIME_LIMIT),
    ]


def test_a_soft_limit_before_the_request_sends_no_signal() -> None:
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


def test_inactivity_is_excused_while_the_engine_was_not_run() -> None:
    """The engine was not turned: children may have waited for room in their pipes."""
    world = world_of_many(1, 4, inactivity_timeout=5.0)
    job, _ = world.send()
    assert ends(world.at(5.0 + LATE + 0.1)) == []
    assert ends(world.at(world.now + 4.9)) == []
    [end] = ends(world.at(world.now + 0.2))
    assert isinstance(end, Resolve)
    assert end.outcome == TimedOut(5.0, silent=True)
    assert job.state is JobState.CLOSED


def test_a_second_cancel_does_not_extend_the_grace() -> None:
    world = world_of_many(1, 4, cancel_grace=3.0)
    job, child = world.send("runs", soft_timeout=1.0, timeout=2.0)
    world.at(1.0)
    assert job.kill_at == 4.0
    world.at(2.0)
    assert (job.kill_at, job.cancelled) == (4.0, CancelReason.TIME_LIMIT)
    assert kills(world.at(4.0)) == [signal.SIGKILL]
    assert child.state is ChildState.STOPPING


def test_inactivity_kills_a_child_that_cannot_cancel() -> None:
    world = World(a=kind(inactivity_timeout=5.0))
    job, child = world.send()
    actions = world.at(5.0)
    assert ends(actions) == [Resolve(job, TimedOut(5.0, silent=True), child)]
    assert kills(actions) == [signal.SIGKILL]
    [report] = reports(actions)
    assert report.reason.startswith("it told nothing of its job for 5 s (inactivity_timeout)")
