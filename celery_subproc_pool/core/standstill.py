"""Whether a tracer stands still: what it calls hangs, a result backend for example."""

from __future__ import annotations

from .actions import Action, GoesOn, StandsStill
from .deadlines import Alarm
from .model import Child, ChildState, Job

__all__ = ("STANDSTILL", "Standstill")

#: Seconds in which a tracer that has something to do says nothing, until the log warns. Doubled
#: with each warning.
STANDSTILL = 5.0


class Standstill:
    """Watches tracers.

    Arguments:
        alarm: is set to when a tracer has said nothing for too long.
    """

    __slots__ = ("_alarm",)

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm

    def expect(self, tracer: Child, trace: Job, now: float) -> None:
        """It is for `tracer` to say something about `trace` next."""
        tracer.due.add(trace)
        if tracer.quiet_since is None:
            tracer.quiet_since = now
            tracer.warn_at = now + STANDSTILL
            self._alarm.set(tracer.warn_at)

    def heard(self, tracer: Child, trace: Job, now: float) -> list[Action]:
        """`tracer` has said something about `trace`."""
        quiet_since = tracer.quiet_since
        tracer.due.discard(trace)
        tracer.quiet_since = now if tracer.due else None
        tracer.warn_at = now + STANDSTILL if tracer.due else None
        # After a standstill, this is before the next warning would have come.
        self._alarm.set(tracer.warn_at)
        if not tracer.stands_still or quiet_since is None:
            return []
        tracer.stands_still = False
        return [GoesOn(tracer, now - quiet_since)]

    @staticmethod
    def forget(tracer: Child) -> None:
        """Traces that `tracer` has not read were taken back: it is not to say anything of them."""
        tracer.due = {trace for trace in tracer.due if trace.child is tracer}
        if not tracer.due:
            tracer.quiet_since = tracer.warn_at = None

    def tick(self, child: Child, now: float) -> list[Action]:
        """Warn if `child`, a tracer, has said nothing for too long."""
        if child.warn_at is None or child.quiet_since is None or child.state is ChildState.STOPPING:
            return []
        actions: list[Action] = []
        if now >= child.warn_at:
            quiet = now - child.quiet_since
            child.stands_still = True
            child.warn_at = now + quiet
            actions.append(StandsStill(child, quiet, tuple(child.due)))
        self._alarm.set(child.warn_at)
        return actions
