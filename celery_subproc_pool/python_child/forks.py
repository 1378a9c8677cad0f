"""Lets what a task has forked end on SIGTERM at once.

In a Python child, as in prefork's, SIGTERM raises `SystemExit`. `multiprocessing` in a task ends
its processes by SIGTERM, and waits for them. That wait has no end if the signal comes when a copy
is about to wait for a lock: a handler in Python does not interrupt that.
"""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from typing import Any

__all__ = ("let_copies_end",)

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
