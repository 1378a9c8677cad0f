"""What becomes of children, event by event: recycling, proof, degraded groups, crash counts. As in
`test_scheduler`, the clock is a number."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from celery_subproc_pool.core.actions import (
    Accept,
    Action,
    CloseStdin,
    Finished,
    Forget,
    Healed,
    Kill,
    Measure,
    Recycled,
    Resolve,
    Spawn,
)
from celery_subproc_pool.core.booting import STARTUP_GRACE
from celery_subproc_pool.core.crashes import CRASHES_REMEMBERED, Crashes
from celery_subproc_pool.core.model import Cause, Child, ChildState, Exit, Job, JobState
from celery_subproc_pool.core.outcomes import Answered, Lost
from celery_subproc_pool.wire.messages import Ok
from tests.support.world import READ_ALL, READY, World, child_of, kills, kind, new_child, reports

MIB = 2**20


def world_of(size: int = 1, **settings: Any) -> World:
    """A world of one group whose children say when they are ready, and are."""
    world = World(a=kind(size, handshake=True, **settings))
    for child in world.children():
        world.tell(world.scheduler.ready, child, READY, None)
    return world


def do(world: World, name: str = "x", **reply: Any) -> tuple[Child, list[Action]]:
    """A job from its arrival to its end."""
    job, child = world.send(name)
    actions = world.tell(world.scheduler.replied, child, Ok(**reply))
    return child, actions + world.tell(world.scheduler.finish, job)


def successor_of(child: Child) -> Child:
    assert child.slot.successor is not None
    return child.slot.successor


# -- by max_jobs


def test_a_successor_boots_during_a_childs_last_job() -> None:
    world = world_of(max_jobs=2)
    child, actions = do(world)
    assert not child.recycle_reason
    job, _ = world.send("y")
    successor = successor_of(child)
    assert (child.recycle_reason, successor.state) == (
        "it has had 2 jobs (max_jobs)",
        ChildState.STARTING,
    )

    world.tell(world.scheduler.replied, child, Ok())
    assert child.state is ChildState.RETIRING
    waiting = world.submit("z")
    assert waiting.state is JobState.QUEUED, "a promise: no job too many"

    actions = world.tell(world.scheduler.ready, successor, READY, None)
    assert actions == [
        Recycled(child, successor),
        CloseStdin(child),
        Accept(waiting, successor, 0.0),
    ]
    assert world.tell(world.scheduler.exited, child, 0, READ_ALL) == [Forget(child)]
    assert world.scheduler.groups["a"].counters.replaced == {Cause.RECYCLED: 1}
    assert world.tell(world.scheduler.finish, job) == [Finished(job)]


def test_a_child_whose_successor_is_ready_ends_its_job_first() -> None:
    world = world_of(max_jobs=1)
    job, child = world.send("x")
    successor = successor_of(child)
    assert world.tell(world.scheduler.ready, successor, READY, None) == [Recycled(child, successor)]
    assert (child.state, successor.state) == (ChildState.BUSY, ChildState.IDLE)
    assert child_of(world.submit("y")) is successor
    assert world.tell(world.scheduler.replied, child, Ok()) == [
        Resolve(job, Answered(Ok()), child),
        CloseStdin(child),
    ]


def test_each_child_has_a_number_of_its_own_and_never_more_than_was_asked_for() -> None:
    numbers = iter([0.0, 0.5, 1.0, 1.0])
    world = World(a=kind(3, max_jobs=100), random=lambda: next(numbers))
    assert [child.recycle_after_jobs for child in world.children()] == [100, 95, 90]
    world = World(a=kind(1, max_jobs=1), random=lambda: 1.0)
    assert [child.recycle_after_jobs for child in world.children()] == [1]


def test_between_its_own_number_and_max_jobs_a_child_serves_on() -> None:
    world = world_of(max_jobs=10, recycle_jitter=0.5)
    for number in range(5):
        child, _ = do(world, str(number))
    assert child.recycle_reason
    for number in range(5):
        assert do(world, f"more{number}")[0] is child
    assert child.state is ChildState.RETIRING


def test_a_tracer_that_never_needs_its_child_costs_it_nothing() -> None:
    world = world_of(max_jobs=1)
    job = world.submit()
    child = child_of(job)
    world.tell(world.scheduler.finish, job)
    assert (child.state, child.jobs_begun) == (ChildState.IDLE, 0)


# -- by age, memory, or because it asks


def test_an_old_child_serves_until_another_can() -> None:
    world = world_of(max_age=100.0)
    [child] = world.children()
    assert world.at(89.9) == []
    assert world.at(90.0) == [Spawn(successor_of(child))]
    assert child.recycle_reason == "it is 90 s old (max_age)"
    assert do(world)[0] is child
    successor = successor_of(child)
    world.now = 95.0
    assert world.tell(world.scheduler.ready, successor, READY, None) == [
        Recycled(child, successor),
        CloseStdin(child),
    ]
    assert Spawn in map(type, world.at(185.0)), "its own age counts from when it was ready"


def test_a_job_is_not_interrupted_because_its_child_is_old() -> None:
    world = world_of(max_age=100.0)
    job, child = world.send()
    actions = world.at(90.0) + world.tell(world.scheduler.ready, successor_of(child), READY, None)
    assert not kills(actions)
    assert world.at(5000.0) != []
    assert job.state is JobState.SENT
    assert CloseStdin(child) in world.tell(world.scheduler.replied, child, Ok())


def test_memory_is_looked_at_after_each_job() -> None:
    world = world_of(max_memory=100 * MIB)
    child, actions = do(world)
    assert Measure(child) in actions
    world.tell(world.scheduler.measured, child, 90 * MIB)
    assert not child.recycle_reason
    actions = world.tell(world.scheduler.measured, child, 90 * MIB + 1)
    assert child.recycle_reason == "it takes 90 MiB of memory (max_memory)"
    assert actions == [Spawn(successor_of(child))]
    assert Measure(child) not in do(world, "y")[1], "it is known"


def test_without_max_memory_nobody_looks() -> None:
    world = world_of()
    child, actions = do(world)
    assert Measure(child) not in actions
    world.tell(world.scheduler.measured, child, 10**12)
    assert not child.recycle_reason


def test_a_child_may_ask_to_be_replaced() -> None:
    world = world_of()
    child, actions = do(world, retire=True)
    assert child.recycle_reason == "it asked for it (retire)"
    assert Spawn(successor_of(child)) in actions
    assert child.state is ChildState.IDLE


# -- a quarter at a time


@pytest.mark.parametrize(("size", "most"), [(1, 1), (3, 1), (7, 1), (8, 2), (16, 4)])
def test_a_quarter_of_a_group_is_recycled_at_a_time(size: int, most: int) -> None:
    world = World(a=kind(size, handshake=True, max_age=100.0), limit=100)
    for child in world.children():
        world.tell(world.scheduler.ready, child, READY, None)
    old = world.children()
    booting = [action.child for action in world.at(90.0) if isinstance(action, Spawn)]
    assert len(booting) == most
    replaced = 0
    while booting:
        replaced += 1
        actions = world.tell(world.scheduler.ready, booting.pop(0), READY, None)
        booting += [action.child for action in actions if isinstance(action, Spawn)]
        assert len(booting) <= most
        assert world.scheduler.groups["a"].in_service == size
    assert replaced == size
    assert all(child.state is ChildState.STOPPING for child in old)


def test_children_that_do_no_more_jobs_do_not_wait_for_their_turn() -> None:
    world = world_of(4, max_jobs=1)
    children = [world.send(str(number))[1] for number in range(4)]
    # While they work, one at a time; when they have worked, they are missed.
    assert [child.slot.successor is not None for child in children].count(True) == 4


# -- what goes wrong meanwhile


def test_a_successor_that_fails_costs_the_old_child_nothing() -> None:
    world = world_of(max_age=100.0)
    [child] = world.children()
    successor = new_child(world.at(90.0))
    [report] = reports(world.tell(world.scheduler.exited, successor, 1, READ_ALL))
    assert report.delay == pytest.approx(0.1)
    assert (child.slot.child, child.slot.successor) == (child, None)
    assert do(world)[0] is child
    assert new_child(world.at(90.2)) is successor_of(child)


def test_a_group_of_one_job_each_forgets_a_failure_too() -> None:
    world = world_of(max_jobs=1)
    world.tell(world.scheduler.exited, world.children()[0], 1, READ_ALL)
    world.tell(world.scheduler.ready, new_child(world.at(0.1)), READY, None)
    child, _ = do(world)
    assert child.slot.failures == 1
    world.tell(world.scheduler.ready, successor_of(child), READY, None)
    assert child.slot.failures == 0


def test_successors_back_off_however_well_the_old_child_does() -> None:
    world = world_of(max_age=100.0)
    [child] = world.children()
    world.at(90.0)
    delays = []
    for number in range(4):
        [report] = reports(world.tell(world.scheduler.exited, successor_of(child), 1, READ_ALL))
        delays.append(report.delay)
        assert do(world, str(number))[0] is child
        world.at(world.now + report.delay)
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8])
    world.tell(world.scheduler.ready, successor_of(child), READY, None)
    do(world, "x")
    assert child.slot.failures == 0


def test_a_successor_that_cannot_be_spawned_is_tried_again() -> None:
    world = world_of(max_age=100.0)
    [child] = world.children()
    world.spawns_fail = True
    assert reports(world.at(90.0))
    assert child.slot.successor is None
    assert world.scheduler.groups["a"].successors == 0
    world.spawns_fail = False
    assert new_child(world.at(91.0)) is successor_of(child)


@pytest.mark.parametrize("handshake", [True, False])
def test_a_successor_takes_the_place_of_a_child_that_dies_meanwhile(handshake: bool) -> None:
    world = World(a=kind(1, handshake=handshake, max_age=100.0))
    [child] = world.children()
    if handshake:
        world.tell(world.scheduler.ready, child, READY, None)
    successor = new_child(world.at(90.0))
    actions = world.tell(world.scheduler.exited, child, 1, READ_ALL)
    assert [type(action) for action in actions].count(Spawn) == 0
    assert child.slot.child is successor
    assert child.slot.successor is None
    job = world.submit()
    # Who can't tell when it is ready serves at once, like any other.
    assert (job.child is successor) == (not handshake)
    if handshake:
        assert Accept(job, successor, 90.0) in world.tell(
            world.scheduler.ready, successor, READY, None
        )


def test_a_successor_that_is_not_even_spawned_takes_a_dead_childs_place() -> None:
    world = World(a=kind(1, max_age=100.0))
    [child] = world.children()
    # The events of one turn, before any action is performed.
    world.now = 90.0
    world.scheduler.tick(world.now)
    [spawn] = world.scheduler.dispatch(world.now)
    assert isinstance(spawn, Spawn)
    assert spawn.child is child.slot.successor
    world.note(world.scheduler.exited, child, 1, READ_ALL)
    assert spawn.child.state is ChildState.STARTING
    world.perform([spawn])
    assert spawn.child.state is ChildState.IDLE


def test_a_child_that_was_superseded_and_dies_leaves_its_successor_alone() -> None:
    world = world_of(max_jobs=1)
    job, child = world.send()
    successor = successor_of(child)
    world.tell(world.scheduler.ready, successor, READY, None)
    actions = world.tell(world.scheduler.exited, child, -11, READ_ALL)
    assert actions[0] == Resolve(job, Lost(-11, ""), child)
    assert not [action for action in actions if isinstance(action, Spawn)]
    assert (child.slot.child, child.slot.failures) == (successor, 0)


def test_a_retiring_child_that_speaks_is_replaced_by_its_successor() -> None:
    world = world_of(max_jobs=1)
    child, _ = do(world)
    assert child.state is ChildState.RETIRING
    successor = successor_of(child)
    actions = world.tell(world.scheduler.replied, child, Ok())
    assert kills(actions) == [signal.SIGKILL]
    assert child.slot.child is successor


def test_a_stop_stops_successors_and_those_that_retire() -> None:
    world = world_of(max_jobs=1)
    child, _ = do(world)
    successor = successor_of(child)
    assert world.tell(world.scheduler.stop) == [CloseStdin(child), CloseStdin(successor)]


def test_shrink_takes_a_successor_along() -> None:
    world = World(limit=2, a=kind(None, handshake=True, max_age=100.0))
    for child in world.children():
        world.tell(world.scheduler.ready, child, READY, None)
    # Of both, who is older by a hair first.
    successor = new_child(world.at(90.0))
    world.scheduler.groups["a"].slots.sort(key=lambda slot: slot.successor is not None)
    actions = world.tell(world.scheduler.shrink, 1)
    assert CloseStdin(successor) in actions
    # The other one's turn has come.
    assert world.scheduler.groups["a"].successors == 1
    assert new_child(actions).slot is world.slots()[0]


# -- proof


def test_a_successor_that_cannot_tell_proves_itself_by_living() -> None:
    world = World(a=kind(1, max_age=100.0))
    [child] = world.children()
    successor = new_child(world.at(90.0))
    assert world.at(90.0 + STARTUP_GRACE / 2) == []
    assert successor.state is ChildState.STARTING
    assert world.at(90.0 + STARTUP_GRACE) == [Recycled(child, successor), CloseStdin(child)]
    assert successor.state is ChildState.IDLE


def test_a_successor_that_closes_its_stdout_has_proved_nothing() -> None:
    world = World(a=kind(1, max_age=100.0))
    [child] = world.children()
    successor = new_child(world.at(90.0))
    world.tell(world.scheduler.stdout_closed, successor)
    actions = world.at(90.0 + STARTUP_GRACE)
    assert kills(actions) == [signal.SIGKILL]
    assert child.slot.child is child


def test_a_group_comes_up_when_a_child_has_lived_for_a_moment() -> None:
    world = World(a=kind(1))
    group = world.scheduler.groups["a"]
    [child] = world.children()
    child.proven = group.came_up = False
    child.startup_grace_until = 5.0
    assert world.scheduler.booting
    world.tell(world.scheduler.stdout_closed, child)
    assert world.scheduler.booting, "its exit status is still to come"
    world.tell(world.scheduler.exited, child, 127, READ_ALL)
    assert not world.scheduler.booting
    assert not group.came_up
    assert group.failure == "it closed its stdout; it exited: exitcode 127"


def test_a_job_done_is_proof_too() -> None:
    world = World(a=kind(1))
    world.tell(world.scheduler.exited, world.children()[0], 1, READ_ALL)
    child = new_child(world.at(0.1))
    assert not child.proven
    _, actions = do(world)
    assert child.proven
    assert Healed(world.scheduler.groups["a"]) in actions


# -- degraded and whole again


def test_a_group_is_whole_again_when_all_its_children_work() -> None:
    world = World(a=kind(2))
    group = world.scheduler.groups["a"]
    first, second = world.children()
    world.tell(world.scheduler.exited, first, 1, READ_ALL)
    world.tell(world.scheduler.exited, second, 1, READ_ALL)
    assert (group.degraded, group.in_service, group.backing_off) == (True, 0, 2)
    world.spawns_fail = True
    world.at(0.1)
    world.spawns_fail = False
    world.at(0.31)
    assert (group.in_service, group.backing_off) == (2, 0)
    assert world.at(0.8) == []
    assert world.at(0.82) == [Healed(group)]
    assert not group.degraded


def test_a_group_whose_children_greet_and_die_is_not_whole() -> None:
    world = World(a=kind(1, handshake=True))
    group = world.scheduler.groups["a"]
    [child] = world.children()
    world.tell(world.scheduler.ready, child, READY, None)
    world.tell(world.scheduler.exited, child, 3, READ_ALL)
    child = new_child(world.at(0.1))
    assert world.tell(world.scheduler.ready, child, READY, None) == []
    world.tell(world.scheduler.exited, child, 3, READ_ALL)
    child = new_child(world.at(5.0))
    assert world.tell(world.scheduler.ready, child, READY, None) == []
    assert world.at(5.0 + STARTUP_GRACE - 0.1) == []
    assert group.degraded
    assert world.at(5.0 + STARTUP_GRACE) == [Healed(group)]
    assert world.at(9.0) == []


def test_a_group_with_a_slot_that_cools_is_not_whole() -> None:
    world = World(a=kind(2, handshake=True))
    group = world.scheduler.groups["a"]
    first, second = world.children()
    for child in (first, second):
        world.tell(world.scheduler.ready, child, READY, None)
    world.tell(world.scheduler.exited, first, 3, READ_ALL)
    first = new_child(world.at(0.1))
    world.tell(world.scheduler.ready, first, READY, None)
    world.tell(world.scheduler.exited, second, 3, READ_ALL)
    assert world.at(0.1 + STARTUP_GRACE) != [Healed(group)]
    assert group.degraded


def test_a_child_that_is_blameless_degrades_nothing() -> None:
    world = World(a=kind())
    do(world)
    world.tell(world.scheduler.exited, world.children()[0], 1, READ_ALL)
    assert not world.scheduler.groups["a"].degraded


# -- crashes


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


def test_a_job_that_cost_too_many_children_is_known() -> None:
    world = World(a=kind())
    assert [crash(world).crashes for _ in range(4)] == [0, 0, 3, 0]
    assert [crash(world, "other").crashes for _ in range(3)] == [0, 0, 3]


@pytest.mark.parametrize(("most", "expected"), [(1, [1, 1]), (2, [0, 2]), (None, [0] * 9)])
def test_how_many_is_a_setting(most: int | None, expected: list[int]) -> None:
    world = World(a=kind(max_crashes=most))
    assert [crash(world).crashes for _ in expected] == expected


def test_a_retry_is_another_job() -> None:
    world = World(a=kind(max_crashes=2))
    assert [crash(world, retries=retries).crashes for retries in (0, 1, 2, 2)] == [0, 0, 0, 2]


def test_a_good_end_takes_it_all_back() -> None:
    world = World(a=kind(max_crashes=2))
    crash(world)
    do(world)
    assert crash(world).crashes == 0


def test_only_so_many_are_remembered() -> None:
    _, child = World(a=kind(max_crashes=2)).send()
    crashes = Crashes()

    def count(task_id: str) -> int:
        return crashes.count(Job(task_id, "it", "a"), child)

    assert {count(str(number)) for number in range(CRASHES_REMEMBERED + 1)} == {0}
    assert [count(task_id) for task_id in ("1", "0")] == [2, 0]


def test_a_crash_while_the_worker_stops_is_the_workers_doing() -> None:
    world = World(a=kind(max_crashes=1))
    job, child = world.send()
    world.tell(world.scheduler.stop)
    actions = world.tell(world.scheduler.exited, child, -9, READ_ALL)
    assert actions[0] == Resolve(job, Lost(-9, "the worker stops"), child)


@pytest.mark.parametrize("by_us", [True, False])
def test_a_sigkill_that_was_none_of_ours(by_us: bool) -> None:
    world = World(a=kind())
    _, child = world.send()
    if by_us:
        world.tell(world.scheduler.stdout_closed, child)
        assert Kill(child, signal.SIGKILL) in world.at(1.0)
    actions = world.tell(world.scheduler.exited, child, -9, READ_ALL)
    [lost] = (action.outcome for action in actions if isinstance(action, Resolve))
    assert isinstance(lost, Lost)
    assert lost.killed != by_us
    if not by_us:
        [report] = reports(actions)
        assert report.reason == "it exited: signal 9 (SIGKILL), out of memory?"


# -- by request: a restart


def test_a_restart_replaces_all_children_few_at_a_time() -> None:
    world = world_of(4)
    group, old = world.scheduler.groups["a"], world.children()
    assert world.started == old
    actions = world.tell(world.scheduler.restart, [group])
    for child in old:
        successor = new_child(actions)
        assert group.in_service == 4
        actions = world.tell(world.scheduler.ready, successor, READY, None)
        assert Recycled(child, successor) in actions
        assert world.started[-1] is successor
        assert child.slot.last_exit == Exit(child.pid, "the pool is restarted", 0.0)
    assert not [action for action in actions if isinstance(action, Spawn)]
    assert group.counters.replaced == {Cause.RECYCLED: 4}


def test_a_restart_interrupts_no_job() -> None:
    world = world_of()
    job, child = world.send()
    world.tell(world.scheduler.restart, [child.group])
    world.tell(world.scheduler.ready, successor_of(child), READY, None)
    assert (job.state, child.state) == (JobState.SENT, ChildState.BUSY)
    assert CloseStdin(child) in world.tell(world.scheduler.replied, child, Ok())


def test_what_boots_when_a_restart_comes_is_replaced_too() -> None:
    world = World(a=kind(1, handshake=True))
    [first] = world.children()
    second = new_child(world.tell(world.scheduler.restart, [first.group]))
    # It may have read the old code already.
    assert not world.tell(world.scheduler.ready, first, READY, None)
    third = new_child(
        world.tell(world.scheduler.restart, [first.group])
        + world.tell(world.scheduler.ready, second, READY, None)
    )
    assert third.slot.child is second
    assert Recycled(second, third) in world.tell(world.scheduler.ready, third, READY, None)
    assert world.scheduler.groups["a"].slots[0].child is third
    assert not third.recycle_reason


def test_a_successor_that_was_to_be_replaced_is_so_when_its_child_dies() -> None:
    world = world_of()
    [child] = world.children()
    first = new_child(world.tell(world.scheduler.restart, [child.group]))
    world.tell(world.scheduler.restart, [child.group])
    actions = world.tell(world.scheduler.exited, child, 1, READ_ALL)
    assert child.slot.child is first
    assert successor_of(first) is new_child(actions)


def test_a_restart_ends_what_a_slot_waits_for() -> None:
    world = world_of()
    [child] = world.children()
    world.tell(world.scheduler.exited, child, 1, READ_ALL)
    assert child.slot.spawn_at == 0.1
    assert child.slot.last_exit == Exit(child.pid, "it exited: exitcode 1", 0.0)
    fresh = new_child(world.tell(world.scheduler.restart, [child.group]))
    assert (child.slot.child, child.slot.failures) == (fresh, 0)


def test_a_successor_that_cannot_start_leaves_the_old_child_after_a_restart() -> None:
    world = world_of()
    [child] = world.children()
    successor = new_child(world.tell(world.scheduler.restart, [child.group]))
    world.tell(world.scheduler.exited, successor, 1, READ_ALL)
    assert do(world)[0] is child
    assert Recycled in map(
        type, world.tell(world.scheduler.ready, new_child(world.at(0.2)), READY, None)
    )


# -- what they leave running


@pytest.mark.parametrize(("leftovers", "leaves"), [("keep", True), ("kill", False)])
def test_a_child_that_goes_in_good_order_leaves_what_the_setting_says(
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


def test_children_spawned_after_a_change_read_the_new_boot() -> None:
    world = World(a=kind())
    assert world.tell(world.scheduler.change_boot, "a", b"new") == []
    assert world.scheduler.groups["a"].boot == b"new"
