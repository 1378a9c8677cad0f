"""How a child's process comes to be: started as a program, or forked by a template.

Both give a `Started`, which knows how the process ends.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from ..core.outcomes import UNKNOWN_STATUS
from ..errors import SpawnError
from ..wire.environment import STDERR, STDOUT

__all__ = ("Forked", "Program", "Started", "Streams", "pidfd")


class Streams:
    """The pipes of a child that is about to start.

    Arguments:
        stderr: where its stderr goes: "log" (a pipe to us), "inherit", "null" or "handover".
            "handover" is a pipe to us too. In addition the child gets descriptors of the worker's
            stdout and stderr, to which it changes once it is ready.

    Raises:
        OSError: there are no more descriptors.
    """

    def __init__(self, stderr: str) -> None:
        #: The child's ends: stdin, stdout, stderr. To be closed here once it has them.
        self.theirs: list[int] = []
        #: Our ends of the same. Without a pipe for stderr, there are two.
        self.ours: list[int] = []
        #: Descriptors to hand over, by the environment variables that tell their numbers.
        self.handed_over: dict[str, int] = {}
        try:
            self._open(stderr)
        except BaseException:
            self.close_theirs()
            self.close_ours()
            raise

    def _open(self, stderr: str) -> None:
        self._pipe(reads=True)
        self._pipe(reads=False)
        if stderr == "inherit":
            self.theirs.append(_own_stderr())
        elif stderr == "null":
            self.theirs.append(os.open(os.devnull, os.O_WRONLY))
        else:
            self._pipe(reads=False)
        if stderr == "handover":
            self.handed_over = _duplicates()

    def _pipe(self, reads: bool) -> None:
        """Open a pipe that the child `reads`, or writes to."""
        reader, writer = os.pipe()
        self.theirs.append(reader if reads else writer)
        self.ours.append(writer if reads else reader)

    def close_theirs(self) -> None:
        """Close the child's ends: only the child is to have them."""
        for descriptor in (*self.theirs, *self.handed_over.values()):
            os.close(descriptor)
        self.theirs, self.handed_over = [], {}

    def close_ours(self) -> None:
        """Close our ends: the child could not be started."""
        for descriptor in self.ours:
            os.close(descriptor)
        self.ours = []


def _own_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:
        # It is closed.
        return os.open(os.devnull, os.O_WRONLY)


def _duplicates() -> dict[str, int]:
    found = {}
    streams = ((STDOUT, 1, sys.__stdout__), (STDERR, 2, sys.__stderr__))
    for name, number, stream in streams:
        # None: it was closed when this process started. Something else may have its number now.
        if stream is not None:
            # It was closed later: there is nothing to hand over.
            with suppress(OSError):
                found[name] = os.dup(number)
    return found


class Started(Protocol):
    """A process that runs, or is to be reaped."""

    pid: int
    #: Readable once the process has ended; None where the system has no such descriptor.
    pidfd: int | None

    @property
    def reaped(self) -> bool:
        """Whether it was reaped: its number may be another process' now."""

    def status(self) -> int | None:
        """Return the exit status, as `subprocess.Popen.returncode`; None if it runs."""

    def reap(self) -> None:
        """Reap the process, which has ended."""

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the process, which was killed, and reap it. Return whether it has
        ended in that time."""

    def kill(self, signum: int, send: Callable[[int, int], None]) -> None:
        """Send a signal to the process, or with `os.killpg` to its group.

        Raises:
            OSError: as `send`.
        """


class Program:
    """A program that was started.

    Arguments:
        argv: the program and its arguments; no shell runs.
        env: its whole environment.
        cwd: its working directory; None is the worker's.
        streams: its pipes.
        descriptors: more descriptors that it is to have.

    Raises:
        SpawnError: the operating system refused.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str | None,
        streams: Streams,
        descriptors: Sequence[int] = (),
    ) -> None:
        stdin, stdout, stderr = streams.theirs
        handed_over = streams.handed_over
        try:
            self._popen = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(*handed_over.values(), *descriptors),
                cwd=cwd,
                env={**env, **{name: str(number) for name, number in handed_over.items()}},
                # Its own session, and with it its own group: it can be killed with all that it has
                # started, and a Ctrl-C in the worker's terminal does not reach it.
                start_new_session=True,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as exc:
            raise SpawnError(f"can't start {argv[0]!r}: {exc}") from exc
        self.pid = self._popen.pid
        self.pidfd = pidfd(self.pid)

    @property
    def reaped(self) -> bool:
        """Whether it was reaped."""
        return self._popen.returncode is not None

    def status(self) -> int | None:
        """Return the exit status, or None. It stays a zombie until it is reaped: until then, the
        number of its group can't be reused."""
        if self.reaped or not hasattr(os, "waitid"):
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
        """Reap the process, which has ended."""
        self._popen.poll()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the process, and reap it."""
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        return self.reaped

    def kill(self, signum: int, send: Callable[[int, int], None]) -> None:
        """Send a signal."""
        send(self.pid, signum)


class Forked:
    """A process that a template has forked. The template is its parent, and reaps it when it is
    told to: until then, its number can't be reused.

    Arguments:
        pid: its number.
        descriptor: a pidfd for it.
        reap: has the template reap it.
    """

    def __init__(self, pid: int, descriptor: int, reap: Callable[[int], None]) -> None:
        self.pid = pid
        self.pidfd: int | None = descriptor
        self._reaped = False
        self._reap = reap

    @property
    def reaped(self) -> bool:
        """Whether it was reaped, or is about to be."""
        return self._reaped

    def _has_ended(self, seconds: float = 0.0) -> bool:
        if self.pidfd is None:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def status(self) -> int | None:
        """Return the exit status, or None if it runs. Only its parent is told of it, but /proc
        shows the status of a zombie. If the template has died, it may be unknown."""
        if not self._has_ended():
            return None
        with suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{self.pid}/stat", "rb") as stat:
                # They come after the name, which is in brackets and may contain any character.
                fields = stat.read().rpartition(b")")[2].split()
            # proc_pid_stat(5): "state" is the third field, "exit_code" the 52nd.
            if fields[0] in (b"Z", b"X"):
                return os.waitstatus_to_exitcode(int(fields[49]))
        return self._adopted_status()

    def _adopted_status(self) -> int:
        """Return the status if this process has become the parent, as process 1 of a container
        does."""
        with suppress(ChildProcessError):
            end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None:
                return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        return UNKNOWN_STATUS

    def reap(self) -> None:
        """Have the process reaped, which has ended."""
        if not self._reaped:
            self._reaped = True
            self._reap(self.pid)
            with suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the process, and have it reaped."""
        if self._has_ended(seconds):
            self.reap()
        return self.reaped

    def kill(self, signum: int, send: Callable[[int, int], None]) -> None:
        """Send a signal."""
        if send is os.kill and self.pidfd is not None:
            # It never hits another process.
            signal.pidfd_send_signal(self.pidfd, signum)
        else:
            send(self.pid, signum)


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
