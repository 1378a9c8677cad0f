"""Wakes a thread that waits for descriptors, from any other thread or a signal handler.

Layer: standard library only; imports nothing of ours.
"""

from __future__ import annotations

import os
import threading

__all__ = ("Wakeup",)


class Wakeup:
    """A pipe to oneself."""

    __slots__ = ("_lock", "_pending", "_reader", "_writer")

    def __init__(self) -> None:
        # Re-entrant: a signal handler may wake while its thread does.
        self._lock = threading.RLock()
        self._pending = False
        self._writer: int | None
        self._reader, self._writer = os.pipe()

    def fileno(self) -> int:
        """Return the descriptor that is readable from `wake` until `clear`."""
        return self._reader

    def wake(self) -> None:
        """Make the descriptor readable. Once closed, it does nothing."""
        with self._lock:
            if self._pending or self._writer is None:
                return
            self._pending = True
            os.write(self._writer, b"\0")

    def clear(self) -> None:
        """Make the descriptor, which is readable, so no longer: before what it was woken for is
        looked at, so that what comes from now on wakes again."""
        with self._lock:
            self._pending = False
            os.read(self._reader, 1)

    def close(self) -> None:
        """Give the pipe back."""
        with self._lock:
            if self._writer is not None:
                os.close(self._writer)
            self._writer = None
        # After the other: who wakes meanwhile must find nothing to write to, or a reader.
        os.close(self._reader)

    def disown(self) -> None:
        """In a forked copy of this process: close the copy's pipe."""
        # The lock may have been taken when the copy was made.
        self._lock = threading.RLock()
        self.close()
