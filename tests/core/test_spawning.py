"""When slots spawn, and how they back off."""

from __future__ import annotations

import signal

import pytest

from celery_subproc_pool.core.actions import (
    Kill,
    Report,
    Spawn,
)
from celery_subproc_pool.core.model import (
    ChildState,
    Group,
)
from celery_subproc_pool.core.scheduler import Scheduler
from celery_subproc_pool.core.spawning import BACKOFF_LAST
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
    READ_ALL,
    World,
    kind,
    new_child,
    reports,
)


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
    _, child = world.send()
    assert world.slots()[0].failures == 3
    world.tell(world.scheduler.replied, child, Ok())
    assert world.slots()[0].failures == 0
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


def test_each_slot_backs_off_by_itself() -> None:
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
