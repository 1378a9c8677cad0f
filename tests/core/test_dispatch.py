"""Which job is given to which child, and when."""

from __future__ import annotations

from celery_subproc_pool.core.actions import (
    Accept,
    Resolve,
    Write,
)
from celery_subproc_pool.core.model import (
    ChildState,
    Job,
    JobState,
    Tracing,
)
from celery_subproc_pool.core.outcomes import (
    Answered,
)
from celery_subproc_pool.wire.messages import Ok, Ready
from tests.support.world import (
    READ_ALL,
    World,
    child_of,
    ends,
    kind,
    world_of_many,
)


def test_concurrency_bounds_the_jobs_of_a_group() -> None:
    world = world_of_many(2, 5, concurrency=3)
    jobs = [world.submit(str(n), tracing=Tracing.NEVER) for n in range(5)]
    assert [job.state for job in jobs] == [JobState.SENT] * 3 + [JobState.QUEUED] * 2
    world.tell(world.scheduler.replied, child_of(jobs[0]), Ok(id="0"))
    assert jobs[3].state is JobState.SENT
    assert jobs[4].state is JobState.QUEUED


def test_concurrency_bounds_the_children_of_a_group_without_a_size() -> None:
    assert [kind(None, concurrency=3).size_for(limit) for limit in (1, 8)] == [1, 3]
    assert kind(None, max_in_flight=2, concurrency=3).size_for(8) == 2


def test_a_job_from_arrival_to_end() -> None:
    world = World(a=kind())
    scheduler = world.scheduler
    (child,) = world.children()
    job = Job("x", "task.x", "a")
    job.request = b"request"
    assert world.idle()

    assert world.note(scheduler.submit, job) == []
    assert not world.idle()
    world.now = 3.0
    assert world.turn() == [Write(child, job), Accept(job, child, 3.0)]
    assert (job.state, child.state, scheduler.open_jobs) == (JobState.SENT, ChildState.BUSY, 1)

    reply = Ok(id="x", result=1)
    assert world.tell(scheduler.replied, child, reply) == [Resolve(job, Answered(reply), child)]
    assert (job.state, child.state, child.jobs_done) == (JobState.CLOSED, ChildState.IDLE, 1)
    assert scheduler.open_jobs == 0
    assert world.idle()


def test_a_reply_without_an_id_is_trusted() -> None:
    world = World(a=kind())
    job, child = world.send()
    assert ends(world.tell(world.scheduler.replied, child, Ok())) == [
        Resolve(job, Answered(Ok()), child)
    ]


def test_the_warmest_child_serves_next() -> None:
    world = World(a=kind(3))
    first, second, third = world.children()
    one, two = world.send("x"), world.send("y")
    assert (one[1], two[1]) == (first, second)
    world.tell(world.scheduler.replied, first, Ok())
    world.tell(world.scheduler.replied, second, Ok())
    # The child that served last comes first. A child that never served comes last: it may boot.
    assert [child_of(world.submit(name)) for name in "abc"] == [second, first, third]
    assert one[0].child is None


def test_a_replacement_serves_after_those_that_have_served() -> None:
    world = World(a=kind(2))
    (_, first), (_, second) = world.send("x"), world.send("y")
    world.tell(world.scheduler.replied, second, Ok())
    world.tell(world.scheduler.replied, first, Ok())
    world.tell(world.scheduler.exited, second, 1, READ_ALL)
    assert child_of(world.submit("z")) is first


def test_jobs_are_accepted_in_order_of_arrival_across_groups() -> None:
    world = World(limit=10, a=kind(2), b=kind(2))
    jobs = [Job(str(number), "t", group) for number, group in enumerate(["b", "a", "b", "a"])]
    for job in jobs:
        world.note(world.scheduler.submit, job)
    accepted = [action.job for action in world.turn() if isinstance(action, Accept)]
    assert accepted == jobs


def test_a_group_without_idle_children_does_not_hold_up_the_others() -> None:
    world = World(a=kind(1), b=kind(1))
    world.send("x", "a")
    waiting, served = world.submit("y", "a"), world.submit("z", "b")
    assert [job.state for job in (waiting, served)] == [JobState.QUEUED, JobState.RESERVED]


def test_the_limit_is_over_all_groups_together() -> None:
    world = World(limit=2, a=kind(2), b=kind(2))
    _, child = world.send("1", "a")
    world.send("2", "b")
    third, fourth = world.submit("3", "b"), world.submit("4", "a")
    assert [job.accepted for job in (third, fourth)] == [False, False]
    world.tell(world.scheduler.replied, child, Ok())
    assert [job.accepted for job in (third, fourth)] == [True, False]
    assert world.scheduler.open_jobs == 2


def test_a_task_that_only_a_newer_child_announces_waits_for_it() -> None:
    """While children are replaced by those of another program."""
    world = World(a=kind(2, handshake=True))
    old, new = world.children()
    world.tell(world.scheduler.ready, old, Ready(protocol=1, tasks=("task.old",)), None)
    ready = Ready(protocol=1, tasks=("task.old", "task.new"))
    world.tell(world.scheduler.ready, new, ready, None)
    first, second = (Job(f"{number}", "task.new", "a") for number in range(2))
    first.request = b"request"
    world.tell(world.scheduler.submit, first)
    assert first.child is new
    world.tell(world.scheduler.submit, second)
    assert second.state is JobState.QUEUED
    # Any child does a task that no child has announced. A waiting job does not block it.
    other = world.submit("other")
    assert other.child is old
    world.tell(world.scheduler.replied, new, Ok(id="0"))
    assert second.child is new
