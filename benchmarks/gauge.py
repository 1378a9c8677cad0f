"""Measures inside a worker how long a number of tasks takes, in wall-clock and CPU time.

A thread looks at Celery's own count every few milliseconds. That works on every pool, at the same
low cost. It answers on a Unix socket.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import msgspec
from celery.worker import state

__all__ = ("Gauge", "Reading", "Watch")

#: Seconds between looks. Times are exact to this.
INTERVAL = 0.004


class Reading(msgspec.Struct, frozen=True):
    """What a worker took for some tasks."""

    #: From the first task that was accepted to the end of the last one.
    seconds: float
    #: CPU seconds of the worker process, all its threads.
    cpu: float


class Gauge:
    """Serves one client at a time.

    Arguments:
        path: the path of the socket.
    """

    def __init__(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(path)
        self._server.listen()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._serve, name="gauge", daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection, connection.makefile("rw") as stream:
                end = int(stream.readline() or 0)
                if not end:
                    # The client only asked whether the worker is up.
                    continue
                begin = _accepted()
                cpu = time.process_time()
                stream.write("armed\n")
                stream.flush()
                seconds = _time_until(begin, end)
                answer = {"seconds": seconds, "cpu": time.process_time() - cpu}
                stream.write(json.dumps(answer) + "\n")
                stream.flush()


def _accepted() -> int:
    count: int = state.all_total_count[0]
    return count


def _time_until(begin: int, end: int) -> float:
    while _accepted() == begin:
        time.sleep(INTERVAL)
    since = time.perf_counter()
    while _accepted() < end or state.active_requests:
        time.sleep(INTERVAL)
    return time.perf_counter() - since


class Watch:
    """The client of a gauge: arms it when made, and reads it later.

    Arguments:
        path: the path of the gauge's socket.
        end: the number of tasks since the worker's start at which the measurement ends.
        timeout: seconds to wait for that.
    """

    def __init__(self, path: str, end: int, timeout: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._socket.connect(path)
        self._stream = self._socket.makefile("rw")
        self._stream.write(f"{end}\n")
        self._stream.flush()
        assert self._stream.readline() == "armed\n"

    def read(self) -> Reading:
        """Wait for the last task."""
        with self._socket, self._stream:
            return msgspec.json.decode(self._stream.readline(), type=Reading)
