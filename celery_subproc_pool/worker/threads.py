"""The threads in which the worker traces the jobs of external children.

Layer: above `outcome`'s errors; standard library only but for ours. Must not import Celery.
A thread serves one job at a time, so that there are at most as many as jobs in flight. They are
daemons: a result backend that hangs must not keep a worker from ending.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ("TracingThreads",)


class TracingThreads:
    """Threads that are started when needed and then kept.

    Arguments:
        name: of the threads, for stack dumps.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: SimpleQueue[Callable[[], Callable[[], None] | None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._unfinished = 0

    def run(self, work: Callable[[], Callable[[], None] | None]) -> None:
        """Call `work`, which must not raise, in a thread of its own as long as it lasts.

        Raises:
            RuntimeError: the system gives no thread, and there is no other.

        Arguments:
            work: what to call. What it returns is called when its thread counts as free again:
                to tell somebody who may call `run` for the next job at once.
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
                    # One of the others takes it when it is free.
                    return
                self._unfinished -= 1
            self._work.get_nowait()
            raise

    def close(self) -> None:
        """Let the threads end, each as soon as it is idle."""
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
            # While it waits, a thread keeps nothing alive.
            del work, tell
