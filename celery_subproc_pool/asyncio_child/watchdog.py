"""Tells the log which code holds up the event loop, and for how long.

A thread asks the loop for a sign of life, from time to time. If none comes, it looks at what the
loop's thread runs. asyncio's own debug mode would cost each step of each coroutine too much.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from types import FrameType
from typing import Any

from celery.utils.log import get_logger

from ..python_child.frames import is_ours
from .traces import CURRENT, CoroutineTrace

__all__ = ("Watchdog",)

logger = get_logger(__name__)

#: Frames of the stack that are logged, the innermost ones.
MOST_FRAMES = 20


class Watchdog:
    """Watches an event loop. Make it in the loop's thread.

    Arguments:
        loop: the event loop.
        patience: seconds that the loop may be held up until the log says so.
        running: the jobs that run.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        patience: float,
        running: Mapping[str, CoroutineTrace],
    ) -> None:
        self._loop = loop
        self._patience = patience
        self._running = running
        self._ident = threading.get_ident()
        self._alive = threading.Event()
        #: When the loop has given its last sign of life.
        self._alive_at = 0.0

    def start(self) -> None:
        """Watch from now on."""
        threading.Thread(target=self._watch, name="celery-subproc-watchdog", daemon=True).start()

    def _watch(self) -> None:
        while True:
            asked_at = time.monotonic()
            self._alive.clear()
            try:
                self._loop.call_soon_threadsafe(self._be_alive)
            except RuntimeError:
                # The loop is closed.
                return
            patience = self._patience
            while not self._alive.wait(patience):
                self._warn(time.monotonic() - asked_at)
                # Not each second the same.
                patience = time.monotonic() - asked_at
            held_up = self._alive_at - asked_at
            if held_up > self._patience:
                logger.warning("The event loop goes on. It was held up for %.1f s", held_up)
            # What holds it up for long is found in time, and an idle loop wakes up seldom.
            time.sleep(self._patience)

    def _be_alive(self) -> None:
        self._alive_at = time.monotonic()
        self._alive.set()

    def _warn(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._ident)
        stack = "" if frame is None else _stack_of(frame)
        logger.warning(
            "%s holds up the event loop for %.1f s: the other jobs of this asyncio child, %d by"
            " now, wait. Await what takes long, or move it to a thread (asyncio.to_thread). It is"
            " at:\n%s",
            self._name(),
            seconds,
            max(0, len(self._running) - 1),
            stack,
        )

    def _name(self) -> str:
        """Return what is known of the code that runs: the job, or the asyncio task."""
        trace = CoroutineTrace.at_work
        if trace is not None:
            return f"Synchronous code around {trace.title} (a hook, a signal, the result backend)"
        task = asyncio.current_task(self._loop)
        if task is None:
            return "A callback"
        # Python 3.12 and later tell the context of another thread's task.
        context: Any = getattr(task, "get_context", dict)()
        trace = context.get(CURRENT)
        if trace is not None:
            return str(trace.title)
        # The asyncio task of a job has the job's title. What the job has started has another name.
        name = task.get_name()
        titles = {trace.title for trace in self._running.values()}
        return name if name in titles else f"The asyncio task {name}"


def _stack_of(frame: FrameType) -> str:
    """Return the stack of `frame` as text, without the event loop below."""
    frames = traceback.extract_stack(frame)
    found: FrameType | None = frame
    count = 0
    while found is not None and not is_ours(found):
        count += 1
        found = found.f_back
    return "".join(
        traceback.format_list(frames[-min(count or len(frames), MOST_FRAMES) :])
    ).rstrip()
