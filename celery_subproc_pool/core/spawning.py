"""When a slot gets its next child, and how long it backs off before."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from . import slots
from .actions import Action, Healed, Spawn
from .deadlines import Alarm
from .model import Child, Group, Slot
from .recycling import Recycling

__all__ = ("BACKOFF_FIRST", "BACKOFF_LAST", "Spawning")

#: Seconds before a slot spawns again. Doubled with each child that ended before it had done a job.
BACKOFF_FIRST, BACKOFF_LAST = 0.1, 30.0


class Spawning:
    """Spawns children for slots that lack one.

    Arguments:
        groups: the groups by name.
        alarm: is set to when a slot spawns again.
        recycling: knows which children need a successor.
        random: returns numbers from 0 to 1, for jitter.
    """

    def __init__(
        self,
        groups: dict[str, Group],
        alarm: Alarm,
        recycling: Recycling,
        random: Callable[[], float],
    ) -> None:
        #: Whether no child is spawned any more: the worker stops.
        self.stopped = False
        #: Groups that spawn no child yet, because no job waits for one.
        self.asleep = [group for group in groups.values() if group.on_demand]
        self._groups = groups
        self._alarm = alarm
        self._recycling = recycling
        self._random = random
        self._spawned = 0

    # -- filling slots

    def fill_all(self, now: float) -> list[Action]:
        """Fill all empty slots, except those that back off."""
        actions: list[Action] = []
        for group in self._groups.values():
            for slot in () if group.on_demand else group.slots:
                if slot.child is None or slot.spawn_at is not None:
                    actions += self.fill(group, slot, now)
        return actions

    def wake(self, now: float) -> list[Action]:
        """Spawn the children of groups on demand for which a job waits now."""
        needed = [group for group in self.asleep if group.waiting]
        if not needed:
            return []
        for group in needed:
            group.on_demand = False
            self.asleep.remove(group)
        return self.fill_all(now)

    def spawn_successors(self, now: float) -> list[Action]:
        """Spawn successors of children that are to be recycled, as many as may boot at a time."""
        actions: list[Action] = []
        for child in self._recycling.take_stock():
            actions += self.fill(child.group, child.slot, now)
        return actions

    def fill(self, group: Group, slot: Slot, now: float) -> list[Action]:
        """Spawn what `slot` lacks now: a child, or a successor of its child."""
        if self.stopped:
            return []
        if slot.spawn_at is not None and now < slot.spawn_at:
            self._alarm.set(slot.spawn_at)
            return []
        slot.spawn_at = None
        if slot.child is not None and not self._recycling.may_have_successor(slot.child):
            return []
        self._spawned += 1
        child = Child(group, slot, self._spawned)
        self._recycling.prepare(child)
        slots.place(child)
        return [Spawn(child)]

    # -- failures

    def back_off(self, group: Group, slot: Slot, reason: str, now: float) -> float:
        """Delay the next spawn of `slot`, whose child failed for `reason`. Return the delay in
        seconds."""
        self.note_failure(group, reason)
        slot.failures += 1
        delay: float = min(BACKOFF_LAST, BACKOFF_FIRST * 2 ** min(slot.failures - 1, 20))
        delay *= 0.5 + self._random() / 2
        slot.spawn_at = now + delay
        group.degraded = True
        return delay

    @staticmethod
    def note_failure(group: Group, reason: str) -> None:
        """Remember why a child of `group` could not start; empty: a child has proved itself."""
        group.failure = reason

    @staticmethod
    def forget_failures(slot: Slot) -> None:
        """Let the back-off of `slot` begin anew: a child has done a job."""
        slot.failures = 0

    def retry_now(self, group: Group, now: float) -> list[Action]:
        """End the back-off of `group`, and forget its failures."""
        self.note_failure(group, "")
        for slot in group.slots:
            if slot.spawn_at is not None:
                slot.spawn_at = now
                slot.failures = 0
        return self.fill_all(now)

    def restart(self, groups: Iterable[Group], now: float) -> list[Action]:
        """Recycle all children of `groups`. End their back-off too: the cause may be gone."""
        actions: list[Action] = []
        for group in groups:
            for slot in group.slots:
                for child in (slot.child, slot.successor):
                    if child is not None:
                        self._recycling.mark(child, "the pool is restarted")
            actions += self.retry_now(group, now)
        return actions

    @staticmethod
    def cannot_start(group: Group) -> bool:
        """Return whether no child of `group` serves, and a child failed in each slot since
        `retry_now`. A group without slots never has a child."""
        return not group.in_service and (
            not group.slots or bool(group.failure and all(slot.failures for slot in group.slots))
        )

    @staticmethod
    def heal(group: Group) -> list[Action]:
        """Let `group` be degraded no longer, if each slot has a child that has proved itself."""
        if not group.degraded or not all(slot.child and slot.child.proven for slot in group.slots):
            return []
        group.degraded = False
        return [Healed(group)]
