"""A running child: its process, what it has written, and what the log says about it.

It reads when `descriptors` says that there is something to read, and decides nothing.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import suppress

from ..core.model import Child, ChildState, Job
from ..core.outcomes import ChildFacts
from ..errors import ProtocolFault
from ..wire.lines import LineBuffer, StderrLines
from ..wire.messages import Fatal, Log, Message, Ready, around_greeting, decode_greeting
from ..wire.python import Ask
from ..wire.text import printable
from .process import ChildProcess

__all__ = ("RunningChild",)


#: Log levels by the names that programs of many languages use for them.
_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "notice": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "fatal": logging.CRITICAL,
}


class RunningChild:
    """A child's process and its streams.

    Two fields of `child` are written here, and only here. They are what the scheduler says of a
    child that it gives up, so it looks at them then: an event for each piece of output would cost
    every job something.

    - `open_line`, set once, quotes the line that the child has begun and not ended;
    - `bad_greeting` says what is wrong with output that looks like a greeting.

    Arguments:
        child: the scheduler's view of it.
        process: its process.
    """

    __slots__ = (
        "_greets",
        "_lines",
        "_logger",
        "_named",
        "_ready",
        "_stderr",
        "child",
        "gone",
        "pid",
        "process",
        "programs",
        "writing",
    )

    def __init__(self, child: Child, process: ChildProcess) -> None:
        self.child = child
        self.process = process
        #: The pid to signal: under a wrapper, not the process that was started. None outside of
        #: our pid namespace.
        self.pid: int | None = process.pid
        #: Whether the rest of a request waits for room in its stdin.
        self.writing = False
        #: Whether its exit has been seen.
        self.gone = False
        #: What else ran in its process group when it was killed, as text; None if it was not.
        self.programs: tuple[str, ...] | None = None
        #: Whether it has sent its greeting, and whether that named its pid.
        self._ready = False
        self._named = False
        self._greets = child.group.settings.handshake
        self._lines = LineBuffer(child.group.settings.max_message_bytes)
        child.open_line = self._lines.quote_open
        self._stderr = StderrLines()
        self._logger = logging.getLogger(f"celery_subproc_pool.child.{child.group.name}")

    def messages(self, data: bytes) -> Iterator[Message | Ask | Ready | Fatal]:
        """Yield the messages that `data` from its stdout completes. While it boots, log what is
        no greeting.

        Raises:
            ProtocolFault: a line is no message, or too long.
        """
        decode = self.child.group.decode
        for line in self._lines.feed(data):
            if self._greets and self.child.state is ChildState.STARTING:
                greeting = decode_greeting(line)
                if greeting is None:
                    self._log([printable(line.decode(errors="replace"))])
                    self.child.bad_greeting = around_greeting(line) or self.child.bad_greeting
                else:
                    yield greeting
            else:
                yield decode(line)
        if self._lines.overlong is not None:
            raise ProtocolFault(
                f"a line longer than max_message_bytes ({self._lines.max_bytes}), which begins"
                f" {self._lines.overlong!r}"
            )

    def greeted(self, greeting: Ready) -> None:
        """Note that it has booted, and the pid that it has named: a signal goes there."""
        self._ready = True
        if greeting.pid is not None:
            self.pid = self.process.member(greeting.pid)
            self._named = self.pid is not None

    @property
    def has_open_line(self) -> bool:
        """Whether it has begun a line and not ended it."""
        return self._lines.has_open

    def kill(self, signum: int) -> bool:
        """Have it end by `signum`.

        SIGKILL goes to the process that was started and to the one that the child has named. The
        rest of its process group gets SIGTERM, see `remains`. Any other signal goes to the named
        process, which ends what it has started itself. If it has named none, the group gets it.

        Returns:
            False if the worker may not signal it.
        """
        named = self.pid if self._named else None
        if signum == signal.SIGKILL:
            for pid in {self.process.pid, named or self.process.pid}:
                self.process.signal(pid, signum)
            return self.process.kill(signal.SIGTERM)
        sent = named is not None and self.process.signal(named, signum)
        return sent or self.process.kill(signum)

    def signal(self, signum: int) -> bool:
        """Send `signum` only to the process that does the work. Return whether its pid is known
        and it could be signalled."""
        return self.pid is not None and self.process.signal(self.pid, signum)

    def take_open_line(self) -> bytes:
        """Return the line that it has begun and not ended, and forget it."""
        return self._lines.take_open()

    def read_stderr(self) -> bool:
        """Log what its stderr holds now. Return whether more can come."""
        if self.process.stderr is None:
            return False
        data = self.process.read(self.process.stderr)
        if data is not None:
            self._take_stderr(data)
        return data != b""

    def end_stderr(self) -> None:
        """Log the rest of its stderr, including an unfinished line."""
        if self.process.stderr is not None:
            for data in self.process.read_rest(self.process.stderr):
                self._take_stderr(data)
        self._take_stderr(b"")

    def facts(self) -> ChildFacts:
        """Return what a person wants to know of it, including its latest stderr."""
        self.read_stderr()
        # With "inherit", we see its stderr only until it is ready. A line from its boot must not
        # be shown as its last.
        unseen = self._ready and self.child.group.settings.stderr == "inherit"
        tail = () if unseen else tuple(self._stderr.tail)
        return ChildFacts(self.child.group.name, self.process.pid, tail)

    def _take_stderr(self, data: bytes) -> None:
        lines = self._stderr.feed(data)
        if self.child.group.settings.stderr == "inherit":
            # It boots. Once it is ready, it writes there itself.
            with suppress(OSError):
                os.write(2, data)
        else:
            self._log(lines)

    def log(self, record: Log, job: Job | None) -> None:
        """Log a record that the child has sent, about `job` or None."""
        level = _LEVELS.get((record.level or "").lower(), logging.INFO)
        self._emit(level, printable(record.message or ""), job, record.id)

    def _log(self, lines: list[str]) -> None:
        jobs = self.child.jobs
        # With several in flight, it is unknown which one the line is about.
        job = next(iter(jobs.values())) if len(jobs) == 1 else None
        for line in lines:
            self._emit(logging.INFO, line, job, None)

    def _emit(self, level: int, text: str, job: Job | None, task_id: str | None) -> None:
        child = self.child
        about, fields = "", {}
        if job is not None:
            about = f" {job.title}"
            fields = {"task_id": job.task_id, "task_name": job.task_name}
        elif task_id is not None:
            about = f" [{printable(task_id)}]"
            fields = {"task_id": task_id}
        self._logger.log(
            level,
            "[%s#%d pid %d%s] %s",
            child.group.name,
            child.slot.number,
            self.process.pid,
            about,
            text,
            extra=fields,
        )
