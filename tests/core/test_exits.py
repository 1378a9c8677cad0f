"""What happens when a child exits or closes its stdout."""

from __future__ import annotations

import signal

import pytest

from celery_subproc_pool.core.actions import (
    Forget,
    Kill,
    Report,
    Resolve,
)
from celery_subproc_pool.core.booting import EOF_GRACE
from celery_subproc_pool.core.model import (
    ChildState,
    JobState,
)
from celery_subproc_pool.core.outcomes import (
    UNKNOWN_STATUS,
    Lost,
    describe_exit,
)
from celery_subproc_pool.core.stopping import KILL_PATIENCE
from tests.support.world import (
    READ_ALL,
    STOP_TIMEOUT,
    World,
    ends,
    kills,
    kind,
    reports,
)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "exitcode 0"),
        (3, "exitcode 3"),
        (-9, "signal 9 (SIGKILL)"),
        (-11, "signal 11 (SIGSEGV)"),
        (-99, "signal 99"),
    ],
)
def test_an_exit_status_in_words(status: int, text: str) -> None:
    assert describe_exit(status) == text


def test_a_status_that_nobody_was_told() -> None:
    assert describe_exit(UNKNOWN_STATUS) == (
        "with an unknown exitcode, as its template has died before"
    )


def test_an_exit_loses_the_job() -> None:
    world = World(a=kind())
    job, child = world.send()
    actions = world.tell(world.scheduler.exited, child, -11, READ_ALL)
    reason = "it exited: signal 11 (SIGSEGV)"
    assert actions == [
        Resolve(job, Lost(-11, ""), child),
        Report(child, reason, (job,), 0.1),
        Forget(child),
    ]
    assert (job.state, child.state) == (JobState.CLOSED, ChildState.GONE)
    assert world.scheduler.open_jobs == 0


def test_an_idle_child_that_exits_is_replaced() -> None:
    world = World(a=kind())
    (child,) = world.children()
    assert world.tell(world.scheduler.exited, child, 0, READ_ALL) == [
        Report(child, "it exited: exitcode 0", (), 0.1),
        Forget(child),
    ]


def test_eof_then_exit_loses_the_job_with_the_status() -> None:
    world = World(a=kind())
    job, child = world.send()
    actions = world.tell(world.scheduler.stdout_closed, child)
    assert actions == [Report(child, "it closed its stdout", (job,), 0.1)]
    world.now = 0.05
    actions = world.tell(world.scheduler.exited, child, 3, READ_ALL)
    assert ends(actions) == [Resolve(job, Lost(3, "it closed its stdout"), child)]
    assert actions[-1] == Forget(child)
    assert kills(world.at(1000.0)) == []


def test_eof_without_exit_is_killed_after_a_grace() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.stdout_closed, child)
    assert kills(world.at(EOF_GRACE - 0.01)) == []
    assert world.at(EOF_GRACE) == [Kill(child, signal.SIGKILL)]
    assert ends(world.at(EOF_GRACE + KILL_PATIENCE - 0.01)) == []
    actions = world.tell(world.scheduler.exited, child, -9, READ_ALL)
    assert ends(actions) == [Resolve(job, Lost(-9, "it closed its stdout"), child)]


def test_eof_of_an_idle_child_is_escalated_slowly() -> None:
    world = World(a=kind())
    (child,) = world.children()
    assert kills(world.tell(world.scheduler.stdout_closed, child)) == []
    assert kills(world.at(STOP_TIMEOUT - 0.01)) == []
    assert kills(world.at(STOP_TIMEOUT)) == [signal.SIGTERM]
    assert kills(world.at(2 * STOP_TIMEOUT)) == [signal.SIGKILL]


@pytest.mark.parametrize("by_us", [True, False])
def test_a_sigkill_that_we_did_not_send_is_reported(by_us: bool) -> None:
    world = World(a=kind())
    _, child = world.send()
    if by_us:
        world.tell(world.scheduler.stdout_closed, child)
        assert Kill(child, signal.SIGKILL) in world.at(1.0)
    actions = world.tell(world.scheduler.exited, child, -9, READ_ALL)
    [lost] = (action.outcome for action in actions if isinstance(action, Resolve))
    assert isinstance(lost, Lost)
    assert lost.killed_by_others != by_us
    if not by_us:
        [report] = reports(actions)
        assert report.reason == "it exited: signal 9 (SIGKILL), out of memory?"
