"""The next deadline."""

from __future__ import annotations

import pytest

from celery_subproc_pool.core.booting import STARTUP_GRACE
from celery_subproc_pool.core.stopping import KILL_PATIENCE
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
    READ_ALL,
    STOP_TIMEOUT,
    World,
    kind,
)


def test_without_anything_due_there_is_no_deadline() -> None:
    world = World(a=kind())
    assert world.scheduler.next_deadline is None
    assert world.at(1000.0) == []
    world.send()
    assert world.scheduler.next_deadline is None


def test_the_next_deadline_is_a_lower_bound_that_tick_makes_exact() -> None:
    world = World(a=kind(2))
    _, first = world.send("x", timeout=5.0)
    _, second = world.send("y", timeout=9.0, soft_timeout=7.0)
    assert world.scheduler.next_deadline == 5.0
    world.tell(world.scheduler.replied, first, Ok())
    # Too early now, which costs one idle tick.
    assert world.scheduler.next_deadline == 5.0
    assert world.at(4.9) == []
    assert world.scheduler.next_deadline == 5.0
    assert world.at(5.0) == []
    assert world.scheduler.next_deadline == 7.0
    world.at(7.0)
    assert world.scheduler.next_deadline == 9.0
    world.at(9.0)
    # When the child's replacement has proved itself.
    assert world.scheduler.next_deadline == 9.0 + STARTUP_GRACE
    world.at(9.5)
    # When the child must be gone.
    assert world.scheduler.next_deadline == 9.0 + KILL_PATIENCE
    world.tell(world.scheduler.exited, second, -9, READ_ALL)
    world.at(9.0 + KILL_PATIENCE)
    assert world.scheduler.next_deadline is None


def test_the_next_deadline_knows_of_children_and_slots_too() -> None:
    world = World(a=kind(2), b=kind(1))
    first, second = world.children("a")
    world.tell(world.scheduler.exited, first, 1, READ_ALL)
    assert world.scheduler.next_deadline == 0.1
    world.tell(world.scheduler.stdout_closed, second)
    world.tell(world.scheduler.stdout_closed, world.children("b")[0])
    world.at(0.1)
    assert world.scheduler.next_deadline == pytest.approx(0.1 + STARTUP_GRACE)
    world.at(2 * STARTUP_GRACE)
    assert world.scheduler.next_deadline == STOP_TIMEOUT
    world.tell(world.scheduler.exited, second, 0, READ_ALL)
    world.at(STOP_TIMEOUT)
    assert world.scheduler.next_deadline == 2 * STOP_TIMEOUT
