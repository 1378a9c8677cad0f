"""Whether what a child has started outlives it."""

from __future__ import annotations

import signal

import pytest

from celery_subproc_pool.core.actions import (
    CloseStdin,
    Forget,
    Kill,
)
from tests.support.world import (
    READ_ALL,
    READY,
    do,
    successor_of,
    world_of,
)


@pytest.mark.parametrize(("leftovers", "leaves"), [("keep", True), ("kill", False)])
def test_the_setting_leftovers_counts_for_a_child_that_exits_in_order(
    leftovers: str, leaves: bool
) -> None:
    world = world_of(max_jobs=1, leftovers=leftovers)
    child, _ = do(world)
    world.tell(world.scheduler.ready, successor_of(child), READY, None)
    exited = world.tell(world.scheduler.exited, child, 0, READ_ALL)
    assert exited == [Forget(child, leaves=leaves)]
    assert child.in_order


def test_a_child_that_dies_leaves_nothing() -> None:
    world = world_of(leftovers="keep")
    [child] = world.children()
    actions = world.tell(world.scheduler.exited, child, -11, READ_ALL)
    assert actions[-1] == Forget(child, leaves=False)
    assert not child.in_order


def test_a_child_that_has_to_be_killed_leaves_nothing() -> None:
    world = world_of(max_jobs=1, leftovers="keep")
    child, _ = do(world)
    world.tell(world.scheduler.ready, successor_of(child), READY, None)
    for signum in (signal.SIGTERM, signal.SIGKILL):
        assert child.in_order
        assert world.at(child.stop_deadline or 0.0) == [Kill(child, signum)]
    assert world.tell(world.scheduler.exited, child, -9, READ_ALL) == [Forget(child, leaves=False)]


def test_a_child_that_goes_with_the_worker_leaves_nothing() -> None:
    world = world_of(leftovers="keep")
    [child] = world.children()
    assert not world.scheduler.stopping
    assert world.tell(world.scheduler.stop) == [CloseStdin(child)]
    assert world.scheduler.stopping
    assert world.tell(world.scheduler.exited, child, 0, READ_ALL) == [Forget(child, leaves=False)]
    assert child.in_order
