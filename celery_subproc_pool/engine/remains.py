"""Ends what dead children have left running in their process groups.

Some of it cleans up after the child once the child is gone. An example is the resource tracker of
`multiprocessing`, which removes shared memory and semaphores. So each process gets SIGTERM, and is
killed only after `MOMENT`. The child is not reaped until its group is empty: as long as it is a
zombie, the number of its group can't be reused.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

from .process import ChildProcess
from .programs import members

__all__ = ("Remains",)

#: Seconds from SIGTERM to SIGKILL.
MOMENT = 1.0

#: Seconds between looks at what is left.
LOOK_INTERVAL = 0.1


class Remains:
    """The process groups of dead children that are not empty yet. A `loop.Chore`.

    Arguments:
        forget: called with the number of each group once it is empty.
    """

    def __init__(self, forget: Callable[[int], None]) -> None:
        self._forget = forget
        #: When the rest of each child's group is killed.
        self._due: dict[ChildProcess, float] = {}
        #: When to look next; None if nothing is left.
        self.deadline: float | None = None

    @property
    def groups(self) -> list[int]:
        """The numbers of the groups that are not empty yet."""
        return [process.pid for process in self._due]

    def end(self, process: ChildProcess, rest: Sequence[int], now: float) -> None:
        """End the rest of a child's group.

        Arguments:
            process: the child, which has ended.
            rest: the pids of what runs in its group.
            now: monotonic time, in seconds.
        """
        if rest:
            process.kill(signal.SIGTERM)
            self._due[process] = now + MOMENT
            self.deadline = self.deadline or now + LOOK_INTERVAL
        else:
            self._finish(process)

    def look(self, now: float) -> None:
        """If a look is due at `now`: forget groups that are empty, and kill those that are due."""
        if self.deadline is None or now < self.deadline:
            return
        running = members(self.groups)
        for process, due in tuple(self._due.items()):
            if now >= due or not running[process.pid]:
                self._finish(process)
        self.deadline = now + LOOK_INTERVAL if self._due else None

    def finish(self) -> None:
        """Kill all that is left."""
        for process in tuple(self._due):
            self._finish(process)
        self.deadline = None

    def disown(self) -> None:
        """In a forked copy of this process: forget all, and touch none of it."""
        self._due.clear()
        self.deadline = None

    def _finish(self, process: ChildProcess) -> None:
        process.reap()
        self._due.pop(process, None)
        self._forget(process.pid)
