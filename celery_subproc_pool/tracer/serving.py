"""A tracer after its boot: reads what happens to jobs, and lets their traces go on."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from celery import Celery, Task
from celery.app import trace as celerys_trace
from celery.exceptions import TaskRevokedError
from celery.states import REVOKED
from celery.utils.log import get_logger
from greenlet import getcurrent

from ..python_child.codec import End, encode_end, task_arguments
from ..python_child.exits import leave
from ..serve import flush_prints, write_all
from ..wire.json_lines import encode
from ..wire.messages import Feature
from ..wire.python import SILENT, Boot, Notice, Released, decode_notice
from .compat import ignores_result, is_observed, may_be_observed, own_headers
from .tasks import let_child_run, register
from .traces import ExternalTrace

__all__ = ("Tracer",)

logger = get_logger(__name__)

#: Bytes that are read at a time.
READ_BYTES = 1 << 16


class Tracer:
    """Traces many jobs at a time.

    Arguments:
        app: the project's app.
        boot: the boot line.
        requests: the stream of notices.
        replies: the descriptor for replies.
    """

    def __init__(self, app: Celery, boot: Boot, requests: BinaryIO, replies: int) -> None:
        self._app = app
        self._boot = boot
        self._requests = requests
        self._replies = replies
        self._pid = os.getpid()
        self._loop = getcurrent()
        #: By the ids of their jobs: those that wait for news from their child.
        self._waiting: dict[str, ExternalTrace] = {}
        #: Greenlets for the next traces.
        self._idle: list[Any] = []
        # `app.tasks` takes a lock: not for each job.
        self._tasks = app.tasks
        #: By name: tasks whose body is the exchange with a child.
        self._bound: dict[str, Task] = {}
        self._ends = False
        signal.signal(signal.SIGTERM, self._on_terminate)
        # If a call hangs, the worker asks by this which one.
        faulthandler.register(signal.SIGUSR1, file=2)

    @property
    def features(self) -> tuple[str, ...]:
        """What it announces in the handshake."""
        tasks = (self._app.tasks[name] for name in self._boot.tasks if name in self._app.tasks)
        observed = is_observed() or any(may_be_observed(self._app, task) for task in tasks)
        multiplex = Feature.MULTIPLEX.value
        return (multiplex,) if observed else (multiplex, SILENT)

    def serve(self) -> NoReturn:
        """Trace jobs until stdin ends or SIGTERM comes."""
        status = 1
        try:
            for batch in _batches(self._requests):
                self._take(batch)
                if self._ends:
                    break
            status = 0
        except (BrokenPipeError, SystemExit):
            # The worker is gone: nobody reads replies. Or SIGTERM has come.
            status = 0
        except BaseException:
            logger.critical("The tracer fails, which is a bug", exc_info=True)
        finally:
            leave(self._boot.hostname, self._pid, self._boot.exit_grace, status)

    def _on_terminate(self, signum: int, frame: FrameType | None) -> None:
        """End at once between two traces; otherwise when the running one gives up the processor."""
        self._ends = True
        if getcurrent() is self._loop:
            raise SystemExit

    def _take(self, batch: list[bytes]) -> None:
        notices = [decode_notice(line) for line in batch]
        last = {notice.id: notice for notice in notices}
        for notice in notices:
            # Progress that is not the latest any more would be stored in vain.
            if notice.progress is None or last[notice.id] is notice:
                self._hear(notice)

    def _hear(self, notice: Notice) -> None:
        if notice.payload is not None:
            self._begin(notice)
            return
        if notice.probe is not None:
            _probe(self._app, notice.probe, notice.id)
            self._send(encode(Released(id=notice.id)))
            return
        trace = self._waiting.get(notice.id)
        if trace is None:
            # It has ended meanwhile.
            return
        if notice.abandon is not None:
            trace.abandon()
            self._release(trace, notice.abandon)
        else:
            trace.go_on(notice)
            self._look_at(trace)

    def _begin(self, notice: Notice) -> None:
        arguments = task_arguments(notice)
        headers = arguments[2]
        # Celery would find them anew for each job, and that costs as much as half of a trace.
        headers["headers"] = own_headers(headers)
        if notice.exchange is not None:
            self._bind(arguments[0])
        trace = ExternalTrace(arguments, notice.exchange, self._send)
        self._waiting[notice.id] = trace
        trace.begin(self._idle)
        self._look_at(trace)

    def _look_at(self, trace: ExternalTrace) -> None:
        """Reply if `trace` has ended."""
        if trace.over:
            del self._waiting[trace.task_id]
            assert trace.end is not None
            self._end(trace.task_id, trace.end)

    def _end(self, task_id: str, end: End) -> None:
        self._end_copy()
        flush_prints()
        self._send(encode_end(self._app, task_id, end))

    def _release(self, trace: ExternalTrace, revoked: bool) -> None:
        """Tell that the job of `trace`, which was abandoned, stores no more states."""
        del self._waiting[trace.task_id]
        # Code of the task may have caught the abandonment, and Celery has stored an end then.
        stored = trace.stored or (trace.asked if trace.end is not None else None)
        if revoked and stored is not None:
            _store_revoked(*stored)
        flush_prints()
        self._send(encode(Released(id=trace.task_id)))

    def _end_copy(self) -> None:
        """Exit if a hook forked, and this is the copy: its requests and replies are not its own."""
        if os.getpid() != self._pid:
            os._exit(0)

    def _send(self, line: bytes) -> None:
        """Send `line` to the worker at once: the hook of the next job may hang."""
        self._end_copy()
        write_all(self._replies, line)

    def _bind(self, name: str) -> None:
        """Let a child run the task `name`."""
        if name not in self._tasks:
            register(self._app, name)
        task = self._tasks[name]
        if self._bound.get(name) is not task:
            let_child_run(task)
            # Celery's tracer keeps the body that the task had when it was made.
            hostname, loader = self._boot.hostname, self._app.loader
            task.__trace__ = celerys_trace.build_tracer(name, task, loader, hostname, app=self._app)
            self._bound[name] = task


def _batches(requests: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the lines that can be read at a time."""
    begun = b""
    while data := requests.read1(READ_BYTES):  # type: ignore[attr-defined]
        *lines, begun = (begun + data).split(b"\n")
        if lines:
            yield lines


def _probe(app: Celery, name: str, task_id: str) -> None:
    """Return when the result backend of the task `name` has answered, or has failed."""
    backend = app.tasks[name].backend if name in app.tasks else app.backend
    try:
        backend.get_state(task_id)
    except Exception as exc:
        logger.warning("The result backend does not answer (for %s[%s]): %r", name, task_id, exc)


def _store_revoked(task: Task, request: Any) -> None:
    """Store REVOKED once more, over a state that was stored after Celery had stored it."""
    if ignores_result(task, vars(request)) and not task.store_errors_even_if_ignored:
        return
    try:
        error = TaskRevokedError("terminated")
        task.backend.store_result(request.id, error, REVOKED, request=request)
    except Exception as exc:
        logger.warning("That %s[%s] is revoked can't be stored: %r", task.name, request.id, exc)
