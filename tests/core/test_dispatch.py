"""Which job is given to which child, and when."""

from __future__ import annotations

from celery_subproc_pool.core.actions import (
    Accept,
    Finished,
    Resolve,
    Write,
)
from celery_subproc_pool.core.model import (
    ChildState,
    Job,
    JobState,
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
)


def test_a_job_from_arrival_to_end() -> None:
    world = World(a=kind())
    scheduler = world.scheduler
    (child,) = world.children()
    job = Job("x", "task.x", "a")
    assert world.idle()

    assert world.note(scheduler.submit, job) == []
    assert not world.idle()
    world.now = 3.0
    assert world.turn() == [Accept(job, child, 3.0)]
    assert (job.state, child.state, scheduler.open_jobs) == (JobState.RESERVED, ChildState.BUSY, 1)

    assert world.tell(scheduler.provide, job, b"request") == [Write(child, job)]
    assert (job.state, job.request) == (JobState.SENT, b"request")

    reply = Ok(id="x", result=1)
    assert world.tell(scheduler.replied, child, reply) == [Resolve(job, Answered(reply), child)]
    assert (job.state, child.state, child.jobs_done) == (JobState.ANSWERED, ChildState.IDLE, 1)
    assert scheduler.open_jobs == 1
    assert not world.idle()

    assert world.tell(scheduler.finish, job) == [Finished(job)]
    assert (job.state, scheduler.open_jobs) == (JobState.CLOSED, 0)
    assert world.idle()


def test_a_child_takes_the_next_job_while_the_last_one_is_stored() -> None:
    world = World(a=kind())
    first, child = world.send("x")
    second = world.submit("y")
    assert world.tell(world.scheduler.replied, child, Ok(id="x"))[-1] == Accept(second, child, 0.0)
    assert world.tell(world.scheduler.finish, first) == [Finished(first)]
    assert second.child is child


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


def test_a_tracer_that_never_needs_the_child_gives_it_back() -> None:
    world = World(a=kind())
    job = world.submit()
    child = child_of(job)
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]
    assert (child.state, child.jobs, child.jobs_done) == (ChildState.IDLE, {}, 0)
    assert child_of(world.submit("y")) is child


def test_jobs_for_the_worker_itself_need_no_child() -> None:
    world = World(limit=2)
    job = Job("x", "celery.backend_cleanup", None, timeout=1.0)
    assert world.tell(world.scheduler.submit, job) == [Accept(job, None, 0.0)]
    assert world.tell(world.scheduler.provide, job, b"unused") == []
    assert world.at(100.0) == []
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]
    assert world.scheduler.open_jobs == 0


def test_jobs_are_accepted_in_order_of_arrival_across_groups() -> None:
    world = World(limit=10, a=kind(2), b=kind(2))
    jobs = [
        Job(str(number), "t", group) for number, group in enumerate(["b", None, "a", "b", None])
    ]
    for job in jobs:
        world.note(world.scheduler.submit, job)
    accepted = [action.job for action in world.turn() if isinstance(action, Accept)]
    assert accepted == jobs


def test_a_group_without_idle_children_does_not_hold_up_the_others() -> None:
    world = World(a=kind(1), b=kind(1))
    world.send("x", "a")
    waiting, served, local = (
        world.submit("y", "a"),
        world.submit("z", "b"),
        world.submit("l", None),
    )
    assert [job.state for job in (waiting, served, local)] == [
        JobState.QUEUED,
        JobState.RESERVED,
        JobState.RESERVED,
    ]


def test_the_limit_is_over_all_groups_together() -> None:
    world = World(limit=2, a=kind(2), b=kind(2))
    first, child = world.send("1", "a")
    world.send("2", "b")
    third, local = world.submit("3", "b"), world.submit("4", None)
    assert [job.accepted for job in (third, local)] == [False, False]

    # A reply frees the child; the job is open until its tracer is through.
    assert ends(world.tell(world.scheduler.replied, child, Ok())) == [
        Resolve(first, Answered(Ok()), child)
    ]
    assert [job.accepted for job in (third, local)] == [False, False]
    world.tell(world.scheduler.finish, first)
    assert [job.accepted for job in (third, local)] == [True, False]
    assert world.scheduler.open_jobs == 2


def test_a_task_that_only_a_newer_child_announces_waits_for_it() -> None:
    """While children are replaced by those of another program."""
    world = World(a=kind(2, handshake=True))
    old, new = world.children()
    world.tell(world.scheduler.ready, old, Ready(protocol=1, tasks=("task.old",)), None)
    ready = Ready(protocol=1, tasks=("task.old", "task.new"))
    world.tell(world.scheduler.ready, new, ready, None)
    first, second = (Job(f"{number}", "task.new", "a") for number in range(2))
    world.tell(world.scheduler.submit, first)
    assert first.child is new
    world.tell(world.scheduler.submit, second)
    assert second.state is JobState.QUEUED
    # Any child does a task that no child has announced. A waiting job does not block it.
    other = world.submit("other")
    assert other.child is old
    world.tell(world.scheduler.provide, first, b"request")
    world.tell(world.scheduler.replied, new, Ok(id="0"))
    assert second.child is new
