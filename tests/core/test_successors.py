"""What goes wrong while a successor boots."""

from __future__ import annotations

import signal

import pytest

from celery_subproc_pool.core.actions import (
    Accept,
    CloseStdin,
    Resolve,
    Spawn,
)
from celery_subproc_pool.core.model import (
    ChildState,
)
from celery_subproc_pool.core.outcomes import (
    Lost,
)
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
    READ_ALL,
    READY,
    World,
    do,
    kills,
    kind,
    new_child,
    reports,
    successor_of,
    world_of,
)


def test_a_successor_that_fails_costs_the_old_child_nothing() -> None:
    world = world_of(max_age=100.0)
    [child] = world.children()
    successor = new_child(world.at(90.0))
    [report] = reports(world.tell(world.scheduler.exited, successor, 1, READ_ALL))
    assert report.delay == pytest.approx(0.1)
    assert (child.slot.child, child.slot.successor) == (child, None)
    assert do(world)[0] is child
    assert new_child(world.at(90.2)) is successor_of(child)


def test_failures_are_forgotten_with_max_jobs_of_1_too() -> None:
    world = world_of(max_jobs=1)
    world.tell(world.scheduler.exited, world.children()[0], 1, READ_ALL)
    world.tell(world.scheduler.ready, new_child(world.at(0.1)), READY, None)
    child, _ = do(world)
    assert child.slot.failures == 1
    world.tell(world.scheduler.ready, successor_of(child), READY, None)
    assert child.slot.failures == 0


def test_successors_back_off_however_well_the_old_child_does() -> None:
    world = world_of(max_age=100.0)
    [child] = world.children()
    world.at(90.0)
    delays = []
    for number in range(4):
        [report] = reports(world.tell(world.scheduler.exited, successor_of(child), 1, READ_ALL))
        delays.append(report.delay)
        assert do(world, str(number))[0] is child
        world.at(world.now + report.delay)
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8])
    world.tell(world.scheduler.ready, successor_of(child), READY, None)
    do(world, "x")
    assert child.slot.failures == 0


def test_a_successor_that_cannot_be_spawned_is_tried_again() -> None:
    world = world_of(max_age=100.0)
    [child] = world.children()
    world.spawns_fail = True
    assert reports(world.at(90.0))
    assert child.slot.successor is None
    assert world.scheduler.groups["a"].successors == 0
    world.spawns_fail = False
    assert new_child(world.at(91.0)) is successor_of(child)


@pytest.mark.parametrize("handshake", [True, False])
def test_a_successor_takes_the_place_of_a_child_that_dies_meanwhile(handshake: bool) -> None:
    world = World(a=kind(1, handshake=handshake, max_age=100.0))
    [child] = world.children()
    if handshake:
        world.tell(world.scheduler.ready, child, READY, None)
    successor = new_child(world.at(90.0))
    actions = world.tell(world.scheduler.exited, child, 1, READ_ALL)
    assert [type(action) for action in actions].count(Spawn) == 0
    assert child.slot.child is successor
    assert child.slot.successor is None
    job = world.submit()
    # Who can't tell when it is ready serves at once, like any other.
    assert (job.child is successor) == (not handshake)
    if handshake:
        assert Accept(job, successor, 90.0) in world.tell(
            world.scheduler.ready, successor, READY, None
        )


def test_a_successor_that_is_not_even_spawned_takes_a_dead_childs_place() -> None:
    world = World(a=kind(1, max_age=100.0))
    [child] = world.children()
    # The events of one turn, before any action is performed.
    world.now = 90.0
    world.scheduler.tick(world.now)
    [spawn] = world.scheduler.dispatch(world.now)
    assert isinstance(spawn, Spawn)
    assert spawn.child is child.slot.successor
    world.note(world.scheduler.exited, child, 1, READ_ALL)
    assert spawn.child.state is ChildState.STARTING
    world.perform([spawn])
    assert spawn.child.state is ChildState.IDLE


def test_a_child_that_was_superseded_and_dies_leaves_its_successor_alone() -> None:
    world = world_of(max_jobs=1)
    job, child = world.send()
    successor = successor_of(child)
    world.tell(world.scheduler.ready, successor, READY, None)
    actions = world.tell(world.scheduler.exited, child, -11, READ_ALL)
    assert actions[0] == Resolve(job, Lost(-11, ""), child)
    assert not [action for action in actions if isinstance(action, Spawn)]
    assert (child.slot.child, child.slot.failures) == (successor, 0)


def test_a_retiring_child_that_speaks_is_replaced_by_its_successor() -> None:
    world = world_of(max_jobs=1)
    child, _ = do(world)
    assert child.state is ChildState.RETIRING
    successor = successor_of(child)
    actions = world.tell(world.scheduler.replied, child, Ok())
    assert kills(actions) == [signal.SIGKILL]
    assert child.slot.child is successor


def test_a_stop_stops_successors_and_those_that_retire() -> None:
    world = world_of(max_jobs=1)
    child, _ = do(world)
    successor = successor_of(child)
    assert world.tell(world.scheduler.stop) == [CloseStdin(child), CloseStdin(successor)]


def test_shrink_takes_a_successor_along() -> None:
    world = World(limit=2, a=kind(None, handshake=True, max_age=100.0))
    for child in world.children():
        world.tell(world.scheduler.ready, child, READY, None)
    # Only one successor boots at a time.
    successor = new_child(world.at(90.0))
    world.scheduler.groups["a"].slots.sort(key=lambda slot: slot.successor is not None)
    actions = world.tell(world.scheduler.shrink, 1)
    assert CloseStdin(successor) in actions
    # The other one's turn has come.
    assert world.scheduler.groups["a"].successors == 1
    assert new_child(actions).slot is world.slots()[0]
