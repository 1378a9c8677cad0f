"""How a new child comes into service, from its spawn until it has proved itself."""

from __future__ import annotations

from ..wire.messages import Feature, Ready
from . import service, slots
from .actions import Action, CloseStdin, Recycled, Started
from .deadlines import Alarm
from .model import Cause, Child, ChildState, Group, children_of
from .recycling import Recycling
from .spawning import Spawning
from .stopping import Stopping

__all__ = ("EOF_GRACE", "STARTUP_GRACE", "Booting", "still_booting")

#: Seconds that a child without a handshake must live to prove that it can start.
STARTUP_GRACE = 0.5

#: Seconds that a child has to exit after it closed its stdout.
EOF_GRACE = 0.5


class Booting:
    """Takes children into service.

    Arguments:
        alarm: is set to when a child must be ready, or has proved itself.
        spawning: knows failures.
        recycling: knows ages.
        stopping: stops children that are not needed any more.
    """

    def __init__(
        self, alarm: Alarm, spawning: Spawning, recycling: Recycling, stopping: Stopping
    ) -> None:
        self._alarm = alarm
        self._spawning = spawning
        self._recycling = recycling
        self._stopping = stopping

    # -- events

    def spawned(self, child: Child, pid: int, now: float) -> list[Action]:
        """The process of `child` runs."""
        child.pid = pid
        if child.state is ChildState.STOPPING:
            return [CloseStdin(child)]
        if self._spawning.stopped:
            return self._stopping.stop_gently(child, now)
        child.spawned_at = now
        settings = child.group.settings
        if settings.handshake:
            self._must_boot_by(child, now + settings.start_timeout)
            return []
        self._prove_by_living(child, now)
        if child.slot.child is child:
            self.serve(child, now)
        return []

    def ready(self, child: Child, greeting: Ready, pid: int | None, now: float) -> list[Action]:
        """`child` has booted."""
        if child.state is ChildState.STOPPING:
            return []
        child.pid = pid or child.pid
        _take_greeting(child, greeting)
        child.boot_deadline = None
        self.note_booted(child)
        return self.prove(child, now)

    def prove(self, child: Child, now: float) -> list[Action]:
        """`child` works: it serves, and takes over its slot if it is a successor."""
        child.proven = True
        child.startup_grace_until = None
        group = child.group
        group.came_up = True
        self._spawning.note_failure(group, "")
        if child.state is ChildState.STARTING:
            self.serve(child, now)
        actions: list[Action] = [Started(child)]
        if child.slot.successor is child:
            actions += self._take_over(child, now)
        if not group.degraded:
            return actions
        if group.settings.handshake:
            # It said that it is ready. The group is whole only if it lives.
            self._prove_by_living(child, now)
            return actions
        return [*actions, *self._spawning.heal(group)]

    def serve(self, child: Child, now: float) -> None:
        """Put a STARTING child into service."""
        service.enter(child)
        self._recycling.start_age(child, now)

    def serve_early(self, successor: Child, now: float) -> None:
        """Let `successor` serve now: the child before it is gone. Not if its process does not run
        yet, or if it has a handshake to wait for."""
        if successor.startup_grace_until is not None:
            self.serve(successor, now)

    def _take_over(self, successor: Child, now: float) -> list[Action]:
        """Let `successor` have its slot; the old child ends its jobs and stops."""
        slot = successor.slot
        old = slot.child
        assert old is not None
        slots.promote(slot)
        self._recycling.note_slot(successor)
        if old.jobs_done:
            self._spawning.forget_failures(slot)
        slots.note_exit(old, old.recycle_reason, now)
        old.group.counters.count_replaced(Cause.RECYCLED)
        return [Recycled(old, successor), *self._stopping.stop_when_idle(old, now)]

    # -- whether it reads

    @staticmethod
    def note_booted(child: Child) -> None:
        """`child` has read a request, so it has booted."""
        child.has_booted = True

    @staticmethod
    def note_unread(child: Child) -> None:
        """`child` has not read its first request yet: it still boots."""
        child.seen_unread = True

    # -- time

    def must_exit(self, child: Child, now: float) -> None:
        """Expect the exit of a STARTING child, which closed its stdout: only its exit status will
        tell more."""
        child.startup_grace_until = None
        self._must_boot_by(child, now + EOF_GRACE)

    def _must_boot_by(self, child: Child, deadline: float) -> None:
        child.boot_deadline = deadline
        self._alarm.set(deadline)

    def _prove_by_living(self, child: Child, now: float) -> None:
        child.startup_grace_until = now + STARTUP_GRACE
        self._alarm.set(child.startup_grace_until)

    def tick(self, child: Child, now: float) -> list[Action]:
        """Let `child` have proved itself if it has lived long enough."""
        actions: list[Action] = []
        if child.startup_grace_until is not None and now >= child.startup_grace_until:
            child.startup_grace_until = None
            actions = self._spawning.heal(child.group) if child.proven else self.prove(child, now)
        self._alarm.set(child.startup_grace_until)
        self._alarm.set(child.boot_deadline)
        return actions


def still_booting(groups: dict[str, Group]) -> bool:
    """Return whether the first child of a slot has still to prove itself. One that failed counts
    until it is gone: its exit tells why."""
    return any(
        not child.proven
        and not child.unkillable
        and (child.state is ChildState.STOPPING or not child.slot.failures)
        for child in children_of(groups)
    )


def _take_greeting(child: Child, greeting: Ready) -> None:
    child.name = greeting.name
    child.tasks = frozenset(greeting.tasks or ())
    child.features = greeting.known_features
    child.unknown_features = greeting.unknown_features
    if Feature.MULTIPLEX in child.features:
        most = child.group.settings.max_in_flight
        child.capacity = min(most, greeting.max_in_flight or most)
    child.group.announces |= bool(child.tasks)
    child.group.tells_progress |= Feature.PROGRESS in child.features
