"""What forked copies must not inherit: of the worker, what is its alone; of a child, its SIGTERM.

Layer: standard library only; imports nothing of ours.

`celery worker -B` forks beat from the worker, sometimes after its pool has started: Celery orders
the two by chance. As long as such a copy has the worker's ends of the pipes, no child sees the
worker close them, and the guardian does not see it die.

In a Python child, as in prefork's, SIGTERM raises `SystemExit`. `multiprocessing` in a task ends
its processes by SIGTERM, and waits for them: for ever, if that comes when a copy is about to wait
for a lock, which a handler in Python does not interrupt.
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from functools import partial
from typing import Any, Protocol

__all__ = ("keep_from_copies", "let_copies_end")


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

#: The signals that the thread which forks had blocked before.
_blocked = threading.local()


def let_copies_end() -> None:
    """Have every copy that is forked from now on end on SIGTERM at once, as most processes do,
    instead of what this one does on it now."""
    handler = signal.getsignal(signal.SIGTERM)
    end = partial(_let_end, handler)
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=end)


def _block() -> None:
    # The copy may be sent one before it could ask for anything else.
    _blocked.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _blocked.before)


def _let_end(handler: Any) -> None:
    # A handler that a task has set is its own affair.
    if signal.getsignal(signal.SIGTERM) == handler:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _unblock()
