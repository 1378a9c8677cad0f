"""Tracers that stand still: when the log warns, and when it says that they go on."""

from __future__ import annotations

import msgspec

from celery_subproc_pool.core import stats
from celery_subproc_pool.core.actions import GoesOn, StandsStill
from celery_subproc_pool.core.model import Child, ChildState, Job
from celery_subproc_pool.core.standstill import STANDSTILL
from celery_subproc_pool.wire.messages import Ok
from celery_subproc_pool.wire.python import Ask, Traced
from tests.support.world import World, child_of, world_of_tracers


def begun(world: World, task_id: str = "x") -> tuple[Job, Child]:
    """Return a job whose trace a tracer has, and the tracer."""
    job = world.submit(task_id)
    return job, child_of(world.trace(job))


def ask(world: World, tracer: Child, job: Job) -> None:
    request = msgspec.Raw(b'{"id":"x"}')
    world.tell(world.scheduler.asked, tracer, Ask(id=job.task_id, request=request))


def still(world: World, tracer: Child) -> float | None:
    rows = stats.rows(world.scheduler.groups.values(), world.now, lambda child: 0)
    [seconds] = [row["stands_still"] for row in rows if row["pid"] == tracer.pid]
    return seconds


def test_a_tracer_that_says_nothing_is_told_of_at_ever_longer_times() -> None:
    world = world_of_tracers()
    job, tracer = begun(world)
    start = world.now
    world.at(start + STANDSTILL - 0.1)
    assert (world.standstills, still(world, tracer)) == ([], None)
    for seconds in (STANDSTILL, 2 * STANDSTILL, 4 * STANDSTILL):
        world.at(start + seconds)
        assert job.trace is not None
        assert world.standstills == [StandsStill(tracer, seconds, (job.trace,))]
        assert still(world, tracer) == seconds
        world.standstills.clear()
    ask(world, tracer, job)
    assert world.standstills == [GoesOn(tracer, 4 * STANDSTILL)]
    assert still(world, tracer) is None


def test_while_the_child_works_a_tracer_may_be_silent() -> None:
    world = world_of_tracers()
    job, tracer = begun(world)
    ask(world, tracer, job)
    world.at(world.now + 10 * STANDSTILL)
    assert world.standstills == []
    # From the child's answer on, it is for the tracer to say something.
    world.tell(world.scheduler.replied, child_of(job), Ok(id="x"))
    world.tell(world.scheduler.tell, job, b"answer\n")
    world.at(world.now + STANDSTILL)
    assert [type(each) for each in world.standstills] == [StandsStill]
    world.tell(world.scheduler.replied, tracer, Traced(id="x"))
    assert [type(each) for each in world.standstills] == [StandsStill, GoesOn]


def test_each_word_of_a_tracer_counts_for_all_its_jobs() -> None:
    world = world_of_tracers(2)
    first, tracer = begun(world, "first")
    _, same = begun(world, "second")
    assert same is tracer
    world.at(world.now + STANDSTILL - 1)
    ask(world, tracer, first)
    world.at(world.now + STANDSTILL - 1)
    assert world.standstills == []
    world.at(world.now + 1)
    assert [type(each) for each in world.standstills] == [StandsStill]


def test_nothing_is_said_of_a_tracer_that_is_being_stopped() -> None:
    world = world_of_tracers()
    _, tracer = begun(world)
    world.tell(world.scheduler.stdout_closed, tracer)
    assert tracer.state is ChildState.STOPPING
    world.at(world.now + STANDSTILL)
    assert world.standstills == []
