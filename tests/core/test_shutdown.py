"""How the worker stops: jobs that wait, jobs that have lost their child, children."""

from __future__ import annotations

import signal

from msgspec.structs import replace

from celery_subproc_pool.core.actions import (
    Action,
    CloseStdin,
    Forget,
    Kill,
    Report,
    Resolve,
    Spawn,
    Stranded,
)
from celery_subproc_pool.core.model import (
    Child,
    ChildState,
    Group,
    Job,
    JobState,
)
from celery_subproc_pool.core.outcomes import (
    Dropped,
    Lost,
)
from celery_subproc_pool.core.scheduler import Scheduler
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
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
)


def test_close_and_flush_drop_only_what_was_not_accepted() -> None:
    world = World(limit=2, a=kind(1), b=kind(1))
    again = world.submit("again", "a")
    world.tell(world.scheduler.exited, child_of(again), 1, READ_ALL)
    waiting, other = world.submit("waiting", "a"), world.submit("other", "b")
    late = world.submit("late", "b")
    assert (again.state, waiting.state) == (JobState.QUEUED, JobState.QUEUED)
    assert [job.accepted for job in (other, late)] == [True, False]

    assert world.scheduler.flush(world.now) == [
        Resolve(waiting, Dropped(), None),
        Resolve(late, Dropped(), None),
    ]
    assert late.state is JobState.CLOSED
    assert list(world.scheduler.groups["a"].waiting) == [again]
    assert world.scheduler.flush(world.now) == []


def test_after_a_flush_jobs_are_taken_and_after_a_close_they_are_dropped() -> None:
    world = World(limit=1, a=kind())
    job, child = world.send("x")
    world.scheduler.flush(world.now)
    waiting = world.submit("y")
    assert waiting.state is JobState.QUEUED
    assert world.scheduler.close(world.now) == [Resolve(waiting, Dropped(), None)]

    late = Job("z", "t", "a")
    assert world.tell(world.scheduler.submit, late) == [Resolve(late, Dropped(), None)]
    assert late.state is JobState.CLOSED

    # What was accepted comes to its end.
    world.tell(world.scheduler.replied, child, Ok())
    assert job.state is JobState.CLOSED
    assert world.idle()


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


def test_a_stop_gives_up_jobs_when_all_slots_of_a_group_have_been_tried() -> None:
    world, job = world_of_broken_boots(2)
    world.tell(world.scheduler.close)
    first, second = world.children()
    assert ends(fail(world, first)) == []
    assert ends(fail(world, second)) == [Resolve(job, STRANDED, None)]


def test_a_stop_gives_up_jobs_if_the_limit_is_0() -> None:
    world, job = world_of_broken_boots()
    world.tell(world.scheduler.shrink, world.scheduler.limit)
    [end] = ends(world.tell(world.scheduler.close))
    assert end == Resolve(
        job,
        replace(
            STRANDED,
            reason="the worker stops, and no child of the group a can start: it has none",
        ),
        None,
    )


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
