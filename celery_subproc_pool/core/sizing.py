"""How many children a group has. Groups without a `size` of their own follow the limit of jobs."""

from __future__ import annotations

from . import slots
from .actions import Action
from .jobs import Jobs
from .model import ChildState, Group, Slot
from .spawning import Spawning
from .stopping import Stopping

__all__ = ("Sizing",)


class Sizing:
    """Adds and removes slots.

    Arguments:
        groups: the groups by name.
        jobs: has the limit.
        spawning: fills new slots.
        stopping: stops children of removed slots.
    """

    def __init__(
        self, groups: dict[str, Group], jobs: Jobs, spawning: Spawning, stopping: Stopping
    ) -> None:
        self._groups = groups
        self._jobs = jobs
        self._spawning = spawning
        self._stopping = stopping

    def grow(self, count: int, now: float) -> list[Action]:
        """Add `count` to the limit, and the slots that this needs."""
        self._jobs.limit += count
        actions: list[Action] = []
        for group in self._elastic_groups():
            for _ in range(group.settings.size_for(self._jobs.limit) - len(group.slots)):
                actions += self._spawning.fill(group, slots.add(group), now)
        return actions

    def check_shrink(self, count: int) -> None:
        """Raise ValueError if `shrink` would find too few slots that can be removed."""
        limit = self._jobs.limit - count
        if limit < 0 or any(
            len(_removable_slots(group)) < _surplus(group, limit)
            for group in self._elastic_groups()
        ):
            raise ValueError("Can't shrink pool. All processes busy!")

    def shrink(self, count: int, now: float) -> list[Action]:
        """Take `count` off the limit, and remove the slots that are not needed then. Their children
        end their jobs first."""
        self._jobs.limit -= count
        actions: list[Action] = []
        for group in self._elastic_groups():
            for slot in _removable_slots(group)[::-1][: _surplus(group, self._jobs.limit)]:
                for child in slots.remove(group, slot):
                    actions += self._stopping.stop_when_idle(child, now)
        return actions

    def _elastic_groups(self) -> list[Group]:
        return [group for group in self._groups.values() if group.settings.size is None]


def _surplus(group: Group, limit: int) -> int:
    return max(0, len(group.slots) - group.settings.size_for(limit))


def _removable_slots(group: Group) -> list[Slot]:
    """Return the slots that can be removed, the best last.

    The best ones have no busy child. A busy child can go only if it has many jobs at a time: it
    might never be idle. It ends its jobs first.
    """
    busy, free = [], []
    for slot in group.slots:
        if slot.child is None or slot.child.state is not ChildState.BUSY:
            free.append(slot)
        elif slot.child.capacity > 1:
            busy.append(slot)
    return [*busy, *free]
