"""Time limits of a child's first job, while the child still boots."""

from __future__ import annotations

import signal

import pytest

from celery_subproc_pool.core.actions import (
    Kill,
    Probe,
    Resolve,
    SoftTimeout,
)
from celery_subproc_pool.core.model import (
    JobState,
)
from celery_subproc_pool.core.outcomes import (
    TimedOut,
)
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import (
    READ_ALL,
    READ_NOTHING,
    World,
    child_of,
    ends,
    kind,
)


def test_the_limit_of_a_first_job_counts_from_when_its_child_reads_it() -> None:
    world = World(a=kind(), boot_slowly=True)
    job, child = world.send(timeout=2.0, soft_timeout=1.0)
    assert world.at(1.0) == [Probe(child)]
    assert world.tell(world.scheduler.probed, child, READ_NOTHING) == []
    world.at(1.9)
    world.tell(world.scheduler.probed, child, READ_NOTHING)
    assert world.at(2.0) == [Probe(child)]
    assert world.tell(world.scheduler.probed, child, READ_ALL) == []
    assert child.has_booted
    assert world.at(2.9) == []
    assert world.at(3.0) == [SoftTimeout(job, child, None)]
    assert ends(world.at(4.0)) == [Resolve(job, TimedOut(2.0), child)]


@pytest.mark.parametrize("limits", [{"timeout": 2.0}, {"timeout": 9.0, "soft_timeout": 2.0}])
def test_a_child_that_had_read_its_first_job_in_time_gets_no_more_time(
    limits: dict[str, float],
) -> None:
    world = World(a=kind(), boot_slowly=True)
    job, child = world.send(**limits)
    assert world.at(2.0) == [Probe(child)]
    (action,) = world.tell(world.scheduler.probed, child, READ_ALL)[:1]
    if "soft_timeout" in limits:
        assert action == SoftTimeout(job, child, None)
    else:
        assert action == Resolve(job, TimedOut(2.0), child)


def test_a_probe_that_comes_too_late_changes_nothing() -> None:
    world = World(a=kind(), boot_slowly=True)
    job, child = world.send(timeout=2.0)
    world.at(2.0)
    world.tell(world.scheduler.replied, child, Ok())
    assert world.tell(world.scheduler.probed, child, READ_ALL) == []
    assert job.state is JobState.CLOSED


def test_a_child_that_never_reads_is_replaced_and_its_job_begins_anew() -> None:
    world = World(a=kind(), boot_slowly=True)
    job, child = world.send(timeout=2.0)
    assert world.at(59.0) == [Probe(child)]
    assert world.tell(world.scheduler.probed, child, READ_NOTHING) == []
    assert world.at(61.0) == [Probe(child)]
    assert Kill(child, signal.SIGKILL) in world.tell(world.scheduler.probed, child, READ_NOTHING)
    assert child.reason == "it did not read its first request within 60 s (start_timeout)"
    # It never read the job, whose time has not begun.
    assert ends(world.tell(world.scheduler.exited, child, -9, READ_NOTHING)) == []
    world.at(61.2)
    assert (job.state, child_of(job).pid) == (JobState.SENT, 102)
    assert Probe(child_of(job)) in world.at(63.0)


def test_a_first_probe_after_a_long_job_finds_that_it_was_read() -> None:
    world = World(a=kind(), boot_slowly=True)
    job, child = world.send(timeout=600.0)
    assert world.at(600.0) == [Probe(child)]
    assert ends(world.tell(world.scheduler.probed, child, READ_ALL)) == [
        Resolve(job, TimedOut(600.0), child)
    ]
