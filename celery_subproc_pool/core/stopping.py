"""How a child is made to exit: end of stdin, SIGTERM, SIGKILL."""

from __future__ import annotations

import signal

from . import service
from .actions import Action, CloseStdin, Kill
from .deadlines import Alarm
from .model import Child, ChildState, Job

__all__ = ("KILL_PATIENCE", "Stopping")

#: Seconds from SIGKILL until a child must have exited. After that the system holds on to it.
KILL_PATIENCE = 5.0


class Stopping:
    """Stops children step by step.

    Arguments:
        alarm: is set to the next step.
    """

    __slots__ = ("_alarm",)

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm

    def stop_gently(self, child: Child, now: float) -> list[Action]:
        """Close the stdin of `child`. If it does not exit within `stop_timeout`, it gets SIGTERM,
        and SIGKILL after another."""
        if child.state is ChildState.STOPPING:
            return []
        service.leave(child, ChildState.STOPPING)
        self.escalate_at(child, now + child.group.settings.stop_timeout, terminating=False)
        return [CloseStdin(child)]

    def stop_when_idle(self, child: Child, now: float) -> list[Action]:
        """Stop `child`, which serves no slot any more, once it has no job."""
        if not child.jobs:
            return self.stop_gently(child, now)
        service.set_aside(child)
        return []

    def release(self, child: Child, job: Job, now: float) -> list[Action]:
        """Let `child` go on after `job`: it can have another one, or it stops."""
        return self.stop_gently(child, now) if service.release(child, job) else []

    def escalate_at(self, child: Child, deadline: float, terminating: bool) -> None:
        """Kill `child` at `deadline`: by SIGTERM first, unless it is `terminating` already."""
        child.stop_deadline = deadline
        child.terminating = terminating
        self._alarm.set(deadline)

    def kill(self, child: Child, signum: int, now: float) -> Kill:
        """Return the action that kills `child`. After SIGKILL, it must exit in KILL_PATIENCE."""
        if signum == signal.SIGKILL:
            child.killed = True
            self.escalate_at(child, now + KILL_PATIENCE, terminating=True)
        return Kill(child, signum)

    @staticmethod
    def is_overdue(child: Child, now: float) -> bool:
        """Return whether `child` should have exited by now, because it was killed."""
        return child.killed and child.stop_deadline is not None and now >= child.stop_deadline

    @staticmethod
    def give_up(child: Child) -> None:
        """Wait no more for the exit of `child`."""
        child.unkillable = True
        child.stop_deadline = None

    def tick(self, child: Child, now: float) -> list[Action]:
        """Take the next step if it is due."""
        actions: list[Action] = []
        if child.stop_deadline is not None and now >= child.stop_deadline:
            if child.terminating:
                actions.append(self.kill(child, signal.SIGKILL, now))
            else:
                stop_timeout = child.group.settings.stop_timeout
                self.escalate_at(child, now + stop_timeout, terminating=True)
                actions.append(self.kill(child, signal.SIGTERM, now))
        self._alarm.set(child.stop_deadline)
        return actions
