"""What forked copies of the worker must not inherit: what is the worker's alone.

`celery worker -B` forks beat from the worker, sometimes after its pool has started: Celery orders
the two by chance. As long as such a copy has the worker's ends of the pipes, no child sees the
worker close them, and the guardian does not see it die.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ("keep_from_copies",)


class Owner(Protocol):
    """Who has descriptors and processes that are the worker's alone."""

    def disown(self) -> None:
        """Let go of everything, and do nothing to it."""


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def keep_from_copies(owner: Owner) -> None:
    """Have `owner.disown` called in every copy of this process that is forked from now on."""
    _owners.add(owner)


def _disown() -> None:
    for owner in tuple(_owners):
        owner.disown()


os.register_at_fork(after_in_child=_disown)
