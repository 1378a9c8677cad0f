"""Tells, from inside of a worker, when it has done so many tasks, and what CPU time it took.

A thread that looks every few milliseconds at Celery's own count: the same, and as cheap, on every
pool. It answers on a Unix socket.
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

#: Seconds between looks: what a time may be off.
INTERVAL = 0.004


class Reading(msgspec.Struct, frozen=True):
    """What a worker took for some tasks."""

    #: From the first task that was accepted to the end of the last one.
    seconds: float
    #: CPU seconds of the worker process, all its threads.
    cpu: float


class Gauge:
    """Serves one who measures at a time.

    Arguments:
        path: of the socket.
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
                    # Somebody only wanted to know whether the worker is up.
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
    """Measure from the outside: arm the gauge now, and read it after.

    Arguments:
        path: of its socket.
        end: how many tasks the worker will have had, since it started, when it has done these.
        timeout: seconds to wait for them.
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
