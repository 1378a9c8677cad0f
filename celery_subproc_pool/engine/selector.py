"""The descriptors that the engine waits for, and a way to end the wait."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from typing import Any

from .wakeup import Wakeup

__all__ = ("Selector",)


class Selector:
    """Serves descriptors. It is one itself, so another event loop can wait for it."""

    def __init__(self) -> None:
        # epoll or kqueue: all supported systems have one.
        self._selector: Any = selectors.DefaultSelector()
        self._wakeup = Wakeup()
        self.watch(self._wakeup.fileno(), self._wakeup.clear)

    def fileno(self) -> int:
        """Return the descriptor that is readable when `serve` has something to do."""
        descriptor: int = self._selector.fileno()
        return descriptor

    def watch(self, descriptor: int, serve: Callable[[], None], writable: bool = False) -> None:
        """Have `serve` called when `descriptor` is readable, or `writable`.

        Raises:
            OSError: the system has no room for one more.
        """
        mask = selectors.EVENT_WRITE if writable else selectors.EVENT_READ
        self._selector.register(descriptor, mask, serve)

    def unwatch(self, descriptor: int | None) -> None:
        """Stop watching `descriptor`, if it is watched."""
        if descriptor is not None and descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    def serve(self, timeout: float) -> None:
        """Serve all descriptors that are ready. If there is none, wait up to `timeout` seconds for
        one, or for `wake`."""
        for key, _ in self._selector.select(timeout):
            key.data()

    def wake(self) -> None:
        """End the wait in `serve`, from any thread. Once closed, do nothing."""
        self._wakeup.wake()

    def close(self) -> None:
        """Give back the selector's own descriptors."""
        self._selector.close()
        self._wakeup.close()

    def disown(self) -> None:
        """In a forked copy of this process: close the copy's descriptors."""
        self._selector.close()
        self._wakeup.disown()
