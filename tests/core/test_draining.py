"""Children that take no more requests, and answer those that they have."""

from __future__ import annotations

import signal

from celery_subproc_pool.core.actions import (
    Resolve,
)
from celery_subproc_pool.core.model import (
    Cause,
    ChildState,
    JobState,
)
from celery_subproc_pool.core.outcomes import (
    TimedOut,
)
from tests.support.world import (
    BOOT,
    READ_ALL,
    READ_NOTHING,
    STOP_TIMEOUT,
    World,
    ends,
    kills,
    kind,
)


def test_a_child_that_has_read_half_a_request_has_stop_timeout_to_exit() -> None:
    world = World(a=kind())
    job, child = world.send()
    closed = world.now
    world.tell(world.scheduler.unwritten, child, "it closed its stdin", len(BOOT) + 1)
    assert (child.draining, job.state) == (True, JobState.SENT)
    assert kills(world.at(closed + STOP_TIMEOUT - 0.1)) == []
    assert kills(world.at(closed + STOP_TIMEOUT)) == [signal.SIGTERM]
    assert kills(world.at(closed + 2 * STOP_TIMEOUT)) == [signal.SIGKILL]


def test_a_draining_child_that_has_read_its_request_is_not_hurried() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.unwritten, child, "it closed its stdin", READ_ALL)
    assert (child.draining, job.state) == (True, JobState.SENT)
    assert kills(world.at(world.now + 10 * STOP_TIMEOUT)) == []


def test_a_draining_child_that_is_killed_is_counted_as_replaced_once() -> None:
    world = World(a=kind())
    job, child = world.send(timeout=5.0)
    world.tell(world.scheduler.unwritten, child, "it closed its stdin", READ_ALL)
    actions = world.at(world.now + 5.0)
    assert ends(actions) == [Resolve(job, TimedOut(5.0), child)]
    assert kills(actions) == [signal.SIGKILL]
    assert world.scheduler.groups["a"].counters.replaced == {Cause.EXITED: 1}


def test_an_idle_child_that_closed_its_stdin_is_replaced() -> None:
    world = World(a=kind())
    (child,) = world.children()
    world.tell(world.scheduler.unwritten, child, "it closed its stdin", READ_NOTHING)
    assert child.state is ChildState.STOPPING
    assert world.children()[0].reason == "it closed its stdin"
