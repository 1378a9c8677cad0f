"""A running child: its process, what has come of its streams, and what to say of it.

Layer: above `child`, `lines`, `protocol` and `records`. Must not import Celery. Reads when the
engine says that there is something to read; decides nothing.
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
from ..wire.text import printable
from .process import ChildProcess

__all__ = ("RunningChild",)


#: The levels of a child's log, by the names that programs of many languages have for them.
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

    Arguments:
        child: what the scheduler knows of it.
        process: its process.
    """

    __slots__ = (
        "_greets",
        "_lines",
        "_logger",
        "_stderr",
        "child",
        "gone",
        "named",
        "pid",
        "process",
        "programs",
        "ready",
        "writing",
    )

    def __init__(self, child: Child, process: ChildProcess) -> None:
        self.child = child
        self.process = process
        #: Whom to signal: under a wrapper, another than was started. None: out of our sight.
        self.pid: int | None = process.pid
        #: Whether it has said itself which process that is.
        self.named = False
        #: Whether it has said that it is ready, after a handshake.
        self.ready = False
        #: Whether its stdin is registered with the selector, for the rest of a request.
        self.writing = False
        #: Whether its exit has been seen.
        self.gone = False
        #: What else ran in its group when it was killed, as text; None if it was not.
        self.programs: tuple[str, ...] | None = None
        self._greets = child.group.settings.handshake
        self._lines = LineBuffer(child.group.settings.max_message_bytes)
        child.open_line = self._lines.quote_open
        self._stderr = StderrLines()
        self._logger = logging.getLogger(f"celery_subproc_pool.child.{child.group.name}")

    def messages(self, data: bytes) -> Iterator[Message | Ready | Fatal]:
        """Yield what `data`, from its stdout, completes: messages, or what it says of its boot.

        Raises:
            ProtocolFault: where one is expected, something else stands.
        """
        decode = self.child.group.decode
        for line in self._lines.feed(data):
            if self._greets and self.child.state is ChildState.STARTING:
                greeting = decode_greeting(line)
                if greeting is None:
                    self._log([printable(line.decode(errors="replace"))])
                    self.child.near_greeting = around_greeting(line) or self.child.near_greeting
                else:
                    yield greeting
            else:
                yield decode(line)
        if self._lines.overlong is not None:
            raise ProtocolFault(
                f"a line longer than max_message_bytes ({self._lines.max_bytes}), which begins"
                f" {self._lines.overlong!r}"
            )

    @property
    def has_open_line(self) -> bool:
        """Whether it has begun a line and not ended it."""
        return self._lines.has_open

    def kill(self, signum: int) -> bool:
        """Send `signum`: SIGKILL to what was started and to the process that it has named, while
        the rest of its group is told by SIGTERM, see `remains`; any other to the process that it
        has named, which ends what it has started itself; to the group if it has named none. Return
        whether we may."""
        named = self.pid if self.named else None
        if signum == signal.SIGKILL:
            for pid in {self.process.pid, named or self.process.pid}:
                self.process.signal(pid, signum)
            return self.process.kill(signal.SIGTERM)
        told = named is not None and self.process.signal(named, signum)
        return told or self.process.kill(signum)

    def signal(self, signum: int) -> bool:
        """Send `signum` to the process that does its work, and to no other; return whether we know
        which that is."""
        return self.pid is not None and self.process.signal(self.pid, signum)

    def take_open_line(self) -> bytes:
        """Return what has come of a line that it has not ended, and forget it."""
        return self._lines.take_open()

    def read_stderr(self) -> bool:
        """Log what stands in its stderr now. Return whether more can come."""
        if self.process.stderr is None:
            return False
        data = self.process.read(self.process.stderr)
        if data is not None:
            self._take_stderr(data)
        return data != b""

    def end_stderr(self) -> None:
        """Log what is left of its stderr, an unfinished line included."""
        if self.process.stderr is not None:
            for data in self.process.read_rest(self.process.stderr):
                self._take_stderr(data)
        self._take_stderr(b"")

    def facts(self) -> ChildFacts:
        """Return what there is to say, its latest stderr included."""
        self.read_stderr()
        # Once it is ready, we do not see what it writes to a stderr of its own: a line from its
        # boot must not pass for its last.
        unseen = self.ready and self.child.group.settings.stderr == "inherit"
        tail = () if unseen else tuple(self._stderr.tail)
        return ChildFacts(self.child.group.name, self.process.pid, tail)

    def _take_stderr(self, data: bytes) -> None:
        lines = self._stderr.feed(data)
        if self.child.group.settings.stderr == "inherit":
            # It boots, and is to write there itself soon.
            with suppress(OSError):
                os.write(2, data)
        else:
            self._log(lines)

    def log(self, record: Log, job: Job | None) -> None:
        """Log what the child asked for, about `job` or none that it has in hand."""
        level = _LEVELS.get((record.level or "").lower(), logging.INFO)
        self._emit(level, printable(record.message or ""), job, record.id)

    def _log(self, lines: list[str]) -> None:
        jobs = self.child.jobs
        # Of several, nobody knows which one it is about.
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
