"""Jobs that crash children."""

from __future__ import annotations

from typing import Any

import pytest

from celery_subproc_pool.core.actions import (
    Resolve,
)
from celery_subproc_pool.core.crashes import CRASHES_REMEMBERED, Crashes
from celery_subproc_pool.core.model import (
    Child,
    Job,
    JobState,
    Tracing,
)
from celery_subproc_pool.core.outcomes import (
    Lost,
)
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
    MANY,
    READ_ALL,
    World,
    child_of,
    do,
    ends,
    kind,
    world_of_many,
)


def test_jobs_in_flight_at_a_crash_run_isolated_when_they_come_again() -> None:
    """So that the one that kills is found out, and costs the others no more children."""
    world = world_of_many(1, 4, max_crashes=2)
    for name in ("poison", "one", "two"):
        world.send(name)
    [child] = world.children()
    world.send("innocent")
    world.tell(world.scheduler.replied, child, Ok(id="innocent"))
    actions = world.tell(world.scheduler.exited, child, 1, READ_ALL)
    assert [end.outcome.crashes for end in ends(actions)] == [0, 0, 0]  # type: ignore[union-attr]
    world.at(1.0)

    def boot() -> Child:
        [child] = world.children()
        world.tell(world.scheduler.ready, child, MANY, None)
        return child

    # They are delivered again, and others come.
    child = boot()
    first, again, _, last = (
        world.submit(name, tracing=Tracing.NEVER) for name in ("x", "poison", "one", "y")
    )
    assert (first.child, again.state, last.state) == (child, JobState.QUEUED, JobState.QUEUED)
    world.tell(world.scheduler.replied, child, Ok(id="x"))
    assert list(child.jobs) == ["poison"]
    world.tell(world.scheduler.exited, child, 1, READ_ALL)
    world.at(world.now + 1.0)
    # The next one had nothing to do with it, and is cleared by its answer.
    child = boot()
    assert list(child.jobs) == ["one"]
    world.tell(world.scheduler.replied, child, Ok(id="one"))
    assert list(child.jobs) == ["y"]
    assert world.send("one")[1] is child
    # The other one has cost a second child now, and is to cost no more.
    world.tell(world.scheduler.replied, child, Ok(id="y"))
    world.tell(world.scheduler.replied, child, Ok(id="one"))
    third, _ = world.send("poison")
    actions = world.tell(world.scheduler.exited, child, 1, READ_ALL)
    assert ends(actions) == [Resolve(third, Lost(1, "", crashes=2), child)]


def crash(world: World, task_id: str = "x", status: int = -11, **options: Any) -> Lost:
    """A delivery of a job that costs its child."""
    job = Job(task_id, "task", "a", **options)
    job.request = b"request"
    world.tell(world.scheduler.submit, job)
    actions = world.tell(world.scheduler.exited, child_of(job), status, READ_ALL)
    [lost] = (action.outcome for action in actions if isinstance(action, Resolve))
    assert isinstance(lost, Lost)
    world.at(world.now + 60.0)
    return lost


def test_a_job_that_has_crashed_too_many_children_is_lost_with_the_count() -> None:
    world = World(a=kind())
    assert [crash(world).crashes for _ in range(4)] == [0, 0, 3, 0]
    assert [crash(world, "other").crashes for _ in range(3)] == [0, 0, 3]


@pytest.mark.parametrize(("most", "expected"), [(1, [1, 1]), (2, [0, 2]), (None, [0] * 9)])
def test_max_crashes_sets_how_many_crashes_a_job_may_cause(
    most: int | None, expected: list[int]
) -> None:
    world = World(a=kind(max_crashes=most))
    assert [crash(world).crashes for _ in expected] == expected


def test_crashes_of_a_retry_are_counted_separately() -> None:
    world = World(a=kind(max_crashes=2))
    assert [crash(world, retries=retries).crashes for retries in (0, 1, 2, 2)] == [0, 0, 0, 2]


def test_an_answer_clears_the_suspicion() -> None:
    world = World(a=kind(max_crashes=2))
    crash(world)
    do(world)
    assert crash(world).crashes == 0


def test_only_the_latest_suspects_are_remembered() -> None:
    _, child = World(a=kind(max_crashes=2)).send()
    crashes = Crashes()

    def count(task_id: str) -> int:
        return crashes.count(Job(task_id, "it", "a"), child)

    assert {count(str(number)) for number in range(CRASHES_REMEMBERED + 1)} == {0}
    assert [count(task_id) for task_id in ("1", "0")] == [2, 0]


def test_a_crash_while_the_worker_stops_is_not_counted() -> None:
    world = World(a=kind(max_crashes=1))
    job, child = world.send()
    world.tell(world.scheduler.stop)
    actions = world.tell(world.scheduler.exited, child, -9, READ_ALL)
    assert actions[0] == Resolve(job, Lost(-9, "the worker stops"), child)
