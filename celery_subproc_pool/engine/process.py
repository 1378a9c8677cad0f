"""One child process: its pipes, signals to its process group, reaping.

It moves bytes, knows no message, and decides nothing.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import signal
import termios
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from .starting import Forked, Started

__all__ = ("KILL_GRACE", "ChildProcess")

#: Seconds that a killed process may take to end.
KILL_GRACE = 5.0

#: Bytes to read at a time: the capacity of a pipe on Linux.
READ_BYTES = 65536


class ChildProcess:
    """A process in a session of its own, with non-blocking pipes.

    Arguments:
        started: the process.
        streams: our ends of its stdin, its stdout and, if there is a pipe for it, its stderr.
    """

    __slots__ = (
        "_open",
        "_output",
        "_rest",
        "_started",
        "pid",
        "pidfd",
        "stderr",
        "stdin",
        "stdout",
        "written",
    )

    def __init__(self, started: Started, streams: Sequence[int]) -> None:
        self._started = started
        self.pid = started.pid
        #: The descriptors; None once closed.
        self.stdin: int | None = streams[0]
        self.stdout: int | None = streams[1]
        self.stderr: int | None = streams[2] if len(streams) > 2 else None
        self._open = list(streams)
        #: Readable once the process has ended; None where the system has no such descriptor.
        self.pidfd: int | None = started.pidfd
        #: How many bytes `write` has taken and not dropped.
        self.written = 0
        #: Those that the pipe has not taken yet.
        self._rest: deque[memoryview] = deque()
        self._output = select.poll()
        self._output.register(self.stdout, select.POLLIN)
        for descriptor in (self.stdin, self.stdout, self.stderr):
            if descriptor is not None:
                os.set_blocking(descriptor, False)

    @property
    def shares_memory(self) -> bool:
        """Whether a template has forked it."""
        return isinstance(self._started, Forked)

    @property
    def unwritten(self) -> bool:
        """Whether `write` has left something for `write_more`."""
        return bool(self._rest)

    def write(self, data: bytes) -> bool:
        """Write as much of `data` as the pipe takes, and keep the rest.

        Returns:
            False if the child's stdin is closed and no byte of `data` was written.
        """
        if self.stdin is None:
            return False
        written = 0
        # What was left before goes first.
        if not self._rest:
            try:
                written = os.write(self.stdin, data)
            except BlockingIOError:
                pass
            except OSError:
                return False
        if written < len(data):
            self._rest.append(memoryview(data)[written:])
        self.written += len(data)
        return True

    def put_off(self, data: bytes) -> None:
        """Keep `data` for `write_more`, after what was left before."""
        if self.stdin is not None:
            self._rest.append(memoryview(data))
            self.written += len(data)

    def write_more(self) -> bool:
        """Write more of what `write` has left, or was put off.

        Returns:
            False if the child has closed its stdin. What was left is dropped.
        """
        if self.stdin is None or not self._rest:
            return True
        first = self._rest[0]
        if len(self._rest) > 1:
            # One system call for all.
            first = memoryview(b"".join(self._rest))
            self._rest.clear()
            self._rest.append(first)
        try:
            first = first[os.write(self.stdin, first) :]
        except BlockingIOError:
            return True
        except OSError:
            self._drop()
            return False
        if first:
            self._rest[0] = first
        else:
            self._rest.popleft()
        return True

    def _drop(self) -> None:
        """Drop what the pipe has not taken: the child will never read it."""
        self.written -= sum(map(len, self._rest))
        self._rest.clear()

    def read_bytes(self) -> int:
        """Return how many of the written bytes the child has read; all if its stdin is closed."""
        if self.stdin is None:
            return self.written
        return self.written - _waiting(self.stdin) - sum(map(len, self._rest))

    def has_reader(self) -> bool:
        """Return whether the other end of the child's stdin is open: in the child, or in a process
        that has inherited it."""
        if self.stdin is None:
            return False
        poll = select.poll()
        poll.register(self.stdin, 0)
        return not any(events & select.POLLERR for _, events in poll.poll(0))

    def is_silent(self) -> bool:
        """Return whether its stdout is open and empty. This is cheaper than `read`."""
        return self.stdout is not None and not self._output.poll(0)

    def read_rest(self, descriptor: int) -> Iterator[bytes]:
        """Yield what a pipe holds now, and not what is written to it meanwhile."""
        waiting = _waiting(descriptor)
        while waiting > 0 and (data := self.read(descriptor)):
            waiting -= len(data)
            yield data

    def read(self, descriptor: int) -> bytes | None:
        """Return what can be read now: empty bytes at the end, None if there is nothing yet."""
        try:
            return os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def member(self, pid: int | None) -> int | None:
        """Return `pid`, which the child has named, if it is a process of the child's group; None
        if it is not: in a container, a pid has another meaning."""
        try:
            return pid if pid and os.getpgid(pid) == self.pid else None
        except (OSError, OverflowError):
            return None

    def signal(self, pid: int, signum: int) -> bool:
        """Send `signum` to `pid`. Return whether that is a process of the child's group, and the
        worker may signal it."""
        if self._started.reaped or self.member(pid) is None:
            return False
        if pid == self.pid:
            return _send(partial(self._started.kill, signum, os.kill))
        return _send(partial(os.kill, pid, signum))

    def kill(self, signum: int) -> bool:
        """Send `signum` to the child's whole group, as long as the child is not reaped.

        Returns:
            False if it goes on, because the worker may signal nothing in the group: it runs as
            another user.
        """
        started = self._started
        if started.reaped or _send(partial(started.kill, signum, os.killpg)):
            return True
        # macOS also refuses to signal a group of zombies.
        return started.status() is not None or _send(partial(started.kill, 0, os.kill))

    def ended(self) -> int | None:
        """Return the exit status (as `subprocess.Popen.returncode`), or None if it runs.

        The child stays a zombie until `reap` or `leave`. Until then, the number of its group can't
        be reused.
        """
        return self._started.status()

    def reap(self) -> None:
        """Reap the child, which has ended, and kill what is left of its group."""
        self.kill(signal.SIGKILL)
        self._started.reap()

    def leave(self) -> None:
        """Reap the child, which has ended, and let the rest of its group go on."""
        self._started.reap()

    def ends_within(self, seconds: float) -> bool:
        """Wait for the child to end. Return whether it has. Without a pidfd, do not wait."""
        if self.pidfd is None:
            return self._started.status() is not None
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def wait(self, seconds: float = KILL_GRACE) -> bool:
        """Wait for a child that was killed, but not for ever: the system may delay its end.

        Returns:
            Whether it has ended.
        """
        return self._started.wait(seconds)

    def close_stdin(self) -> None:
        """Close the child's stdin, which tells it to finish. Drop what was not written."""
        if self.stdin is not None:
            self._drop()
            self._open.remove(self.stdin)
            os.close(self.stdin)
            self.stdin = None

    def close(self) -> None:
        """Close every descriptor that is still open."""
        for descriptor in (*self._open, self.pidfd):
            if descriptor is not None:
                os.close(descriptor)
        self._open.clear()
        self.stdin = self.stdout = self.stderr = self.pidfd = None


def _waiting(pipe: int) -> int:
    """Return how many bytes a pipe holds. Either end can be asked."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def _send(send: Callable[[], None]) -> bool:
    """Send a signal. Return False if the worker may not; True also if the target is gone."""
    try:
        send()
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    return True
