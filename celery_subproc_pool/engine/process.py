"""One child process: spawn, pipes, signals to its whole group, reaping. Bytes only.

Layer: above `errors`. Must not import the protocol, the scheduler or Celery; decides nothing.
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

__all__ = ("KILL_GRACE", "STDERR", "STDOUT", "ChildProcess", "pidfd")

#: The environment variables that tell a child the numbers of its descriptors for our stdout and
#: stderr.
STDOUT = "CELERY_SUBPROC_POOL_STDOUT"
STDERR = "CELERY_SUBPROC_POOL_STDERR"

#: Seconds that a killed process may take to end.
KILL_GRACE = 5.0

#: Bytes to read at a time: the capacity of a pipe on Linux.
READ_BYTES = 65536


class ChildProcess:
    """A process in a session of its own, with non-blocking pipes.

    Arguments:
        argv: the program and its arguments; no shell runs.
        env: its whole environment.
        cwd: its working directory, None for ours.
        stderr: where its stderr goes: "log" (a pipe to us), "inherit" or "null"; "handover" is a
            pipe to us, together with descriptors of our own stdout and stderr, whose numbers stand
            in the environment as `STDOUT` and `STDERR`, for the child to go on with.

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
        targets = {"inherit": None, "null": subprocess.DEVNULL}
        handed_over = _duplicates() if stderr == "handover" else {}
        env = {**env, **{name: str(number) for name, number in handed_over.items()}}
        try:
            self._popen = subprocess.Popen(
                argv,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=targets.get(stderr, subprocess.PIPE),
                pass_fds=tuple(handed_over.values()),
                cwd=cwd,
                env=env,
                # Its own session, hence group: it can be killed with all that it started, and
                # a Ctrl-C in the worker's terminal does not reach it.
                start_new_session=True,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as exc:
            raise SpawnError(f"can't start {argv[0]!r}: {exc}") from exc
        finally:
            for number in handed_over.values():
                os.close(number)
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self.pid = self._popen.pid
        #: The descriptors; None once closed.
        self.stdin: int | None = self._popen.stdin.fileno()
        self.stdout: int | None = self._popen.stdout.fileno()
        self.stderr: int | None = self._popen.stderr.fileno() if self._popen.stderr else None
        #: Readable once the process has ended; None where the system has no such thing.
        self.pidfd: int | None = pidfd(self.pid)
        #: How many bytes `write` has taken, and has not dropped.
        self.written = 0
        #: What of it is still to be written.
        self._rest: deque[memoryview] = deque()
        self._output = select.poll()
        self._output.register(self.stdout, select.POLLIN)
        for descriptor in (self.stdin, self.stdout, self.stderr):
            if descriptor is not None:
                os.set_blocking(descriptor, False)

    @property
    def unwritten(self) -> bool:
        """Whether `write` left something for `write_more`."""
        return bool(self._rest)

    def write(self, data: bytes) -> bool:
        """Write as much of `data` as the pipe takes, and keep the rest.

        Returns:
            False if the child's stdin is closed and no byte of `data` was written.
        """
        if self.stdin is None:
            return False
        written = 0
        # While something stands before it, it waits: the order is kept.
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

    def write_more(self) -> bool:
        """Go on writing what is left.

        Returns:
            False if the child has closed its stdin: what is left was dropped.
        """
        if self.stdin is None or not self._rest:
            return True
        first = self._rest[0]
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
        """Take back what was not written: the child will never read it."""
        self.written -= sum(map(len, self._rest))
        self._rest.clear()

    def read_bytes(self) -> int:
        """Return how many bytes of what was written were read; all, if that can't be told."""
        if self.stdin is None:
            return self.written
        return self.written - _waiting(self.stdin) - sum(map(len, self._rest))

    def has_reader(self) -> bool:
        """Return whether somebody has the other end of the child's stdin: the child, or a
        process that inherited it."""
        if self.stdin is None:
            return False
        poll = select.poll()
        poll.register(self.stdin, 0)
        return not any(events & select.POLLERR for _, events in poll.poll(0))

    def is_silent(self) -> bool:
        """Return whether its stdout is open and nothing stands in it: cheaper than to `read`."""
        return self.stdout is not None and not self._output.poll(0)

    def read_rest(self, descriptor: int) -> Iterator[bytes]:
        """Yield what stands in a pipe now, and not what somebody goes on writing meanwhile."""
        waiting = _waiting(descriptor)
        while waiting > 0 and (data := self.read(descriptor)):
            waiting -= len(data)
            yield data

    def read(self, descriptor: int) -> bytes | None:
        """Read what is there. Empty bytes are the end; None is nothing at the moment."""
        try:
            return os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def member(self, pid: int | None) -> int | None:
        """Return `pid` if that is a process of the child's group, which it may say of itself; None
        if it is not (in a container, pids mean something else)."""
        try:
            return pid if pid and os.getpgid(pid) == self.pid else None
        except (OSError, OverflowError):
            return None

    def signal(self, pid: int, signum: int) -> bool:
        """Send `signum` to `pid`, a process of the child's group; return whether it is one, which
        we may signal."""
        if self._popen.returncode is not None or self.member(pid) is None:
            return False
        return _send(os.kill, pid, signum)

    def kill(self, signum: int) -> bool:
        """Send `signum` to the child's whole group, as long as the child is not reaped.

        Returns:
            False if it goes on, for we may signal nothing of it: it runs as another user.
        """
        if self._popen.returncode is not None or _send(os.killpg, self.pid, signum):
            return True
        # macOS refuses it for a group of zombies, too.
        return _has_ended(self.pid) or _send(os.kill, self.pid, 0)

    def ended(self) -> int | None:
        """Return the exit status (`subprocess.Popen.returncode`) if the child has ended. It is a
        zombie until `reap` or `leave`: as long, its group's number can't be another's."""
        if self._popen.returncode is not None or not hasattr(os, "waitid"):
            return self._popen.poll()
        try:
            end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # Somebody else has reaped it.
            return self._popen.poll()
        if end is None:
            return None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def reap(self) -> None:
        """Kill what the child, which has ended, has left of its group, and reap it."""
        self.kill(signal.SIGKILL)
        self._popen.poll()

    def leave(self) -> None:
        """Reap the child, which has ended, and let what it has left of its group go on."""
        self._popen.poll()

    def ends_within(self, seconds: float) -> bool:
        """Wait for the child to end; return whether it has. At once where the system can't wait."""
        if self.pidfd is None:
            return _has_ended(self.pid)
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def wait(self, seconds: float = KILL_GRACE) -> bool:
        """Wait for a child that was killed, but not for ever: the system may hold on to it.

        Returns:
            Whether it has ended.
        """
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        return self._popen.returncode is not None

    def close_stdin(self) -> None:
        """Close the child's stdin, which tells it to finish; what was not written is dropped."""
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


def _duplicates() -> dict[str, int]:
    """Return descriptors to hand over, by the names of the variables that tell their numbers."""
    found = {}
    streams = ((STDOUT, 1, sys.__stdout__), (STDERR, 2, sys.__stderr__))
    for name, number, stream in streams:
        # Where it was closed when this process started, something else has its number since.
        if stream is not None:
            # Closed later: there is nothing to hand over.
            with suppress(OSError):
                found[name] = os.dup(number)
    return found


def _waiting(pipe: int) -> int:
    """Return how many bytes stand in a pipe; either end tells."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def pidfd(pid: int | None) -> int | None:
    """Return a descriptor that is readable once the process has ended, where there is such a
    thing; None for no process."""
    if pid is None or not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        # A kernel or sandbox without it: exits are then seen by polling.
        return None


def _send(send: Callable[[int, int], None], whom: int, signum: int) -> bool:
    """Send a signal, if there is still somebody; return whether we may."""
    try:
        send(whom, signum)
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
