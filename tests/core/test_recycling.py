"""When children are recycled: max_jobs, max_age, max_memory, at their own wish."""

from __future__ import annotations

import signal

import pytest

from celery_subproc_pool.core.actions import (
    Accept,
    CloseStdin,
    Forget,
    Measure,
    Recycled,
    Resolve,
    Spawn,
)
from celery_subproc_pool.core.model import (
    Cause,
    ChildState,
    JobState,
    Tracing,
)
from celery_subproc_pool.core.outcomes import (
    Answered,
)
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
    READ_ALL,
    READY,
    World,
    child_of,
    do,
    kills,
    kind,
    successor_of,
    world_of,
    world_of_many,
)

MIB = 2**20


def test_a_successor_boots_during_a_childs_last_job() -> None:
    world = world_of(max_jobs=2)
    child, actions = do(world)
    assert not child.recycle_reason
    world.send("y")
    successor = successor_of(child)
    assert (child.recycle_reason, successor.state) == (
        "it has had 2 jobs (max_jobs)",
        ChildState.STARTING,
    )

    world.tell(world.scheduler.replied, child, Ok())
    assert child.state is ChildState.RETIRING
    waiting = world.submit("z")
    assert waiting.state is JobState.QUEUED, "a promise: no job too many"

    actions = world.tell(world.scheduler.ready, successor, READY, None)
    assert actions == [
        Recycled(child, successor),
        CloseStdin(child),
        Accept(waiting, successor, 0.0),
    ]
    assert world.tell(world.scheduler.exited, child, 0, READ_ALL) == [Forget(child)]
    assert world.scheduler.groups["a"].counters.replaced == {Cause.RECYCLED: 1}


def test_a_child_whose_successor_is_ready_ends_its_job_first() -> None:
    world = world_of(max_jobs=1)
    job, child = world.send("x")
    successor = successor_of(child)
    assert world.tell(world.scheduler.ready, successor, READY, None) == [Recycled(child, successor)]
    assert (child.state, successor.state) == (ChildState.BUSY, ChildState.IDLE)
    assert child_of(world.submit("y")) is successor
    assert world.tell(world.scheduler.replied, child, Ok()) == [
        Resolve(job, Answered(Ok()), child),
        CloseStdin(child),
    ]


def test_recycle_jitter_lowers_max_jobs_for_each_child() -> None:
    numbers = iter([0.0, 0.5, 1.0, 1.0])
    world = World(a=kind(3, max_jobs=100), random=lambda: next(numbers))
    assert [child.recycle_after_jobs for child in world.children()] == [100, 95, 90]
    world = World(a=kind(1, max_jobs=1), random=lambda: 1.0)
    assert [child.recycle_after_jobs for child in world.children()] == [1]


def test_a_child_serves_until_max_jobs_while_its_successor_boots() -> None:
    world = world_of(max_jobs=10, recycle_jitter=0.5)
    for number in range(5):
        child, _ = do(world, str(number))
    assert child.recycle_reason
    for number in range(5):
        assert do(world, f"more{number}")[0] is child
    assert child.state is ChildState.RETIRING


def test_a_job_whose_request_was_not_written_does_not_count_for_max_jobs() -> None:
    world = world_of(max_jobs=1)
    job = world.submit()
    child = child_of(job)
    world.tell(world.scheduler.terminate, job, signal.SIGTERM)
    assert (child.state, child.jobs_begun) == (ChildState.IDLE, 0)


def test_an_old_child_serves_until_another_can() -> None:
    world = world_of(max_age=100.0)
    [child] = world.children()
    assert world.at(89.9) == []
    assert world.at(90.0) == [Spawn(successor_of(child))]
    assert child.recycle_reason == "it is 90 s old (max_age)"
    assert do(world)[0] is child
    successor = successor_of(child)
    world.now = 95.0
    assert world.tell(world.scheduler.ready, successor, READY, None) == [
        Recycled(child, successor),
        CloseStdin(child),
    ]
    assert Spawn in map(type, world.at(185.0)), "its own age counts from when it was ready"


def test_a_job_is_not_interrupted_because_its_child_is_old() -> None:
    world = world_of(max_age=100.0)
    job, child = world.send()
    actions = world.at(90.0) + world.tell(world.scheduler.ready, successor_of(child), READY, None)
    assert not kills(actions)
    assert world.at(5000.0) != []
    assert job.state is JobState.SENT
    assert CloseStdin(child) in world.tell(world.scheduler.replied, child, Ok())


def test_memory_is_measured_after_each_job() -> None:
    world = world_of(max_memory=100 * MIB)
    child, actions = do(world)
    assert Measure(child) in actions
    world.tell(world.scheduler.measured, child, 90 * MIB)
    assert not child.recycle_reason
    actions = world.tell(world.scheduler.measured, child, 90 * MIB + 1)
    assert child.recycle_reason == "it takes 90 MiB of memory (max_memory)"
    assert actions == [Spawn(successor_of(child))]
    assert Measure(child) not in do(world, "y")[1], "it is known"


def test_without_max_memory_no_memory_is_measured() -> None:
    world = world_of()
    child, actions = do(world)
    assert Measure(child) not in actions
    world.tell(world.scheduler.measured, child, 10**12)
    assert not child.recycle_reason


def test_a_child_may_ask_to_be_replaced() -> None:
    world = world_of()
    child, actions = do(world, retire=True)
    assert child.recycle_reason == "it asked for it (retire)"
    assert Spawn(successor_of(child)) in actions
    assert child.state is ChildState.IDLE


@pytest.mark.parametrize(("size", "most"), [(1, 1), (3, 1), (7, 1), (8, 2), (16, 4)])
def test_a_quarter_of_a_group_is_recycled_at_a_time(size: int, most: int) -> None:
    world = World(a=kind(size, handshake=True, max_age=100.0), limit=100)
    for child in world.children():
        world.tell(world.scheduler.ready, child, READY, None)
    old = world.children()
    booting = [action.child for action in world.at(90.0) if isinstance(action, Spawn)]
    assert len(booting) == most
    replaced = 0
    while booting:
        replaced += 1
        actions = world.tell(world.scheduler.ready, booting.pop(0), READY, None)
        booting += [action.child for action in actions if isinstance(action, Spawn)]
        assert len(booting) <= most
        assert world.scheduler.groups["a"].in_service == size
    assert replaced == size
    assert all(child.state is ChildState.STOPPING for child in old)


def test_successors_of_children_at_max_jobs_boot_at_once() -> None:
    world = world_of(4, max_jobs=1)
    children = [world.send(str(number))[1] for number in range(4)]
    # While they work, one at a time; when they have worked, they are missed.
    assert [child.slot.successor is not None for child in children].count(True) == 4


def test_a_child_with_many_jobs_gets_no_more_than_max_jobs() -> None:
    world = world_of_many(1, 10, max_jobs=4)
    _, child = world.send("0")
    world.tell(world.scheduler.replied, child, Ok(id="0"))
    jobs = [world.submit(str(number), tracing=Tracing.NEVER) for number in range(1, 6)]
    assert [job.child is child for job in jobs] == [True] * 3 + [False] * 2
