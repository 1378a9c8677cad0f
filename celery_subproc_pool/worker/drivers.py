"""Who turns the engine: the worker's event loop, or a thread.

Layer: above `supervisor`; imports Celery. Both drivers do the same four things: `start`, `attach`
to the worker's event loop, `drain` (a warm stop), `halt` (a cold one).
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable
from typing import Any

from celery.worker import state

from ..engine.supervisor import Supervisor
from ..errors import SpawnError
from .compat import run_queued_acks

__all__ = ("HubDriver", "ThreadDriver", "wait_for_children")

#: Seconds between looks whether the worker is to stop while its children boot.
BOOT_INTERVAL = 0.5

#: Seconds between looks at the hub's timers while the pool drains.
DRAIN_INTERVAL = 0.5

#: The longest that the engine's own thread sleeps, in seconds.
THREAD_INTERVAL = 60.0

#: Seconds that a cold shutdown waits for the engine's thread.
HALT_GRACE = 5.0


def wait_for_children(supervisor: Supervisor) -> None:
    """Turn the engine, which nobody drives yet, until all children with a handshake are ready.

    Raises:
        SpawnError: of a group, none came up.
        celery.exceptions.WorkerShutdown or WorkerTerminate: the worker is to stop.
    """
    scheduler = supervisor.scheduler
    while scheduler.booting:
        supervisor.turn(supervisor.wait_time(BOOT_INTERVAL))
        state.maybe_shutdown()
    for group in scheduler.groups.values():
        # `--autoscale=10,0` starts with none.
        if group.slots and not group.came_up:
            command = shlex.join(group.settings.command)
            failure = group.failure.rstrip()
            words = " | ".join(supervisor.last_words(group.name))
            raise SpawnError(
                f"no child of the group {group.name} came up: {failure}\nIts command: {command}"
                + (f"\nIts last stderr lines: {words}" if words else "")
            )


class HubDriver:
    """Has kombu's hub turn the engine, to which it is one reader and one timer.

    Arguments:
        supervisor: the engine.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._hub: Any = None
        self._timer: Any = None

    def start(self) -> None:
        """Do nothing: the hub comes later, with `attach`."""

    def attach(self, hub: Any) -> None:
        """Register with `hub`. Called again after a lost connection.

        In between, the hub forgot its readers (`Hub.reset`), and Celery cancelled the timers that
        had been made while it was connecting.
        """
        self._hub = hub
        supervisor = self._supervisor
        hub.add_reader(supervisor.fileno(), supervisor.turn)
        supervisor.on_deadline = self._arm
        # Finds what came while nobody turned the engine, and announces the deadline again.
        supervisor.turn_at_deadline()

    def drain(self, unfinished: Callable[[], object]) -> None:
        """Turn the engine until nothing is `unfinished`, then until no child is left that can be
        ended.

        In a signal handler, above a turn of the engine, it returns at once: what was interrupted
        is about to do the same.
        """
        supervisor = self._supervisor
        if supervisor.turning:
            return
        while unfinished():
            self._turn()
        supervisor.post(supervisor.scheduler.stop)
        while supervisor.awaited and not supervisor.failed:
            self._turn()

    def halt(self) -> None:
        """Leave the hub."""
        if self._timer is not None:
            self._timer.cancel()
        if self._hub is not None:
            self._hub.remove(self._supervisor.fileno())

    def _turn(self) -> None:
        """Turn the engine while the hub does not, and keep its heartbeats and acks going."""
        self._supervisor.turn(self._supervisor.wait_time(DRAIN_INTERVAL))
        if self._hub is not None:
            self._hub.fire_timers()
            run_queued_acks(self._hub)

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = max(deadline - time.monotonic(), 0.0)
        self._timer = self._hub.call_later(delay, self._supervisor.turn_at_deadline)


class ThreadDriver:
    """Turns the engine in a thread of its own, for workers without an event loop.

    Arguments:
        supervisor: the engine.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        # No lock in it: a signal handler may set it at any time.
        self._ending = False
        self._unfinished: Callable[[], object] | None = None
        self._thread = threading.Thread(target=self._run, name="subproc-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def attach(self, hub: Any) -> None:
        """Do nothing: there is no event loop."""

    def drain(self, unfinished: Callable[[], object]) -> None:
        """Let the thread turn until nothing is `unfinished` and no child is left that can be
        ended; then it ends."""
        self._unfinished = unfinished
        self._end(None)

    def halt(self) -> None:
        """End the thread, whatever is unfinished."""
        self._end(HALT_GRACE)

    def _end(self, patience: float | None) -> None:
        self._ending = True
        self._supervisor.wake()
        self._thread.join(patience)

    def _run(self) -> None:
        supervisor = self._supervisor
        while not self._ending and not supervisor.failed:
            supervisor.turn(supervisor.wait_time(THREAD_INTERVAL))
        if self._unfinished is not None:
            self._drain(self._unfinished)

    def _drain(self, unfinished: Callable[[], object]) -> None:
        supervisor = self._supervisor
        while unfinished():
            supervisor.turn(supervisor.wait_time(DRAIN_INTERVAL))
        supervisor.post(supervisor.scheduler.stop)
        while supervisor.awaited and not supervisor.failed:
            supervisor.turn(supervisor.wait_time(DRAIN_INTERVAL))
