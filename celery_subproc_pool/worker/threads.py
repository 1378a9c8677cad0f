"""The threads in which the worker traces the jobs of external children.

A thread serves one job at a time, so there are at most as many threads as jobs in flight. They are
daemons: a result backend that hangs must not keep the worker from exiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ("TracingThreads",)


class TracingThreads:
    """Threads that are started on demand and then kept.

    Arguments:
        name: the start of their names, for stack dumps.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: SimpleQueue[Callable[[], Callable[[], None] | None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._unfinished = 0

    def run(self, work: Callable[[], Callable[[], None] | None]) -> None:
        """Call `work` in a thread that does nothing else meanwhile.

        Arguments:
            work: the function to call. It must not raise. The function that it returns is called
                when the thread counts as free again: it may cause the next call of `run`.

        Raises:
            RuntimeError: the system gives no thread, and there is no other.
        """
        with self._lock:
            self._unfinished += 1
            needed = self._unfinished > self._threads
            if needed:
                self._threads += 1
                number = self._threads
        self._work.put(work)
        if needed:
            self._start(number)

    def _start(self, number: int) -> None:
        thread = threading.Thread(target=self._serve, name=f"{self._name}-{number}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._threads -= 1
                if self._threads:
                    # Another thread takes the work when it is free.
                    return
                self._unfinished -= 1
            self._work.get_nowait()
            raise

    def close(self) -> None:
        """End the threads, each when it is idle."""
        with self._lock:
            for _ in range(self._threads):
                self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            tell = work()
            with self._lock:
                self._unfinished -= 1
            if tell is not None:
                tell()
            # A thread that waits must not keep a job alive.
            del work, tell
