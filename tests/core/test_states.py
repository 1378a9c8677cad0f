"""Which states follow which, of jobs and of children."""

from __future__ import annotations

import signal

import pytest

from celery_subproc_pool.core.actions import Write
from celery_subproc_pool.core.model import Child, ChildState, Job, JobState, Tracing
from celery_subproc_pool.core.states import CHILD_TRANSITIONS, JOB_TRANSITIONS
from celery_subproc_pool.errors import TransitionError
from celery_subproc_pool.wire.messages import Ok
from celery_subproc_pool.wire.python import Traced
from tests.support.world import READ_NOTHING, World, child_of, kind, trace_of, world_of_tracers


@pytest.mark.parametrize("target", ChildState)
@pytest.mark.parametrize("source", ChildState)
def test_a_child_moves_as_the_table_says_and_no_other_way(
    source: ChildState, target: ChildState
) -> None:
    world = World(a=kind())
    child = Child(world.scheduler.groups["a"], world.slots()[0], 1)
    child.state = source
    if target in CHILD_TRANSITIONS[source]:
        child.move(target)
        assert child.state == target
    else:
        with pytest.raises(TransitionError, match=f"can't become {target.value}"):
            child.move(target)
        assert child.state is source


@pytest.mark.parametrize("target", JobState)
@pytest.mark.parametrize("source", JobState)
def test_a_job_moves_as_the_table_says_and_no_other_way(source: JobState, target: JobState) -> None:
    job = Job("x", "task.x", "a")
    job.state = source
    if target in JOB_TRANSITIONS[source]:
        job.move(target)
        assert job.state == target
    else:
        with pytest.raises(TransitionError, match=f"can't become {target.value}"):
            job.move(target)
        assert job.state is source


def test_every_state_is_in_the_table() -> None:
    assert set(CHILD_TRANSITIONS) == set(ChildState)
    assert CHILD_TRANSITIONS[ChildState.GONE] == frozenset()


def test_every_state_of_a_job_is_in_the_table() -> None:
    assert set(JOB_TRANSITIONS) == set(JobState)
    assert JOB_TRANSITIONS[JobState.CLOSED] == frozenset()


def test_each_transition_of_a_job_is_caused_by_events() -> None:
    """The table allows no more than what happens."""
    seen = set()

    class Watched(Job):
        __slots__ = ()

        def move(self, state: JobState) -> None:
            seen.add((self.state, state))
            super().move(state)

    world = world_of_tracers(2, limit=2)
    scheduler = world.scheduler
    jobs = [Watched(str(number), "task", "a", tracing=Tracing.ALWAYS) for number in range(3)]
    for job in jobs:
        world.tell(scheduler.submit, job)
    # The first one is answered; its child has not read the second one; the last one waits.
    first, second, last = jobs
    for job in (first, second):
        world.trace(job)
        world.ask(job)
    tracer = child_of(trace_of(first))
    world.tell(scheduler.replied, child_of(first), Ok())
    world.tell(scheduler.exited, child_of(second), 1, READ_NOTHING)
    world.tell(scheduler.replied, tracer, Traced(id="0"))
    for job in (second, last):
        world.tell(scheduler.terminate, job, signal.SIGTERM)
    reserved, waiting = Watched("r", "task", "a"), Watched("w", "task", "a")
    world.tell(scheduler.submit, reserved)
    world.tell(scheduler.terminate, reserved, signal.SIGTERM)
    world.note(scheduler.submit, waiting)
    scheduler.flush(0.0)
    assert seen == {
        (source, target) for source, targets in JOB_TRANSITIONS.items() for target in targets
    }


def test_events_of_a_job_that_was_refused_before_it_was_submitted_change_nothing() -> None:
    world = World(a=kind())
    job = Job("x", "task.x", "a")
    job.move(JobState.CLOSED)
    scheduler = world.scheduler
    assert world.tell(scheduler.trace, job, b"task") == []
    assert world.tell(scheduler.tell, job, b"line") == []
    assert world.tell(scheduler.terminate, job, signal.SIGTERM) == []
    assert world.tell(scheduler.give_up, job, "a bug") == []
    assert (job.state, scheduler.open_jobs, world.idle()) == (JobState.CLOSED, 0, True)


def test_the_reprs_of_jobs_children_and_groups() -> None:
    world = World(a=kind())
    job = world.submit()
    assert repr(job) == "<Job task.x[x] reserved>"
    assert repr(job.child) == "<Child a#0 pid 101 busy>"
    assert repr(world.scheduler.groups["a"]) == "<Group a>"


@pytest.mark.parametrize("known", [True, False])
def test_a_request_is_written_before_its_job_is_told_to_be_accepted(known: bool) -> None:
    """Actions are performed in order, and `Accept` only queues a callback."""
    world = World(a=kind())
    job = Job("x", "task.x", "a")
    job.request = b"request" if known else None
    actions = world.tell(world.scheduler.submit, job)
    kinds = [type(action).__name__ for action in actions]
    assert kinds == (["Write", "Accept"] if known else ["Accept"])
    assert not known or actions[0] == Write(child_of(job), job)
