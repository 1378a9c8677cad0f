"""How a child is made to exit: end of stdin, SIGTERM, SIGKILL; and if it does not."""

from __future__ import annotations

import signal

from celery_subproc_pool.core.actions import (
    CloseStdin,
    Forget,
    Kill,
    Resolve,
    Unkillable,
)
from celery_subproc_pool.core.booting import EOF_GRACE
from celery_subproc_pool.core.exits import HELD
from celery_subproc_pool.core.model import (
    ChildState,
)
from celery_subproc_pool.core.outcomes import (
    Lost,
)
from celery_subproc_pool.core.stopping import KILL_PATIENCE
from tests.support.world import (
    READ_ALL,
    STOP_TIMEOUT,
    World,
    kills,
    kind,
)


def test_an_idle_child_is_stopped_gently_then_less_gently() -> None:
    world = World(a=kind())
    (child,) = world.children()
    assert world.tell(world.scheduler.stop) == [CloseStdin(child)]
    assert world.at(STOP_TIMEOUT - 0.1) == []
    assert world.at(STOP_TIMEOUT) == [Kill(child, signal.SIGTERM)]
    assert world.at(2 * STOP_TIMEOUT - 0.1) == []
    assert world.at(2 * STOP_TIMEOUT) == [Kill(child, signal.SIGKILL)]
    assert world.tell(world.scheduler.exited, child, -9, READ_ALL) == [Forget(child)]
    assert world.at(1000.0) == []
    assert world.children() == []


def test_a_child_that_may_not_be_killed_is_waited_for_no_more() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.tell(world.scheduler.stdout_closed, child)
    assert kills(world.at(EOF_GRACE)) == [signal.SIGKILL]
    lost = Lost(None, "its child can't be killed: it runs as root")
    assert world.tell(world.scheduler.unkillable, child, "it runs as root") == [
        Unkillable(child, "it runs as root", (job,)),
        CloseStdin(child),
        Resolve(job, lost, child),
    ]
    assert (child.state, child.jobs) == (ChildState.STOPPING, {})
    # Once is enough.
    assert world.tell(world.scheduler.unkillable, child, "it runs as root") == []
    assert kills(world.at(100.0)) == []
    assert world.tell(world.scheduler.stop) == [CloseStdin(world.slots()[0].child)]
    # If it exits one day, it is gone.
    assert world.tell(world.scheduler.exited, child, 0, READ_ALL) == [Forget(child)]


def test_a_child_that_does_not_exit_after_sigkill_is_waited_for_no_more() -> None:
    world = World(a=kind())
    job, child = world.send(timeout=5.0)
    assert kills(world.at(5.0)) == [signal.SIGKILL]
    assert world.at(5.0 + KILL_PATIENCE - 0.1) == []
    assert world.at(5.0 + KILL_PATIENCE) == [Unkillable(child, HELD, (job,)), CloseStdin(child)]
    assert world.at(100.0) == []


def test_a_child_that_never_booted_and_cannot_be_killed_does_not_keep_the_start_waiting() -> None:
    world = World(a=kind(handshake=True, start_timeout=3.0))
    (child,) = world.children()
    assert kills(world.at(3.0)) == [signal.SIGKILL]
    assert world.scheduler.booting
    world.tell(world.scheduler.unkillable, child, "it runs as root")
    assert not world.scheduler.booting
