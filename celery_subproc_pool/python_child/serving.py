"""A Python child after its boot: reads a request, runs the job, writes the reply."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType
from typing import BinaryIO, NoReturn

from celery import Celery
from celery.app.trace import fast_trace_task
from celery.exceptions import NotRegistered

from ..serve import flush_prints, write_all
from ..wire.python import Boot, TaskRequest, decode_request
from .calls import call
from .codec import End, encode_end, escaped_end, task_arguments
from .exits import leave
from .soft_limits import SoftLimits

__all__ = ("Child",)


class Child:
    """Runs one job after another.

    Arguments:
        app: the project's app.
        boot: the boot line.
        requests: the stream of requests.
        replies: the descriptor for replies.
    """

    #: What it announces in the handshake: nothing.
    features = ()

    def __init__(self, app: Celery, boot: Boot, requests: BinaryIO, replies: int) -> None:
        self._app = app
        self._boot = boot
        self._requests = requests
        self._replies = replies
        self._limits = SoftLimits(fast_trace_task, task_arguments, self._require)
        self._working = False
        self._pid = os.getpid()
        signal.signal(signal.SIGUSR1, self._on_soft_limit)

    def serve(self) -> NoReturn:
        """Run jobs until stdin ends or a job ends the process."""
        status = 0
        try:
            self._serve()
        except BrokenPipeError:
            # The worker is gone. Nobody reads replies.
            pass
        except SystemExit as exc:
            status = _exit_status(exc)
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            leave(self._boot.hostname, self._pid, self._boot.exit_grace, status)

    def _serve(self) -> None:
        for line in self._requests:
            request = decode_request(line)
            self._limits.begin()
            end = self._run(request)
            if os.getpid() != self._pid:
                # A task forked, and the copy of this process returned to here.
                os._exit(0)
            flush_prints()
            write_all(self._replies, encode_end(self._app, request.id, end))

    def _run(self, request: TaskRequest) -> End:
        end: End | None = None
        try:
            self._working = True
            try:
                if request.payload.call is None:
                    self._require(request.payload.task)
                    end = End(False, fast_trace_task(*task_arguments(request)))
                else:
                    end = End(False, call(request), returned=True)
            finally:
                self._working = False
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:
            # A soft limit that comes after the trace has ended changes nothing.
            return end or escaped_end()
        return end

    def _require(self, name: str) -> None:
        if name not in self._app.tasks:
            raise NotRegistered(
                f"{name}: the worker knows this task and its Python children do not. Define it in a"
                " module that loading the app imports"
            )

    def _on_soft_limit(self, signum: int, frame: FrameType | None) -> None:
        # Between two jobs, the signal was meant for the job that has just ended.
        if self._working:
            self._limits.reached(frame)


def _exit_status(exc: SystemExit) -> int:
    """Return the exit status that Python would give."""
    if exc.code is None:
        return 0
    if isinstance(exc.code, int):
        return exc.code & 0xFF
    print(exc.code, file=sys.stderr)
    return 1
