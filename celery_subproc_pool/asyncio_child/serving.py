"""An asyncio child after its boot: reads requests, runs jobs in one event loop, writes replies."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from celery import Celery
from celery.exceptions import NotRegistered
from celery.utils.log import get_logger

from ..python_child.codec import encode_end, escaped_end, task_arguments
from ..python_child.exits import leave
from ..serve import flush_prints, write_all
from ..wire.json_lines import encode
from ..wire.messages import CancelReason, Feature
from ..wire.python import AsyncioBoot, Boot, Order, Released, decode_order
from .databases import care_for_databases
from .lifespan import no_lifespan, open_lifespan
from .traces import CoroutineTrace
from .watchdog import Watchdog

__all__ = ("AsyncioChild",)

logger = get_logger(__name__)

#: Bytes that are read at a time.
READ_BYTES = 1 << 16


class AsyncioChild:
    """Runs many jobs at a time.

    Arguments:
        app: the project's app.
        boot: the boot line.
        requests: the stream of requests.
        replies: the descriptor for replies.

    Raises:
        ImportError: uvloop is asked for, and not installed.
    """

    #: What it announces in the handshake.
    features = (Feature.MULTIPLEX.value, Feature.CANCEL.value)

    def __init__(self, app: Celery, boot: Boot, requests: BinaryIO, replies: int) -> None:
        self._app = app
        self._boot = boot
        self._aio = boot.aio or AsyncioBoot()
        self._requests = requests
        self._replies = replies
        self._pid = os.getpid()
        # `app.tasks` takes a lock: not for each job.
        self._tasks = app.tasks
        self._loop = _new_loop(self._aio.uvloop)
        #: By the ids of their jobs.
        self._running: dict[str, CoroutineTrace] = {}
        #: Greenlets for the next traces.
        self._idle: list[Any] = []
        #: The end of the last line that was read, if it has no newline yet.
        self._begun = b""
        self._status = 0
        #: Is set when no more jobs will come.
        self._ends = asyncio.Event()
        #: Is set when no job runs, once no more will come.
        self._empty = asyncio.Event()
        self._started = False
        self._watchdog = Watchdog(self._loop, self._aio.slow_callback, self._running)

    def start(self) -> None:
        """Enter the lifespan.

        Raises:
            Exception: whatever the lifespan raises.
        """
        asyncio.set_event_loop(self._loop)
        CoroutineTrace.after_failure = care_for_databases(self._app)
        self._main = self._loop.create_task(self._live())
        self._main.add_done_callback(lambda _: self._loop.stop())
        self._loop.run_forever()
        if self._main.done():
            # It has raised.
            self._main.result()
        signal.signal(signal.SIGTERM, self._on_terminate)
        # If a call hangs, an operator may ask by this which one.
        faulthandler.register(signal.SIGUSR1, file=2)

    def serve(self) -> NoReturn:
        """Run jobs until stdin ends or SIGTERM comes."""
        status = 1
        try:
            self._loop.add_reader(self._requests.fileno(), self._on_readable)
            self._watchdog.start()
            self._loop.run_forever()
            self._main.result()
            status = self._status
        except BrokenPipeError:
            # The worker is gone: nobody reads replies.
            status = 0
        except BaseException:
            logger.critical("The asyncio child fails, which is a bug", exc_info=True)
        finally:
            leave(self._boot.hostname, self._pid, self._boot.exit_grace, status)

    # -- life

    async def _live(self) -> None:
        """Enter the lifespan, run jobs, leave the lifespan. All of it in one asyncio task: what is
        entered there may have to be left in the same one."""
        name = self._aio.lifespan
        async with open_lifespan(name, self._app) if name else no_lifespan():
            self._loop.stop()
            await self._ends.wait()
            await self._end_jobs()
        await self._end_what_is_left()

    async def _end_jobs(self) -> None:
        for trace in list(self._running.values()):
            trace.cancel()
        if self._running:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._empty.wait(), self._boot.exit_grace)

    async def _end_what_is_left(self) -> None:
        """Cancel what jobs have started and left."""
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=self._boot.exit_grace)

    def _on_terminate(self, signum: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._ends.set)

    # -- jobs

    def _on_readable(self) -> None:
        data = self._requests.read1(READ_BYTES)  # type: ignore[attr-defined]
        if not data:
            self._loop.remove_reader(self._requests.fileno())
            self._ends.set()
            return
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            self._take(decode_order(line))

    def _take(self, order: Order) -> None:
        if order.payload is not None:
            self._begin(order)
            return
        trace = self._running.get(order.id)
        if trace is None:
            # It has ended meanwhile.
            return
        if order.cancel is CancelReason.SOFT_TIME_LIMIT:
            trace.soft_limit()
        else:
            trace.cancel()

    def _begin(self, order: Order) -> None:
        assert order.payload is not None
        try:
            self._require(order.payload.task)
            trace = CoroutineTrace(task_arguments(order), self._loop, self._look_at)
        except Exception:
            self._reply(encode_end(self._app, order.id, escaped_end()))
            return
        self._running[order.id] = trace
        trace.start(self._idle)

    def _require(self, name: str) -> None:
        if name not in self._tasks:
            raise NotRegistered(
                f"{name}: the worker knows this task and its asyncio children do not. Define it in"
                " a module that loading the app imports"
            )

    def _look_at(self, trace: CoroutineTrace) -> None:
        """Reply if `trace` has ended."""
        if not trace.over:
            return
        del self._running[trace.task_id]
        if not trace.cancelled:
            assert trace.end is not None
            self._reply(encode_end(self._app, trace.task_id, trace.end))
        elif not self._ends.is_set():
            self._reply(encode(Released(id=trace.task_id)))
        # Otherwise this process ends, and the worker finds its jobs lost.
        if not self._running:
            self._empty.set()

    def _reply(self, line: bytes) -> None:
        if os.getpid() != self._pid:
            # A task forked, and this is the copy: requests and replies are not its own.
            os._exit(0)
        flush_prints()
        write_all(self._replies, line)


def _new_loop(uvloop: bool) -> asyncio.AbstractEventLoop:
    if not uvloop:
        return asyncio.new_event_loop()
    import uvloop as implementation

    loop: asyncio.AbstractEventLoop = implementation.new_event_loop()
    return loop
