"""Ends what dead children have left running in their process groups.

Layer: above `child` and `programs`. Must not import the scheduler or Celery.

Some of it cleans up after the child, once it sees that the child is gone: `multiprocessing`'s
resource tracker, which removes shared memory and semaphores. So each process gets SIGTERM, and a
moment, before it is killed. Until nothing is left the child is not reaped: as long as it is a
zombie, the number of its group can't be another's.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

from .process import ChildProcess
from .programs import members

__all__ = ("Remains",)

#: Seconds that what is left has to end by itself.
MOMENT = 1.0

#: Seconds from one look at it to the next.
LOOK_INTERVAL = 0.1


class Remains:
    """What dead children have left, on its way out.

    Arguments:
        forget: called with the number of each group that is empty.
    """

    def __init__(self, forget: Callable[[int], None]) -> None:
        self._forget = forget
        #: When what is left of a child is killed.
        self._due: dict[ChildProcess, float] = {}
        #: When to look next; None: nothing is left.
        self.deadline: float | None = None

    @property
    def groups(self) -> list[int]:
        """The numbers of the groups that are not empty yet."""
        return [process.pid for process in self._due]

    def end(self, process: ChildProcess, rest: Sequence[int], now: float) -> None:
        """Have what is left of a child end.

        Arguments:
            process: the child, which has ended.
            rest: what runs in its group.
            now: monotonic time, in seconds.
        """
        if rest:
            process.kill(signal.SIGTERM)
            self._due[process] = now + MOMENT
            self.deadline = self.deadline or now + LOOK_INTERVAL
        else:
            self._finish(process)

    def look(self, now: float) -> None:
        """Let go of what has ended by `now`, and kill what had its moment."""
        if self.deadline is not None and now < self.deadline:
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

    def _finish(self, process: ChildProcess) -> None:
        process.reap()
        self._due.pop(process, None)
        self._forget(process.pid)
