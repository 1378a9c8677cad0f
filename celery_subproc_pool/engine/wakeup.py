"""Wakes a thread that waits for descriptors, from another thread or a signal handler."""

from __future__ import annotations

import os
import threading

__all__ = ("Wakeup",)


class Wakeup:
    """A pipe that this process writes to and reads from."""

    __slots__ = ("_lock", "_pending", "_reader", "_writer")

    def __init__(self) -> None:
        # Re-entrant: a signal handler may call `wake` while its thread is in `wake`.
        self._lock = threading.RLock()
        self._pending = False
        self._writer: int | None
        self._reader, self._writer = os.pipe()

    def fileno(self) -> int:
        """Return the descriptor that is readable from `wake` until `clear`."""
        return self._reader

    def wake(self) -> None:
        """Make the descriptor readable. Once closed, do nothing."""
        with self._lock:
            if self._pending or self._writer is None:
                return
            self._pending = True
            os.write(self._writer, b"\0")

    def clear(self) -> None:
        """Empty the pipe, which must be readable.

        To be called before looking at what the wake was for. Then whatever comes during the look
        wakes again.
        """
        with self._lock:
            self._pending = False
            os.read(self._reader, 1)

    def close(self) -> None:
        """Close the pipe."""
        with self._lock:
            if self._writer is not None:
                os.close(self._writer)
            self._writer = None
        # The writer is closed first, or a concurrent `wake` gets EPIPE.
        os.close(self._reader)

    def disown(self) -> None:
        """In a forked copy of this process: close the copy's pipe."""
        # Another thread may have held the lock when the process was forked.
        self._lock = threading.RLock()
        self.close()
