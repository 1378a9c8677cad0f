"""One child process: spawn, pipes, signals to its process group, reaping.

It moves bytes, knows no message, and decides nothing.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from ..errors import SpawnError
from ..wire.environment import STDERR, STDOUT

__all__ = ("KILL_GRACE", "ChildProcess", "pidfd")

#: Seconds that a killed process may take to end.
KILL_GRACE = 5.0

#: Bytes to read at a time: the capacity of a pipe on Linux.
READ_BYTES = 65536


class ChildProcess:
    """A process in a session of its own, with non-blocking pipes.

    Arguments:
        argv: the program and its arguments; no shell runs.
        env: its whole environment.
        cwd: its working directory; None is the worker's.
        stderr: where its stderr goes: "log" (a pipe to us), "inherit", "null" or "handover".
            "handover" is a pipe to us too. In addition the child gets descriptors of the worker's
            stdout and stderr, to which it changes once it is ready. Their numbers are in the
            environment as `STDOUT` and `STDERR` (`wire.environment`).

    Raises:
        SpawnError: the operating system refused.
    """

    __slots__ = (
        "_output",
        "_popen",
        "_rest",
        "pid",
        "pidfd",
        "stderr",
        "stdin",
        "stdout",
        "written",
    )

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, stderr: str
    ) -> None:
        self._popen = _start(argv, env, cwd, stderr)
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self.pid = self._popen.pid
        #: The descriptors; None once closed.
        self.stdin: int | None = self._popen.stdin.fileno()
        self.stdout: int | None = self._popen.stdout.fileno()
        self.stderr: int | None = self._popen.stderr.fileno() if self._popen.stderr else None
        #: Readable once the process has ended; None where the system has no such descriptor.
        self.pidfd: int | None = pidfd(self.pid)
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
        if self._popen.returncode is not None or self.member(pid) is None:
            return False
        return _send(os.kill, pid, signum)

    def kill(self, signum: int) -> bool:
        """Send `signum` to the child's whole group, as long as the child is not reaped.

        Returns:
            False if it goes on, because the worker may signal nothing in the group: it runs as
            another user.
        """
        if self._popen.returncode is not None or _send(os.killpg, self.pid, signum):
            return True
        # macOS also refuses to signal a group of zombies.
        return _has_ended(self.pid) or _send(os.kill, self.pid, 0)

    def ended(self) -> int | None:
        """Return the exit status (as `subprocess.Popen.returncode`), or None if it runs.

        The child stays a zombie until `reap` or `leave`. Until then, the number of its group can't
        be reused.
        """
        if self._popen.returncode is not None or not hasattr(os, "waitid"):
            return self._popen.poll()
        try:
            end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # Another part of this process has reaped it.
            return self._popen.poll()
        if end is None:
            return None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def reap(self) -> None:
        """Reap the child, which has ended, and kill what is left of its group."""
        self.kill(signal.SIGKILL)
        self._popen.poll()

    def leave(self) -> None:
        """Reap the child, which has ended, and let the rest of its group go on."""
        self._popen.poll()

    def ends_within(self, seconds: float) -> bool:
        """Wait for the child to end. Return whether it has. Without a pidfd, do not wait."""
        if self.pidfd is None:
            return _has_ended(self.pid)
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def wait(self, seconds: float = KILL_GRACE) -> bool:
        """Wait for a child that was killed, but not for ever: the system may delay its end.

        Returns:
            Whether it has ended.
        """
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        return self._popen.returncode is not None

    def close_stdin(self) -> None:
        """Close the child's stdin, which tells it to finish. Drop what was not written."""
        if self.stdin is not None and self._popen.stdin is not None:
            self.stdin = None
            self._drop()
            self._popen.stdin.close()

    def close(self) -> None:
        """Close every descriptor that is still open."""
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                pipe.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
        self.stdin = self.stdout = self.stderr = self.pidfd = None


def _start(
    argv: Sequence[str], env: Mapping[str, str], cwd: str | None, stderr: str
) -> subprocess.Popen[bytes]:
    """Start a child. Arguments and errors are those of `ChildProcess`."""
    targets = {"inherit": None, "null": subprocess.DEVNULL}
    handed_over = _duplicates() if stderr == "handover" else {}
    try:
        return subprocess.Popen(
            argv,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=targets.get(stderr, subprocess.PIPE),
            pass_fds=tuple(handed_over.values()),
            cwd=cwd,
            env={**env, **{name: str(number) for name, number in handed_over.items()}},
            # Its own session, and with it its own group: it can be killed with all that it has
            # started, and a Ctrl-C in the worker's terminal does not reach it.
            start_new_session=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as exc:
        raise SpawnError(f"can't start {argv[0]!r}: {exc}") from exc
    finally:
        for number in handed_over.values():
            os.close(number)


def _duplicates() -> dict[str, int]:
    """Return descriptors to hand over, by the environment variables that tell their numbers."""
    found = {}
    streams = ((STDOUT, 1, sys.__stdout__), (STDERR, 2, sys.__stderr__))
    for name, number, stream in streams:
        # None: it was closed when this process started. Something else may have its number now.
        if stream is not None:
            # It was closed later: there is nothing to hand over.
            with suppress(OSError):
                found[name] = os.dup(number)
    return found


def _waiting(pipe: int) -> int:
    """Return how many bytes a pipe holds. Either end can be asked."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def pidfd(pid: int | None) -> int | None:
    """Return a descriptor that is readable once the process has ended; None for no process, and
    where the system has no such descriptor."""
    if pid is None or not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        # This kernel or sandbox has none: exits are seen by polling.
        return None


def _send(send: Callable[[int, int], None], target: int, signum: int) -> bool:
    """Send a signal. Return False if the worker may not; True also if the target is gone."""
    try:
        send(target, signum)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    return True


def _has_ended(pid: int) -> bool:
    if not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
