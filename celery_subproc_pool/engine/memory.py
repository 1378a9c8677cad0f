"""How much memory children take, each with all that it has started.

Layer: psutil; imports nothing of ours.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress

import psutil

__all__ = ("MemoryMeter",)

#: Seconds from one look at all processes of the system to the next.
SURVEY_INTERVAL = 1.0


class MemoryMeter:
    """Measures children. One serves them all: it looks at the system's processes at most once in
    `SURVEY_INTERVAL`, and only at a child's own for each job.

    What a child started is what is in its session, as the pool gives each a session of its own.
    """

    def __init__(self) -> None:
        self._surveyed_at = float("-inf")
        #: Resident bytes of a session's members, but for its leader.
        self._members: Counter[int] = Counter()

    def measure(self, pid: int, now: float) -> int:
        """Return the resident memory of a child and of what it started, in bytes; 0 if it is gone.

        Arguments:
            pid: the process that was started for it, the leader of its session.
            now: monotonic time, in seconds.
        """
        if now >= self._surveyed_at + SURVEY_INTERVAL:
            self._surveyed_at = now
            self._members = _survey()
        return _resident(pid) + self._members[pid]


def _survey() -> Counter[int]:
    members: Counter[int] = Counter()
    own = os.getsid(0)
    for pid in psutil.pids():
        # Another user's process on a system that keeps this secret, or one that is gone.
        with suppress(OSError):
            session = os.getsid(pid)
            if session not in (own, pid):
                members[session] += _resident(pid)
    return members


def _resident(pid: int) -> int:
    try:
        resident: int = psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0
    return resident
