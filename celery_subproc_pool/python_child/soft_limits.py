"""Raises a soft limit in the task's own code, and nowhere else.

The signal may come while Celery loads a result backend or stores a result. An exception there would
leave a module half imported for all later jobs, or lose the result of a task that has ended.
Prefork has loaded all that before it forks.
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

from .compat import is_at_body, is_trace
from .frames import is_ours

__all__ = ("SoftLimits",)

#: Seconds until the next look at whether the task's own code runs.
PAUSE = 0.02


class SoftLimits:
    """Raises `SoftTimeLimitExceeded` in a signal handler, at once or as soon as that is allowed.

    Must be made in the main thread.

    Arguments:
        before: functions that run for each job before its tracer. They are not the task's code.
    """

    def __init__(self, *before: Callable[..., Any]) -> None:
        # Agents may have replaced one by an object that is no function.
        self._before = frozenset(getattr(function, "__code__", None) for function in before)
        self._main = threading.get_ident()
        #: The number of the current job, so that a limit never hits another job.
        self._job = 0
        #: The number of the job whose limit was deferred, if we have sent the next signal.
        self._again: int | None = None

    def begin(self) -> None:
        """Note that the next job begins."""
        self._job += 1

    def reached(self, frame: FrameType | None) -> None:
        """Raise the limit of the current job, or try again later. Called by a signal handler.

        Arguments:
            frame: what the signal has interrupted.

        Raises:
            SoftTimeLimitExceeded: the task's own code was interrupted.
        """
        job, self._again = self._again, None
        if job is not None and job != self._job:
            return
        if self._may_interrupt(frame):
            raise SoftTimeLimitExceeded()
        # Not a `threading.Thread`: that takes locks, and the interrupted code may hold them.
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
                # The outermost tracer counts: a task may trace other tasks.
                tracer = frame
            elif tracer is None and frame.f_code in self._before:
                return False
            frame = frame.f_back
        if tracer is not None:
            return is_at_body(tracer)
        # No tracer yet, or the job is a call of a callable that is not a task.
        return innermost is None or not is_ours(innermost)
