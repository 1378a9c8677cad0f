"""Drivers turn the engine: from the worker's event loop, or in a thread.

Both drivers have the same four methods: `start`, `attach` to the worker's event loop, `drain` (for
a warm stop), `halt` (for a cold stop).
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

#: While children boot: seconds between checks whether the worker is to stop.
BOOT_INTERVAL = 0.5

#: While the pool drains: seconds between checks of the hub's timers.
DRAIN_INTERVAL = 0.5

#: The longest that the engine's own thread sleeps, in seconds.
THREAD_INTERVAL = 60.0

#: Seconds that a cold shutdown waits for the engine's thread.
HALT_GRACE = 5.0


def wait_for_children(supervisor: Supervisor) -> None:
    """Turn the engine until all children with a handshake are ready. No driver has started yet.

    Raises:
        SpawnError: no child of a group came up.
        celery.exceptions.WorkerShutdown or WorkerTerminate: the worker is to stop.
    """
    scheduler = supervisor.scheduler
    while scheduler.booting:
        supervisor.turn(supervisor.wait_time(BOOT_INTERVAL))
        state.maybe_shutdown()
    for group in scheduler.groups.values():
        if group.must_start and not group.came_up:
            command = shlex.join(group.settings.command)
            failure = group.failure.rstrip()
            words = " | ".join(supervisor.last_words(group.name))
            raise SpawnError(
                f"no child of the group {group.name} came up: {failure}\nIts command: {command}"
                + (f"\nIts last stderr lines: {words}" if words else "")
            )


class HubDriver:
    """Lets kombu's hub turn the engine. For the hub, the engine is one reader and one timer.

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
        """Register with `hub`. Celery calls this again after a lost connection.

        By then, the hub has forgotten its readers (`Hub.reset`), and Celery has cancelled the
        timers that were made while it was connecting.
        """
        self._hub = hub
        supervisor = self._supervisor
        hub.add_reader(supervisor.fileno(), supervisor.turn)
        supervisor.on_deadline = self._arm
        # Serve what came while the engine was not turned, and announce the deadline again.
        supervisor.turn_at_deadline()

    def drain(self, unfinished: Callable[[], object]) -> None:
        """Turn the engine until nothing is `unfinished`, then until all children are gone that can
        be killed.

        Return at once in a signal handler that has interrupted a turn of the engine: the code that
        was interrupted is about to drain, too.
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
        """Turn the engine, because the hub does not; run the hub's heartbeats and acks, too."""
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
        # A plain attribute without a lock: a signal handler may set it at any time.
        self._ending = False
        self._unfinished: Callable[[], object] | None = None
        self._thread = threading.Thread(target=self._run, name="subproc-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def attach(self, hub: Any) -> None:
        """Do nothing: there is no event loop."""

    def drain(self, unfinished: Callable[[], object]) -> None:
        """Let the thread turn the engine until nothing is `unfinished`, then until all children are
        gone that can be killed; then end it."""
        self._unfinished = unfinished
        self._end(None)

    def halt(self) -> None:
        """End the thread, even if something is unfinished."""
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
