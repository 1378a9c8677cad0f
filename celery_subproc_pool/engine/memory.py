"""Measures the memory that children take, each with everything that it has started."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress

import psutil

__all__ = ("MemoryMeter",)

#: Seconds between surveys of all processes of the system.
SURVEY_INTERVAL = 1.0


class MemoryMeter:
    """Measures the memory of all children.

    A child has a session of its own: what it has started is what is in that session. That takes a
    survey of all processes, so it is done at most once per `SURVEY_INTERVAL` for all children. The
    child's own process is looked at each time.
    """

    def __init__(self) -> None:
        self._surveyed_at = float("-inf")
        #: By session: the resident bytes of all its members except the leader.
        self._members: Counter[int] = Counter()

    def measure(self, pid: int, now: float) -> int:
        """Return the resident memory of a child and of what it has started, in bytes; 0 if it is
        gone.

        Arguments:
            pid: the process that was started for the child, the leader of its session.
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
        # It is gone, or it is another user's and the system does not tell.
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
