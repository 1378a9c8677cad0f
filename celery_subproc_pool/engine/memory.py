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
        #: By pid: when its private memory was counted, how much was resident then, and how much of
        #: that was private.
        self._counted: dict[int, tuple[float, int, int]] = {}

    def measure(self, pid: int, now: float, shares: bool = False) -> int:
        """Return the resident memory of a child and of what it has started, in bytes; 0 if it is
        gone.

        Arguments:
            pid: the process that was started for the child, the leader of its session.
            now: monotonic time, in seconds.
            shares: whether it shares memory with the template that has forked it. That does not
                count: it would be counted once for each child.
        """
        if now >= self._surveyed_at + SURVEY_INTERVAL:
            self._surveyed_at = now
            self._members = _survey()
        own = self._private(pid, now) if shares else _resident(pid)
        return own + self._members[pid]

    def _private(self, pid: int, now: float) -> int:
        """Return the resident bytes that `pid` shares with no other process.

        The system counts them page by page. So that is done at most once per `SURVEY_INTERVAL`;
        what the process has grown by since then is its own.
        """
        resident = _resident(pid)
        counted_at, before, private = self._counted.get(pid, (float("-inf"), 0, 0))
        if now >= counted_at + SURVEY_INTERVAL:
            private = _count_private(pid)
            self._counted[pid] = (now, resident, private)
            return private
        return private + max(0, resident - before)

    def forget(self, pid: int) -> None:
        """Forget the process `pid`, which is gone."""
        self._counted.pop(pid, None)


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


def _count_private(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as rollup:
            # Lines as ``Private_Dirty:      1234 kB`` (proc(5)).
            fields = [line.split() for line in rollup if line.startswith(b"Private_")]
    except OSError:
        return 0
    return 1024 * sum(int(words[1]) for words in fields)


def _resident(pid: int) -> int:
    try:
        resident: int = psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0
    return resident
