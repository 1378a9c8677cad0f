"""Closes what forked copies of the worker inherit, but only the worker may own.

`celery worker -B` forks beat from the worker. Celery starts beat and the pool in random order, so
the fork may come after the pool's start. As long as a copy holds the worker's ends of the pipes, no
child sees the worker close them, and the guardian does not see the worker die.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ("keep_from_copies",)


class Owner(Protocol):
    """Owns descriptors and processes."""

    def disown(self) -> None:
        """Close the copy's descriptors, and touch no process."""


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def keep_from_copies(owner: Owner) -> None:
    """Call `owner.disown` in every copy of this process that is forked from now on."""
    _owners.add(owner)


def _disown() -> None:
    for owner in tuple(_owners):
        owner.disown()


os.register_at_fork(after_in_child=_disown)
