"""When a child has served long enough: `max_jobs`, `max_age`, `max_memory`, or at its request."""

from __future__ import annotations

import math
from collections.abc import Callable

from .actions import Action, Measure
from .deadlines import Alarm
from .model import Child

__all__ = ("Recycling",)

#: The fraction of a group (but at least one child) whose successors may boot at a time.
RECYCLED_AT_A_TIME = 0.25


class Recycling:
    """Marks children that are to be recycled.

    Arguments:
        alarm: is set to when a child will be too old.
        random: returns numbers from 0 to 1, for jitter.
    """

    __slots__ = ("_alarm", "_random", "marked")

    def __init__(self, alarm: Alarm, random: Callable[[], float]) -> None:
        self._alarm = alarm
        self._random = random
        #: Children that are to be recycled, as an ordered set. Some may serve no slot any more.
        self.marked: dict[Child, None] = {}

    def prepare(self, child: Child) -> None:
        """Choose the limits of a new child."""
        settings = child.group.settings
        if not settings.recycles:
            return
        child.recycle_factor = 1.0 - settings.recycle_jitter * self._random()
        if settings.max_jobs is not None:
            child.recycle_after_jobs = max(1, math.ceil(settings.max_jobs * child.recycle_factor))

    def start_age(self, child: Child, now: float) -> None:
        """Let `max_age` count from `now`: `child` enters service."""
        max_age = child.group.settings.max_age
        if max_age is not None:
            child.max_age_at = now + max_age * child.recycle_factor
            self._alarm.set(child.max_age_at)

    # -- marking

    def mark(self, child: Child, reason: str) -> None:
        """Have `child` recycled: it serves until a successor can take its place."""
        if not child.recycle_reason:
            child.recycle_reason = reason
            self.note_slot(child)

    def note_slot(self, child: Child) -> None:
        """Note that `child` serves a slot. A successor that was marked is recycled only then."""
        if child.recycle_reason and child.slot.child is child:
            self.marked[child] = None

    def count_begun(self, child: Child) -> None:
        """Count a request that was written to `child`."""
        child.jobs_begun += 1
        if child.recycle_after_jobs is not None and child.jobs_begun >= child.recycle_after_jobs:
            # Not only when it is done: the successor can boot during the last job.
            self.mark(child, f"it has had {child.jobs_begun} jobs (max_jobs)")

    @staticmethod
    def count_done(child: Child) -> None:
        """Count a reply of `child`."""
        child.jobs_done += 1

    def check_reply(self, child: Child, retire: bool) -> list[Action]:
        """Check `child` after a reply; `retire` is whether it asks to be recycled."""
        if retire:
            self.mark(child, "it asked for it (retire)")
        elif child.group.settings.max_memory is not None and not child.recycle_reason:
            return [Measure(child)]
        return []

    def measured(self, child: Child, memory: int) -> None:
        """Check the memory of `child`, in bytes, what it has started included."""
        most = child.group.settings.max_memory
        if most is not None and memory > most * child.recycle_factor:
            self.mark(child, f"it takes {memory / 2**20:.0f} MiB of memory (max_memory)")

    def tick(self, child: Child, now: float) -> list[Action]:
        """Check the age of `child`. A successor is spawned later: returns no actions."""
        if child.max_age_at is not None and now >= child.max_age_at:
            child.max_age_at = None
            age = now - child.spawned_at
            self.mark(child, f"it is {age:.0f} s old (max_age)")
        self._alarm.set(child.max_age_at)
        return []

    # -- successors

    def take_stock(self) -> list[Child]:
        """Forget marked children that serve no slot any more; return the others."""
        self.marked = {child: None for child in self.marked if child.slot.child is child}
        return list(self.marked)

    @staticmethod
    def may_have_successor(child: Child) -> bool:
        """Return whether a successor of `child`, which serves a slot, may be spawned now."""
        if not child.recycle_reason or child.slot.successor is not None:
            return False
        # A child that gets no more jobs is missing already: its successor need not wait.
        most = max(1, int(len(child.group.slots) * RECYCLED_AT_A_TIME))
        return child.max_jobs_reached or child.group.successors < most
