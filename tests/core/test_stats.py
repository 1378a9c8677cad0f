"""What operators are shown of groups and children."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.concurrency.asynpool import SCHED_STRATEGY_FAIR, AsynPool

from celery_subproc_pool.core.counters import TIMES_REMEMBERED
from celery_subproc_pool.core.model import Child, Tracing
from celery_subproc_pool.core.stats import group_facts, rows, writes
from celery_subproc_pool.wire.messages import Ok, Ready, Throttled
from tests.support.world import READ_ALL, World, kind

NONE_YET: dict[str, Any] = {"wait": {}, "run": {}, "jobs": 0, "throttled": 0}


def job_of(world: World, wait: float, run: float, reply: Any = None) -> None:
    """A job that waits and runs for so many seconds; all children are busy when it comes."""
    _, child = world.send("busy")
    world.submit("waits", tracing=Tracing.NEVER)
    world.now += wait
    world.tell(world.scheduler.replied, child, Ok())
    assert list(child.jobs) == ["waits"]
    world.now += run
    world.tell(world.scheduler.replied, child, reply or Ok())


def test_a_group_without_jobs() -> None:
    world = World(a=kind(2))
    facts = group_facts(world.scheduler.groups["a"])
    assert {**facts, **NONE_YET} == facts
    assert facts["states"] == {"idle": 2}


def test_times_are_of_waiting_and_of_running() -> None:
    world = World(limit=1, a=kind(1))
    job_of(world, wait=2.0, run=0.5, reply=Throttled())
    facts = group_facts(world.scheduler.groups["a"])
    # The first did not wait. It ran while the second waited.
    assert facts["wait"] == {"p50": 1.0, "p95": 1.9, "p99": 1.98}
    assert facts["run"] == {"p50": 1.25, "p95": 1.925, "p99": 1.985}
    assert (facts["jobs"], facts["throttled"]) == (2, 1)


def test_percentiles_are_those_of_the_latest_jobs() -> None:
    world = World(a=kind(1))
    group = world.scheduler.groups["a"]
    for seconds in ([1000.0] * 500) + [float(number) for number in range(TIMES_REMEMBERED)]:
        group.counters.count_reply(seconds, throttled=False)
    facts = group_facts(group)
    assert facts["run"] == {
        "p50": pytest.approx(500, abs=2),
        "p95": pytest.approx(950, abs=2),
        "p99": pytest.approx(990, abs=2),
    }


def test_rows() -> None:
    world = World(a=kind(2, handshake=True), b=kind(1))
    first, second = world.children("a")
    world.tell(world.scheduler.ready, first, Ready(protocol=1), None)
    job, _ = world.send("x")
    world.tell(world.scheduler.exited, second, 3, READ_ALL)
    world.now = 10.0

    def memory_of(child: Child) -> int:
        return (child.pid or 0) * 1000

    found = rows(world.scheduler.groups.values(), world.now, memory_of)
    assert found == [
        {
            "group": "a",
            "slot": 0,
            "pid": 101,
            "state": "busy",
            "age": pytest.approx(10.5),
            "jobs": 0,
            "rss": 101_000,
            "task": {"name": job.task_name, "id": "x", "seconds": 10.0},
            "in_flight": 1,
            "name": None,
            "stands_still": None,
            "last_exit": None,
        },
        {
            "group": "a",
            "slot": 1,
            "pid": None,
            "state": "cooling",
            "age": None,
            "jobs": 0,
            "rss": 0,
            "task": None,
            "in_flight": 0,
            "name": None,
            "stands_still": None,
            "last_exit": {"pid": 102, "seconds": 10.0, "reason": "it exited: exitcode 3"},
        },
        {
            "group": "b",
            "slot": 0,
            "pid": 103,
            "state": "idle",
            "age": pytest.approx(10.5),
            "jobs": 0,
            "rss": 103_000,
            "task": None,
            "in_flight": 0,
            "name": None,
            "stands_still": None,
            "last_exit": None,
        },
    ]


def test_a_row_for_each_of_two_children_of_a_slot() -> None:
    world = World(a=kind(1, handshake=True))
    [child] = world.children()
    world.tell(world.scheduler.ready, child, Ready(protocol=1), None)
    world.submit("reserved")
    world.tell(world.scheduler.restart, [child.group])
    old, new = rows([child.group], world.now, lambda child: 0)
    assert (old["slot"], old["state"], new["slot"], new["state"]) == (0, "busy", 0, "starting")
    assert old["task"]["seconds"] == 0.0, "its tracer prepares the request yet"


def test_writes_have_the_form_of_preforks() -> None:
    world = World(a=kind(2), b=kind(None))
    groups = world.scheduler.groups
    none = {"avg": "0.00", "strategy": "fair", "inqueues": {"total": 12, "active": 0}}
    assert writes(groups.values(), 0) == {
        **none,
        "total": 0,
        "all": ", ".join(["0.00"] * 12),
        "raw": ", ".join(["0"] * 12),
    }
    for number in range(3):
        _, child = world.send(str(number))
        assert child.slot.number == 0
        world.tell(world.scheduler.replied, child, Ok())
    world.send("3")
    # Its slot goes on counting with the next child.
    world.tell(world.scheduler.exited, child, 1, READ_ALL)
    world.send("4")
    world.tell(world.scheduler.shrink, 9)
    prefork = SimpleNamespace(
        write_stats={0: 4, 1: 1, 2: 0},
        sched_strategy=SCHED_STRATEGY_FAIR,
        _all_inqueues={7, 8, 9},
        _active_writes={8},
    )
    assert writes(groups.values(), 1) == AsynPool.human_write_stats(prefork)


def test_writes_to_slots_that_are_gone_count_on() -> None:
    world = World(limit=2, a=kind(None))
    _, child = world.send()
    world.tell(world.scheduler.replied, child, Ok())
    world.tell(world.scheduler.shrink, 2)
    for each in world.children():
        world.tell(world.scheduler.exited, each, 0, READ_ALL)
    facts = writes(world.scheduler.groups.values(), 0)
    assert (facts["total"], facts["avg"], facts["all"], facts["raw"]) == (1, "0.00", "", "")
