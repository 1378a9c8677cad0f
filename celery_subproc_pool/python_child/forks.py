"""Lets processes that a task has forked end on SIGTERM at once.

In a Python child, as in prefork's, SIGTERM raises `SystemExit`. A forked copy would inherit that
handler. `multiprocessing` in a task ends its processes by SIGTERM and waits for them. The wait
would never end if the signal came when a copy is about to wait for a lock: a handler in Python does
not interrupt that wait.
"""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from typing import Any

__all__ = ("let_copies_end",)

#: The signals that the forking thread had blocked before the fork.
_blocked = threading.local()


def let_copies_end() -> None:
    """Give copies that are forked from now on the default action for SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    end = partial(_let_end, handler)
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=end)


def _block() -> None:
    # The copy may get the signal before it has changed the handler.
    _blocked.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _blocked.before)


def _let_end(handler: Any) -> None:
    # A task may have set another handler. That one stays.
    if signal.getsignal(signal.SIGTERM) == handler:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _unblock()
