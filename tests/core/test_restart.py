"""A restart of the pool, by an operator."""

from __future__ import annotations

from celery_subproc_pool.core.actions import (
    CloseStdin,
    Recycled,
    Spawn,
)
from celery_subproc_pool.core.model import (
    Cause,
    ChildState,
    Exit,
    JobState,
)
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
    READ_ALL,
    READY,
    World,
    do,
    kind,
    new_child,
    successor_of,
    world_of,
)


def test_a_restart_replaces_all_children_few_at_a_time() -> None:
    world = world_of(4)
    group, old = world.scheduler.groups["a"], world.children()
    assert world.started == old
    actions = world.tell(world.scheduler.restart, [group])
    for child in old:
        successor = new_child(actions)
        assert group.in_service == 4
        actions = world.tell(world.scheduler.ready, successor, READY, None)
        assert Recycled(child, successor) in actions
        assert world.started[-1] is successor
        assert child.slot.last_exit == Exit(child.pid, "the pool is restarted", 0.0)
    assert not [action for action in actions if isinstance(action, Spawn)]
    assert group.counters.replaced == {Cause.RECYCLED: 4}


def test_a_restart_interrupts_no_job() -> None:
    world = world_of()
    job, child = world.send()
    world.tell(world.scheduler.restart, [child.group])
    world.tell(world.scheduler.ready, successor_of(child), READY, None)
    assert (job.state, child.state) == (JobState.SENT, ChildState.BUSY)
    assert CloseStdin(child) in world.tell(world.scheduler.replied, child, Ok())


def test_children_that_boot_at_a_restart_are_replaced_too() -> None:
    world = World(a=kind(1, handshake=True))
    [first] = world.children()
    second = new_child(world.tell(world.scheduler.restart, [first.group]))
    # It may have read the old code already.
    assert not world.tell(world.scheduler.ready, first, READY, None)
    third = new_child(
        world.tell(world.scheduler.restart, [first.group])
        + world.tell(world.scheduler.ready, second, READY, None)
    )
    assert third.slot.child is second
    assert Recycled(second, third) in world.tell(world.scheduler.ready, third, READY, None)
    assert world.scheduler.groups["a"].slots[0].child is third
    assert not third.recycle_reason


def test_a_successor_that_is_to_be_recycled_is_so_after_it_took_over() -> None:
    world = world_of()
    [child] = world.children()
    first = new_child(world.tell(world.scheduler.restart, [child.group]))
    world.tell(world.scheduler.restart, [child.group])
    actions = world.tell(world.scheduler.exited, child, 1, READ_ALL)
    assert child.slot.child is first
    assert successor_of(first) is new_child(actions)


def test_a_restart_ends_the_back_off() -> None:
    world = world_of()
    [child] = world.children()
    world.tell(world.scheduler.exited, child, 1, READ_ALL)
    assert child.slot.spawn_at == 0.1
    assert child.slot.last_exit == Exit(child.pid, "it exited: exitcode 1", 0.0)
    fresh = new_child(world.tell(world.scheduler.restart, [child.group]))
    assert (child.slot.child, child.slot.failures) == (fresh, 0)


def test_a_successor_that_cannot_start_leaves_the_old_child_after_a_restart() -> None:
    world = world_of()
    [child] = world.children()
    successor = new_child(world.tell(world.scheduler.restart, [child.group]))
    world.tell(world.scheduler.exited, successor, 1, READ_ALL)
    assert do(world)[0] is child
    assert Recycled in map(
        type, world.tell(world.scheduler.ready, new_child(world.at(0.2)), READY, None)
    )
