"""What is counted for each group; `stats` shows it. Only the methods here write the counters."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from .states import Cause

__all__ = ("TIMES_REMEMBERED", "Counters")

#: How many of the latest waiting and running times are kept.
TIMES_REMEMBERED = 1000


@dataclass(slots=True, eq=False)
class Counters:
    """The counters of one group."""

    #: How many jobs the children that are gone have begun, also those whose slot was removed.
    jobs_begun: int = 0
    jobs_done: int = 0
    throttled: int = 0
    #: Of the latest jobs: seconds from arrival until a child had it.
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES_REMEMBERED))
    #: Of the latest jobs: seconds from the request until the reply.
    runs: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES_REMEMBERED))
    replaced: Counter[Cause] = field(default_factory=Counter)

    def count_wait(self, seconds: float) -> None:
        """A child got a job after `seconds`."""
        self.waits.append(seconds)

    def count_reply(self, seconds: float, throttled: bool) -> None:
        """A child replied after `seconds`, maybe with ``throttled``."""
        self.jobs_done += 1
        self.runs.append(seconds)
        self.throttled += throttled

    def count_late_reply(self) -> None:
        """A child replied to a job that was over already."""
        self.jobs_done += 1

    def count_replaced(self, cause: Cause) -> None:
        """A child was replaced."""
        self.replaced[cause] += 1

    def count_gone(self, jobs_begun: int) -> None:
        """A child that has begun so many jobs is gone."""
        self.jobs_begun += jobs_begun
