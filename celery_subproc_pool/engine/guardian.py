"""Kills every child's process group when the worker dies, however it dies.

Layer: standard library only; imports nothing of ours. Run as a script, it is the guardian: it
reads the children's pids from its stdin. When that ends, because the worker was killed or is
through with its children, it ends their groups, and whatever else carries the worker's mark: what
a child has started in a session of its own ends with the worker. `Guardian` is the worker's end of
it.

The mark is a variable in the environment, and a limit that means nothing: the soft one of the time
that a real-time process may run, a number of hundreds of centuries, of this worker's own. Programs
overwrite their environment as /proc shows it (setproctitle does), or start others without it;
nobody changes that limit, and a fork and an exec keep it.

PR_SET_CHILD_SUBREAPER and PDEATHSIG do not do: the latter fires when the *thread* that spawned
a child ends, and neither reaches grandchildren.
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

#: The environment variable that marks all processes that descend from one worker's pool.
MARK = "CELERY_SUBPROC_POOL_WORKER"

#: Seconds that what is left has to end by itself.
MOMENT = 1.0

#: Seconds from one look at it to the next.
LOOK_INTERVAL = 0.01

#: Seconds that a guardian may take to go: it looks at all processes of the system.
PATIENCE = 5.0

#: Seconds that a guardian must have lived for another one to follow it at once.
SHORT_LIFE = 1.0

logger = logging.getLogger("celery_subproc_pool")


class Guardian:
    """The worker's end: starts the guardian and tells it which groups there are.

    Arguments:
        owner: whose guardian it is, for those who look at its command line.
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
        # As the title of a process of Celery's: this one runs without what could set its own.
        return f"[celeryd: {self._owner}:guardian]"

    @property
    def pid(self) -> int | None:
        """The guardian's pid; None while it can't be started."""
        return None if self._process is None else self._process.pid

    def watch(self, pid: int) -> None:
        """Have the process group `pid`, which has just started, ended if the worker dies."""
        _set_limit(pid, _limit(self.mark))
        self._pids.add(pid)
        if not self._tell(f"+{pid}"):
            self._restart()

    def forget(self, pid: int) -> None:
        """The group `pid` is gone."""
        self._pids.discard(pid)
        self._tell(f"-{pid}")

    def check(self) -> None:
        """Replace a guardian that has died; one that dies at once, only with the next child."""
        if self._process is None or self._process.poll() is None:
            return
        logger.warning("The guardian (pid %s) was killed; another one starts", self.pid)
        if time.monotonic() < self._started + SHORT_LIFE:
            self._dismiss()
        else:
            self._restart()

    def descendants(self) -> list[int]:
        """Return the pids of all processes that children have started, and of the children."""
        return _marked(self.mark)

    def close(self) -> None:
        """Have the guardian kill what is left, and go."""
        self._dismiss()

    def disown(self) -> None:
        """In a forked copy of the worker: close its end of the pipe, and leave the rest alone."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()

    def _start(self) -> None:
        try:
            process = subprocess.Popen(
                # Isolated and without site: it boots in a fraction of the time and memory.
                [sys.executable, "-I", "-S", os.path.abspath(__file__), self.mark, self._title],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                # Its own session: what kills the worker's group or terminal must not kill it.
                start_new_session=True,
                cwd="/",
                # In a worker that is itself a child of a pool: that pool's guardian spares this
                # one, which has its own to kill.
                env={name: value for name, value in os.environ.items() if name != MARK},
            )
        except OSError as exc:
            logger.error(
                "The guardian can't start (%s): until it can, children outlive a worker that is"
                " killed",
                exc,
            )
            return
        assert process.stdin is not None
        # As with the variable above.
        _set_limit(process.pid, None)
        # A guardian that hangs must not hang the worker.
        os.set_blocking(process.stdin.fileno(), False)
        self._process = process
        self._started = time.monotonic()

    def _tell(self, line: str) -> bool:
        """Write `line`; return whether the guardian can have it."""
        if self._process is None or self._process.stdin is None:
            return False
        try:
            os.write(self._process.stdin.fileno(), line.encode() + b"\n")
        except OSError:
            return False
        return True

    def _restart(self) -> None:
        """Somebody killed or stopped the guardian, or it never started: try another, which
        learns all pids anew."""
        if self._process is not None:
            self._process.kill()
        self._dismiss()
        self._start()
        for pid in self._pids:
            self._tell(f"+{pid}")

    def _dismiss(self) -> None:
        """Close the pipe and wait, but not for a guardian that somebody has stopped."""
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
    """Set the soft limit of a process; None is as high as it may be. Where the system knows no such
    limit, or does not allow it, there is none."""
    with suppress(AttributeError, OSError, OverflowError, ValueError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_RTTIME)
        new = hard if limit is None else limit
        resource.prlimit(pid, resource.RLIMIT_RTTIME, (new, hard))


def _limit(mark: str) -> int:
    """Return the limit, in microseconds, that marks the descendants of the pool `mark`: none in
    effect, and unlike that of any other pool."""
    return 2**61 + int(mark, 16) % 2**61


def _marked(mark: str) -> list[int]:
    """Return the pids of the processes that carry `mark` (where /proc tells)."""
    needle, limit = f"{MARK}={mark}".encode(), _limit(mark)
    numbers = os.listdir("/proc") if os.path.isdir("/proc/self") else ()
    pids = (int(name) for name in numbers if name.isdigit())
    return [pid for pid in pids if _has_limit(pid, limit) or _has_variable(pid, needle)]


def _has_limit(pid: int, limit: int) -> bool:
    try:
        return resource.prlimit(pid, resource.RLIMIT_RTTIME)[0] == limit
    except PermissionError:
        # It has changed its user. This tells all, but takes longer.
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
    """Return the pids of the processes in `groups` (where /proc tells)."""
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
            # Behind the name, which is in brackets and may hold any: the state.
            return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _end_all(groups: set[int], mark: str) -> None:
    """Kill the children; what is left of their groups, and what carries `mark`, gets SIGTERM, and a
    moment to end by itself: it may clean up after them. Then it is killed too."""
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
    # The number of a group that is empty may be another's by now.
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
    """Be the guardian, until stdin ends."""
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
