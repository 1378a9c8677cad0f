"""Which jobs go to another child after they have lost theirs."""

from __future__ import annotations

import signal

import pytest

from celery_subproc_pool.core.actions import (
    Accept,
    Report,
    Resolve,
    Spawn,
    Write,
)
from celery_subproc_pool.core.model import (
    Job,
    JobState,
)
from celery_subproc_pool.core.outcomes import (
    Answered,
    Lost,
    TimedOut,
)
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
    BOOT,
    READ_ALL,
    READ_NOTHING,
    World,
    child_of,
    ends,
    kills,
    kind,
    reports,
    world_of_tracers,
)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_oldest_of_the_jobs_that_lost_their_children_is_served_first(
    order: tuple[int, int, int],
) -> None:
    world = World(a=kind(3))
    jobs = [world.submit(str(number)) for number in range(3)]
    for number in order:
        world.note(world.scheduler.exited, child_of(jobs[number]), 1, READ_ALL)
    assert list(world.scheduler.groups["a"].waiting) == jobs


@pytest.mark.parametrize("closed_before", [False, True])
@pytest.mark.parametrize(("read", "spared"), [(11, False), (5, False), (4, True), (0, True)])
def test_an_exit_spares_the_job_whose_request_was_not_read(
    read: int, spared: bool, closed_before: bool
) -> None:
    world = World(a=kind(2))
    job, first = world.send()
    assert (job.request, job.offset) == (b"request", len(BOOT))
    if closed_before:
        world.tell(world.scheduler.stdout_closed, first)
    actions = world.tell(world.scheduler.exited, first, 1, read)
    if spared:
        assert ends(actions) == []
        assert actions[-1] == Write(world.children()[0], job)
        assert job.child is world.children()[0]
    else:
        assert [type(end.outcome) for end in ends(actions) if isinstance(end, Resolve)] == [Lost]
    assert world.scheduler.open_jobs == int(spared)


def test_an_unread_request_is_lost_all_the_same_once_the_worker_stops() -> None:
    world = World(a=kind(2))
    job, child = world.send()
    world.tell(world.scheduler.stop)
    actions = world.tell(world.scheduler.exited, child, -9, READ_NOTHING)
    assert ends(actions) == [Resolve(job, Lost(-9, "the worker stops"), child)]


def test_unread_bytes_of_a_job_that_is_answered_do_not_bring_it_back() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.replied, child, Ok())
    assert ends(world.tell(world.scheduler.exited, child, 0, READ_NOTHING)) == []
    assert job.state is JobState.CLOSED


def test_a_job_that_is_only_reserved_goes_to_another_child_and_is_accepted_once() -> None:
    world = world_of_tracers(2)
    job = world.submit()
    world.trace(job)
    first = child_of(job)
    actions = world.tell(world.scheduler.exited, first, 1, READ_ALL)
    assert ends(actions) == []
    assert not any(isinstance(action, Accept) for action in actions)
    second = child_of(job)
    assert second is not first
    assert world.scheduler.open_jobs == 1
    assert world.ask(job) == [Write(second, job)]


def test_a_request_that_comes_while_its_job_waits_again_is_written_to_the_next_child() -> None:
    world = world_of_tracers()
    job = world.submit()
    world.trace(job)
    world.tell(world.scheduler.exited, child_of(job), 1, READ_ALL)
    assert job.state is JobState.QUEUED
    assert not world.idle()
    assert world.ask(job) == []
    actions = world.at(0.1)
    assert actions == [Spawn(child_of(job)), Write(child_of(job), job)]


@pytest.mark.parametrize("event", ["unwritten", "faulted"])
def test_a_request_of_which_no_byte_was_written_goes_to_another_child(event: str) -> None:
    world = World(a=kind(2))
    world.writes = event
    job = Job("x", "task.x", "a")
    job.request = b"request"
    world.note(world.scheduler.submit, job)
    first = world.children()[0]
    actions = world.perform(world.scheduler.dispatch(world.now))
    world.writes = "written"
    actions += world.turn()
    assert ends(actions) == []
    assert reports(actions) == [Report(first, "third", (job,), 0.1)]
    second = child_of(job)
    assert second is not first
    assert actions[-1] == Write(second, job)
    assert kills(actions) == ([signal.SIGKILL] if event == "faulted" else [])
    assert ends(world.tell(world.scheduler.exited, first, 0, READ_ALL)) == []
    assert ends(world.tell(world.scheduler.replied, second, Ok(id="x"))) == [
        Resolve(job, Answered(Ok(id="x")), second)
    ]


def test_a_job_that_lost_its_child_keeps_its_limit_while_it_waits() -> None:
    world = World(a=kind())
    job = world.submit(timeout=2.0)
    world.tell(world.scheduler.exited, child_of(job), 1, READ_ALL)
    other = world.submit("y", timeout=2.0)
    assert job.state is JobState.QUEUED
    world.spawns_fail = True
    assert ends(world.at(1.0)) == []
    assert ends(world.at(2.0)) == [Resolve(job, TimedOut(2.0), None)]
    assert other.state is JobState.QUEUED


def test_a_job_whose_children_end_before_they_read_it_is_given_up() -> None:
    world = World(a=kind())
    job, child = world.send()
    for attempt in range(4):
        assert job.state is not JobState.CLOSED
        actions = world.tell(world.scheduler.exited, child, 1, READ_NOTHING)
        if attempt < 3:
            assert ends(actions) == []
            world.at(world.now + 100)
            child = child_of(job)
    reason = "4 children in a row ended before they had read the job"
    assert ends(actions) == [Resolve(job, Lost(None, reason), child)]
