"""Kills every child's process group when the worker dies, however it dies.

This module is also a script that runs as a process of its own, the guardian. It reads the pids of
the children from its stdin. Its stdin ends when the worker dies or stops. Then the guardian ends
the children's process groups. It also ends every other process that carries the worker's mark,
because a child may have started it in a session of its own. `Guardian` is the worker's end of the
pipe. The script must start fast: it imports only the standard library.

The mark is twofold: a variable in the environment, and a resource limit without effect. That is the
soft limit on the time that a real-time process may run: hundreds of centuries, and a different
number for each worker. The limit is needed because programs overwrite their environment as /proc
shows it (setproctitle does), or start others without it. A fork and an exec keep the limit, and
programs do not change it.

PR_SET_CHILD_SUBREAPER and PDEATHSIG are no replacement: PDEATHSIG is sent when the *thread* that
has spawned a child ends, and neither reaches grandchildren.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

__all__ = ("MARK", "Guardian")

#: The environment variable that marks all processes that one worker's pool has started.
MARK = "CELERY_SUBPROC_POOL_WORKER"

#: Seconds from SIGTERM to SIGKILL for what children have started.
MOMENT = 1.0

#: Seconds between looks whether it has ended.
LOOK_INTERVAL = 0.01

#: Seconds that a guardian may take to exit: it looks at all processes of the system.
PATIENCE = 5.0

#: A guardian that has lived for fewer seconds is replaced only with the next child.
SHORT_LIFE = 1.0

logger = logging.getLogger("celery_subproc_pool")


class Guardian:
    """Starts the guardian, and tells it which process groups there are.

    Arguments:
        owner: the worker's node name. The guardian shows it in its command line.
    """

    def __init__(self, owner: str = "") -> None:
        self._owner = owner
        #: Goes into the environment of every child, as `MARK`.
        self.mark = uuid.uuid4().hex
        self._pids: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._start()

    @property
    def _title(self) -> str:
        # In the form of Celery's process titles. The guardian has no setproctitle.
        return f"[celeryd: {self._owner}:guardian]"

    @property
    def pid(self) -> int | None:
        """The guardian's pid; None while it can't be started."""
        return None if self._process is None else self._process.pid

    def watch(self, pid: int) -> None:
        """Add the process group `pid`, which has just started: it is ended if the worker dies."""
        _set_limit(pid, _limit(self.mark))
        self._pids.add(pid)
        if not self._tell(f"+{pid}"):
            self._restart()

    def forget(self, pid: int) -> None:
        """Remove the group `pid`, which is gone."""
        self._pids.discard(pid)
        self._tell(f"-{pid}")

    def check(self) -> None:
        """Replace the guardian if it has died. If it died soon after its start, the next `watch`
        replaces it."""
        if self._process is None or self._process.poll() is None:
            return
        logger.warning("The guardian (pid %s) has died; another one is started", self.pid)
        if time.monotonic() < self._started + SHORT_LIFE:
            self._dismiss()
        else:
            self._restart()

    def descendants(self) -> list[int]:
        """Return the pids of the children and of all processes that they have started."""
        return _marked(self.mark)

    def close(self) -> None:
        """Have the guardian kill what is left, and exit."""
        self._dismiss()

    def disown(self) -> None:
        """In a forked copy of the worker: close its end of the pipe, and leave the rest alone."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()

    def _start(self) -> None:
        try:
            process = subprocess.Popen(
                # Isolated and without site: it takes a fraction of the time and memory.
                [sys.executable, "-I", "-S", os.path.abspath(__file__), self.mark, self._title],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                # Its own session: a signal to the worker's group or terminal must not reach it.
                start_new_session=True,
                cwd="/",
                # The worker may itself be a child of another pool. Without that pool's mark, its
                # guardian does not kill this one, which still has children to kill.
                env={name: value for name, value in os.environ.items() if name != MARK},
            )
        except OSError as exc:
            logger.error(
                "The guardian can't start (%s): until it can, children survive if the worker is"
                " killed",
                exc,
            )
            return
        assert process.stdin is not None
        # For the same reason as the environment above.
        _set_limit(process.pid, None)
        # A guardian that hangs must not hang the worker.
        os.set_blocking(process.stdin.fileno(), False)
        self._process = process
        self._started = time.monotonic()

    def _tell(self, line: str) -> bool:
        """Write `line` to the guardian. Return whether that was possible."""
        if self._process is None or self._process.stdin is None:
            return False
        try:
            os.write(self._process.stdin.fileno(), line.encode() + b"\n")
        except OSError:
            return False
        return True

    def _restart(self) -> None:
        """Start another guardian, and tell it all pids: this one was killed, does not read, or was
        never started."""
        if self._process is not None:
            self._process.kill()
        self._dismiss()
        self._start()
        for pid in self._pids:
            self._tell(f"+{pid}")

    def _dismiss(self) -> None:
        """Close the pipe, and wait for the guardian to exit. Kill it if it does not: it may have
        been stopped by a signal."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _set_limit(pid: int, limit: int | None) -> None:
    """Set the soft limit of a process; None is the highest allowed. Do nothing where the system has
    no such limit, or does not allow it."""
    with suppress(AttributeError, OSError, OverflowError, ValueError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_RTTIME)
        new = hard if limit is None else limit
        resource.prlimit(pid, resource.RLIMIT_RTTIME, (new, hard))


def _limit(mark: str) -> int:
    """Return the limit, in microseconds, that marks the processes of the pool `mark`. It is too
    high to have an effect, and differs between pools."""
    return 2**61 + int(mark, 16) % 2**61


def _marked(mark: str) -> list[int]:
    """Return the pids of the processes that carry `mark`; none where there is no /proc."""
    needle, limit = f"{MARK}={mark}".encode(), _limit(mark)
    numbers = os.listdir("/proc") if os.path.isdir("/proc/self") else ()
    pids = (int(name) for name in numbers if name.isdigit())
    return [pid for pid in pids if _has_limit(pid, limit) or _has_variable(pid, needle)]


def _has_limit(pid: int, limit: int) -> bool:
    try:
        return resource.prlimit(pid, resource.RLIMIT_RTTIME)[0] == limit
    except PermissionError:
        # It has changed its user. /proc tells the limit of any process, but is slower.
        return _limit_shown(pid) == limit
    except (AttributeError, OSError, ValueError):
        return False


def _limit_shown(pid: int) -> int | None:
    with suppress(OSError, ValueError), open(f"/proc/{pid}/limits") as limits:
        for line in limits:
            if line.startswith("Max realtime timeout"):
                return int(line.split()[3])
    return None


def _has_variable(pid: int, needle: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            return needle in environ.read().split(b"\0")
    except OSError:
        return False


def _members(groups: set[int]) -> list[int]:
    """Return the pids of the processes in `groups`; none where there is no /proc."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit() and _group(int(name)) in groups:
            found.append(int(name))
    return found


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # The state comes after the name, which is in brackets and may contain any character.
            return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _end_all(groups: set[int], mark: str) -> None:
    """Kill the children. Send SIGTERM to the rest of their groups and to what carries `mark`: it
    may clean up after the children. Kill it after `MOMENT`."""
    for pid in groups:
        _signal(os.kill, pid, signal.SIGKILL)
    for pid in groups:
        _signal(os.killpg, pid, signal.SIGTERM)
    told = {*_members(groups), *groups}
    others = {*_marked(mark)} - told
    for pid in others:
        _signal(os.kill, pid, signal.SIGTERM)
    rest = (told | others) - groups
    end = time.monotonic() + MOMENT
    while any(map(_runs, rest)) and time.monotonic() < end:
        time.sleep(LOOK_INTERVAL)
    # The number of an empty group may have been reused.
    in_use = {_group(pid) for pid in rest if _runs(pid)} if rest else groups
    for pid in in_use & groups:
        _signal(os.killpg, pid, signal.SIGKILL)
    # Twice: a process may fork while the list is read.
    for _ in range(2):
        for pid in _marked(mark):
            _signal(os.kill, pid, signal.SIGKILL)


def _signal(send: Callable[[int, int], None], pid: int, signum: int) -> None:
    with suppress(OSError):
        send(pid, signum)


def main() -> None:
    """Run as the guardian, until stdin ends."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            groups.add(pid)
        else:
            groups.discard(pid)
    _end_all(groups, sys.argv[1])


if __name__ == "__main__":
    main()
