"""How groups grow and shrink."""

from __future__ import annotations

import pytest

from celery_subproc_pool.core.actions import (
    Accept,
    CloseStdin,
    Forget,
    Resolve,
    Spawn,
)
from celery_subproc_pool.core.model import (
    ChildState,
    JobState,
)
from celery_subproc_pool.core.outcomes import (
    Lost,
)
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
    READ_ALL,
    World,
    child_of,
    ends,
    kind,
    reports,
    world_of_many,
)


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


def test_shrink_takes_a_slot_that_backs_off() -> None:
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
