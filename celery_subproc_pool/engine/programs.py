"""Finds the processes that children have started, by the children's process groups."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

import psutil

__all__ = ("members", "titles")

#: In the command line of the resource trackers of `multiprocessing` and joblib. They clean up after
#: a process that is gone, and then end by themselves. The log does not mention them.
_CLEANER = "resource_tracker"


def members(process_groups: Iterable[int]) -> dict[int, list[int]]:
    """Return the pids of what runs in each process group, except the group's leader.

    Arguments:
        process_groups: their numbers.
    """
    found: dict[int, list[int]] = {group: [] for group in process_groups}
    for pid in psutil.pids() if found else ():
        # It may be gone by now.
        with suppress(OSError):
            group = os.getpgid(pid)
            if pid != group and group in found and _runs(pid):
                found[group].append(pid)
    return found


def titles(pids: Iterable[int]) -> tuple[str, ...]:
    """Return the pid and name of each process as text. Leave out those that are gone, and
    resource trackers."""
    return tuple(title for pid in sorted(pids) if (title := _title(pid)))


def _runs(pid: int) -> bool:
    try:
        running: bool = psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
    return running


def _title(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        with suppress(psutil.AccessDenied):
            if any(_CLEANER in word for word in process.cmdline()):
                return ""
        return f"{pid} ({process.name()})"
    except psutil.Error:
        return ""
