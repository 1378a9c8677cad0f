"""When a Python child raises a soft limit: in the task's own code, and nowhere else.

Layer: above `compat`; imports Celery. The signal may hit while Celery loads a result backend or
stores a result: an exception there would leave a module half made, for all jobs to come, or take a
result from a task that has ended. Prefork has all that loaded before it forks.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded

from .. import PACKAGE
from .compat import is_at_body, is_trace

__all__ = ("SoftLimits",)

#: Seconds until it is looked again whether the task's own code runs.
PAUSE = 0.02


class SoftLimits:
    """Raises `SoftTimeLimitExceeded` out of a signal handler, now or when it may.

    Arguments:
        before: functions that run for each job before its tracer does: no code of the task's.

    Must be made in the main thread.
    """

    def __init__(self, *before: Callable[..., Any]) -> None:
        # In their place, agents may have put something that is no function.
        self._before = frozenset(getattr(function, "__code__", None) for function in before)
        self._main = threading.get_ident()
        #: Counts jobs, so that a limit is never another job's.
        self._job = 0
        #: Whose limit the next signal is about, if it is one of ours.
        self._again: int | None = None

    def begin(self) -> None:
        """The next job begins."""
        self._job += 1

    def reached(self, frame: FrameType | None) -> None:
        """The limit of this job was over when `frame` ran. Called by a signal handler.

        Raises:
            SoftTimeLimitExceeded: `frame` belongs to the task's own code.
        """
        job, self._again = self._again, None
        if job is not None and job != self._job:
            return
        if self._may_interrupt(frame):
            raise SoftTimeLimitExceeded()
        # Not a `threading.Thread`: it takes locks that the interrupted code may hold.
        _thread.start_new_thread(self._remind, (self._job,))

    def _remind(self, job: int) -> None:
        time.sleep(PAUSE)
        if job == self._job:
            self._again = job
            signal.pthread_kill(self._main, signal.SIGUSR1)

    def _may_interrupt(self, frame: FrameType | None) -> bool:
        innermost, tracer = frame, None
        while frame is not None:
            if is_trace(frame.f_code):
                # The outermost counts: a task may trace others.
                tracer = frame
            elif tracer is None and frame.f_code in self._before:
                return False
            frame = frame.f_back
        if tracer is not None:
            return is_at_body(tracer)
        # It is about to be traced, or a job that is none of a task's.
        return innermost is None or _root_of(innermost) != PACKAGE


def _root_of(frame: FrameType) -> str:
    """Return the top-level package of the code that runs in `frame`."""
    return str(frame.f_globals.get("__package__")).partition(".")[0]
