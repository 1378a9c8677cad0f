"""What is due at a time: of jobs, of children, of slots."""

from __future__ import annotations

from typing import Protocol

from .actions import Action
from .deadlines import Alarm
from .jobs import Jobs
from .model import Child, ChildState, Group, children_of
from .spawning import Spawning
from .time_limits import TimeLimits

__all__ = ("LATE", "Timers")

#: A tick that comes so many seconds late shows that the engine was not run.
LATE = 1.0


class ChildTimer(Protocol):
    """What has timers of children."""

    def tick(self, child: Child, now: float) -> list[Action]:
        """Do what is due of `child`, and set the alarm to what is due next."""


class Timers:
    """Does what is due.

    Arguments:
        groups: the groups by name.
        alarm: says when something is due.
        jobs: has timers of jobs that wait.
        time_limits: has timers of jobs that are with a child.
        child_timers: have timers of children; asked in this order.
        spawning: has timers of slots.
    """

    def __init__(
        self,
        groups: dict[str, Group],
        alarm: Alarm,
        jobs: Jobs,
        time_limits: TimeLimits,
        child_timers: tuple[ChildTimer, ...],
        spawning: Spawning,
    ) -> None:
        self._groups = groups
        self._alarm = alarm
        self._jobs = jobs
        self._time_limits = time_limits
        self._child_timers = child_timers
        self._spawning = spawning

    def tick(self, now: float) -> list[Action]:
        """Do what is due at `now`, and set the alarm to what is due next."""
        alarm = self._alarm
        if alarm.deadline is None or now < alarm.deadline:
            return []
        if now - alarm.deadline > LATE:
            self._time_limits.excuse_silence(children_of(self._groups), now)
        alarm.clear()
        actions: list[Action] = []
        for child in children_of(self._groups):
            actions += self._tick_child(child, now)
        actions += self._spawning.fill_all(now)
        actions += self._jobs.tick(now)
        return actions

    def _tick_child(self, child: Child, now: float) -> list[Action]:
        actions: list[Action] = []
        for job in tuple(child.jobs.values()):
            # The end of one job may be the end of the child.
            if child.state is ChildState.BUSY:
                actions += self._time_limits.tick(child, job, now)
        for timer in self._child_timers:
            actions += timer.tick(child, now)
        return actions
