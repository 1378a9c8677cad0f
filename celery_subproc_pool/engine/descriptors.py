"""Serves the descriptors of running children: stdin, stdout, stderr, and the exit.

It turns what children write into events for the scheduler, and writes their requests. A child that
fails to be served is given up: its descriptor stays ready, and the loop would spin on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from ..core.scheduler import Scheduler
from ..errors import ProtocolFault
from ..wire.messages import Fatal, Log, Message, Progress, Ready, Reply
from ..wire.python import Ask
from ..wire.text import quote
from .loop import Loop
from .running import RunningChild

__all__ = ("Descriptors",)

logger = logging.getLogger("celery_subproc_pool")

#: Seconds between looks at children whose exit no descriptor tells.
POLL_INTERVAL = 0.1

#: Seconds to wait for the exit of a child that has closed its stdout. Most exit within this time.
EXIT_PATIENCE = 0.01


class Descriptors:
    """Serves the descriptors of all children. It is a `loop.Chore`, because some systems have no
    descriptor that tells of an exit.

    Arguments:
        loop: watches the descriptors.
        scheduler: is told what happens.
    """

    def __init__(self, loop: Loop, scheduler: Scheduler) -> None:
        self._loop = loop
        self._scheduler = scheduler
        #: Children whose exit no descriptor tells.
        self._polled: set[RunningChild] = set()

    # -- watching

    def watch(self, running: RunningChild) -> None:
        """Serve what `running` writes, and its exit.

        Raises:
            OSError: the system has no room for one more descriptor. Some may be watched.
        """
        process = running.process
        for descriptor, serve in (
            (process.stdout, self._on_stdout),
            (process.stderr, self._on_stderr),
            (process.pidfd, self._on_exit),
        ):
            if descriptor is not None:
                self._loop.selector.watch(descriptor, partial(self._serve, serve, running))
        if process.pidfd is None:
            self._poll(running)

    def _poll(self, running: RunningChild) -> None:
        self._polled.add(running)
        self._loop.chores.add(self)

    def unwatch(self, running: RunningChild) -> None:
        """Serve `running` no more."""
        self.stop_writing(running)
        self._polled.discard(running)
        process = running.process
        for descriptor in (process.stdout, process.stderr, process.pidfd):
            self._loop.selector.unwatch(descriptor)

    @property
    def deadline(self) -> float | None:
        """When to look for exits that no descriptor tells; None if all are told."""
        return self._loop.clock() + POLL_INTERVAL if self._polled else None

    def look(self, now: float) -> None:
        """Look for exits that no descriptor tells."""
        for running in tuple(self._polled):
            self._serve(self._on_exit, running)

    def _serve(self, serve: Callable[[RunningChild], None], running: RunningChild) -> None:
        if running.gone:
            return
        try:
            serve(running)
        except Exception as exc:
            logger.exception("Serving the child with pid %s failed", running.process.pid)
            self.unwatch(running)
            # Its exit is still looked for.
            self._poll(running)
            reason = f"serving it failed: {exc!r}"
            self._loop.tell(self._scheduler.faulted, running.child, reason)

    # -- what a child reads

    def write(self, running: RunningChild, line: bytes) -> bool:
        """Write `line` to the child's stdin. What the pipe does not take is written later.

        Returns:
            False if the child's stdin is closed and no byte of `line` was written.
        """
        process = running.process
        if not process.write(line):
            return False
        if process.unwritten and not running.writing:
            self._write_when_there_is_room(running)
        return True

    def _write_when_there_is_room(self, running: RunningChild) -> None:
        assert running.process.stdin is not None
        running.writing = True
        serve = partial(self._serve, self._on_stdin, running)
        self._loop.selector.watch(running.process.stdin, serve, writable=True)

    def put_off(self, running: RunningChild, line: bytes) -> None:
        """Write `line` to the child's stdin at the end of this turn, together with others."""
        process = running.process
        if not process.unwritten:
            self._loop.at_rest(partial(self._serve, self._write_rest, running))
        process.put_off(line)

    def _write_rest(self, running: RunningChild) -> None:
        if not running.writing:
            self._on_stdin(running)
        if running.process.unwritten and not running.writing:
            self._write_when_there_is_room(running)

    def stop_writing(self, running: RunningChild) -> None:
        """Do not go on writing what the pipe has not taken."""
        if running.writing:
            self._loop.selector.unwatch(running.process.stdin)
        running.writing = False

    def give_up_writing(self, running: RunningChild) -> None:
        """Tell the scheduler that the child has closed its stdin. Take in its output first: that
        may be its answer."""
        self._read_rest(running)
        read = running.process.read_bytes()
        reason = "it closed its stdin"
        self._loop.tell(self._scheduler.unwritten, running.child, reason, read)

    def _on_stdin(self, running: RunningChild) -> None:
        if not running.process.write_more():
            self.give_up_writing(running)
        if not running.process.unwritten:
            self.stop_writing(running)

    # -- what a child writes

    def hear_first(self, running: RunningChild) -> bool:
        """Take in the output that was buffered before a request is sent: it can't be the answer to
        that request. Return whether the child can have the request."""
        process, child = running.process, running.child
        early: bytes | None = None
        if not process.is_silent():
            early = b"" if process.stdout is None else process.read(process.stdout)
            if early == b"":
                self._loop.tell(self._scheduler.stdout_closed, child)
                return False
        if not early and not running.has_open_line:
            # The usual case.
            return True
        if child.may_speak:
            if early:
                self._feed(running, early)
            return True
        early = running.take_open_line() + (early or b"")
        reason = f"it wrote {quote(early)} while it had no request to answer"
        self._loop.tell(self._scheduler.faulted, child, reason)
        return False

    def hear_now(self, running: RunningChild) -> None:
        """Take in what the child has written to its stdout so far."""
        self._serve(self._on_stdout, running)

    def _on_stdout(self, running: RunningChild) -> None:
        process = running.process
        if process.stdout is None:
            return
        data = process.read(process.stdout)
        if data:
            self._feed(running, data)
        elif data == b"":
            self._loop.selector.unwatch(process.stdout)
            process.stdout = None
            # Usually the child is exiting right now. Its exit status says more than the silence.
            process.ends_within(EXIT_PATIENCE)
            self._on_exit(running)
            if not running.gone:
                self._loop.tell(self._scheduler.stdout_closed, running.child)

    def _read_rest(self, running: RunningChild) -> None:
        process = running.process
        if process.stdout is not None:
            for data in process.read_rest(process.stdout):
                self._feed(running, data)

    def _feed(self, running: RunningChild, data: bytes) -> None:
        try:
            for message in running.messages(data):
                self._hear(running, message)
        except ProtocolFault as exc:
            self._loop.tell(self._scheduler.faulted, running.child, str(exc))

    def _hear(self, running: RunningChild, message: Message | Ask | Ready | Fatal) -> None:
        tell, scheduler, child = self._loop.tell, self._scheduler, running.child
        if isinstance(message, Reply):
            tell(scheduler.replied, child, message)
        elif isinstance(message, Ask):
            tell(scheduler.asked, child, message)
        elif isinstance(message, Progress):
            tell(scheduler.progressed, child, message)
        elif isinstance(message, Log):
            tell(scheduler.logged, child, message)
        elif isinstance(message, Fatal):
            tell(scheduler.boot_failed, child, message.message)
        elif isinstance(message, Ready):
            running.greeted(message)
            tell(scheduler.ready, child, message, running.pid)

    def _on_stderr(self, running: RunningChild) -> None:
        process = running.process
        if not running.read_stderr() and process.stderr is not None:
            self._loop.selector.unwatch(process.stderr)
            process.stderr = None

    # -- its exit

    def _on_exit(self, running: RunningChild) -> None:
        """If the child has exited, take in the rest of its output, and tell the scheduler."""
        process = running.process
        status = process.ended()
        if running.gone or status is None:
            return
        self._read_rest(running)
        running.end_stderr()
        read = process.written if process.has_reader() else process.read_bytes()
        running.gone = True
        self.unwatch(running)
        self._loop.tell(self._scheduler.exited, running.child, status, read)
