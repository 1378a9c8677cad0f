"""When a child has proved itself, and when a group is degraded."""

from __future__ import annotations

import signal

from celery_subproc_pool.core.actions import (
    CloseStdin,
    Healed,
    Recycled,
)
from celery_subproc_pool.core.booting import STARTUP_GRACE
from celery_subproc_pool.core.model import (
    ChildState,
)
from tests.support.world import (
    READ_ALL,
    READY,
    World,
    do,
    kills,
    kind,
    new_child,
)


def test_a_successor_that_cannot_tell_proves_itself_by_living() -> None:
    world = World(a=kind(1, max_age=100.0))
    [child] = world.children()
    successor = new_child(world.at(90.0))
    assert world.at(90.0 + STARTUP_GRACE / 2) == []
    assert successor.state is ChildState.STARTING
    assert world.at(90.0 + STARTUP_GRACE) == [Recycled(child, successor), CloseStdin(child)]
    assert successor.state is ChildState.IDLE


def test_a_successor_that_closes_its_stdout_has_proved_nothing() -> None:
    world = World(a=kind(1, max_age=100.0))
    [child] = world.children()
    successor = new_child(world.at(90.0))
    world.tell(world.scheduler.stdout_closed, successor)
    actions = world.at(90.0 + STARTUP_GRACE)
    assert kills(actions) == [signal.SIGKILL]
    assert child.slot.child is child


def test_a_group_comes_up_when_a_child_has_lived_for_a_moment() -> None:
    world = World(a=kind(1))
    group = world.scheduler.groups["a"]
    [child] = world.children()
    child.proven = group.came_up = False
    child.startup_grace_until = 5.0
    assert world.scheduler.booting
    world.tell(world.scheduler.stdout_closed, child)
    assert world.scheduler.booting, "its exit status is still to come"
    world.tell(world.scheduler.exited, child, 127, READ_ALL)
    assert not world.scheduler.booting
    assert not group.came_up
    assert group.failure == "it closed its stdout; it exited: exitcode 127"


def test_a_job_done_is_proof_too() -> None:
    world = World(a=kind(1))
    world.tell(world.scheduler.exited, world.children()[0], 1, READ_ALL)
    child = new_child(world.at(0.1))
    assert not child.proven
    _, actions = do(world)
    assert child.proven
    assert Healed(world.scheduler.groups["a"]) in actions


def test_a_group_is_healed_when_all_its_children_have_proved_themselves() -> None:
    world = World(a=kind(2))
    group = world.scheduler.groups["a"]
    first, second = world.children()
    world.tell(world.scheduler.exited, first, 1, READ_ALL)
    world.tell(world.scheduler.exited, second, 1, READ_ALL)
    assert (group.degraded, group.in_service, group.backing_off) == (True, 0, 2)
    world.spawns_fail = True
    world.at(0.1)
    world.spawns_fail = False
    world.at(0.31)
    assert (group.in_service, group.backing_off) == (2, 0)
    assert world.at(0.8) == []
    assert world.at(0.82) == [Healed(group)]
    assert not group.degraded


def test_a_group_whose_children_get_ready_and_die_stays_degraded() -> None:
    world = World(a=kind(1, handshake=True))
    group = world.scheduler.groups["a"]
    [child] = world.children()
    world.tell(world.scheduler.ready, child, READY, None)
    world.tell(world.scheduler.exited, child, 3, READ_ALL)
    child = new_child(world.at(0.1))
    assert world.tell(world.scheduler.ready, child, READY, None) == []
    world.tell(world.scheduler.exited, child, 3, READ_ALL)
    child = new_child(world.at(5.0))
    assert world.tell(world.scheduler.ready, child, READY, None) == []
    assert world.at(5.0 + STARTUP_GRACE - 0.1) == []
    assert group.degraded
    assert world.at(5.0 + STARTUP_GRACE) == [Healed(group)]
    assert world.at(9.0) == []


def test_a_group_with_a_slot_that_backs_off_is_degraded() -> None:
    world = World(a=kind(2, handshake=True))
    group = world.scheduler.groups["a"]
    first, second = world.children()
    for child in (first, second):
        world.tell(world.scheduler.ready, child, READY, None)
    world.tell(world.scheduler.exited, first, 3, READ_ALL)
    first = new_child(world.at(0.1))
    world.tell(world.scheduler.ready, first, READY, None)
    world.tell(world.scheduler.exited, second, 3, READ_ALL)
    assert world.at(0.1 + STARTUP_GRACE) != [Healed(group)]
    assert group.degraded


def test_a_child_that_exits_after_a_job_does_not_degrade_its_group() -> None:
    world = World(a=kind())
    do(world)
    world.tell(world.scheduler.exited, world.children()[0], 1, READ_ALL)
    assert not world.scheduler.groups["a"].degraded


def test_children_spawned_after_a_change_read_the_new_boot() -> None:
    world = World(a=kind())
    assert world.tell(world.scheduler.change_boot, "a", b"new") == []
    assert world.scheduler.groups["a"].boot == b"new"
