"""Which processes run in the groups of children, beside the children.

Layer: psutil; imports nothing of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

import psutil

__all__ = ("members", "titles")

#: Stands in the command of what ends by itself, once it has cleaned up after a process that is
#: gone: `multiprocessing`'s, joblib's. Nobody wants to hear of it.
_CLEANER = "resource_tracker"


def members(groups: Iterable[int]) -> dict[int, list[int]]:
    """Return the pids of what runs in each process group, but for the group's leader.

    Arguments:
        groups: the groups' numbers.
    """
    found: dict[int, list[int]] = {group: [] for group in groups}
    for pid in psutil.pids() if found else ():
        # One that is gone.
        with suppress(OSError):
            group = os.getpgid(pid)
            if pid != group and group in found and _runs(pid):
                found[group].append(pid)
    return found


def titles(pids: Iterable[int]) -> tuple[str, ...]:
    """Return each process' pid and name, as text; not of what is gone, or goes by itself."""
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
