"""Kills every child's process group when the worker dies, however it dies.

Layer: standard library only; imports nothing of ours. Run as a script, it is the guardian: it
reads the children's pids from its stdin. When that ends, because the worker was killed or is
through with its children, it kills their groups, and whatever else carries the worker's mark in its
environment: what a child has started in a session of its own ends with the worker.
`Guardian` is the worker's end of it.

PR_SET_CHILD_SUBREAPER and PDEATHSIG do not do: the latter fires when the *thread* that spawned
a child ends, and neither reaches grandchildren.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress

__all__ = ("MARK", "Guardian")

#: The environment variable that marks all processes that descend from one worker's pool.
MARK = "CELERY_SUBPROC_POOL_WORKER"

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
        """Have the process group `pid` killed if the worker dies."""
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


def _marked(mark: str) -> list[int]:
    """Return the pids of the processes whose environment carries `mark` (where /proc tells)."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        try:
            with open(f"/proc/{name}/environ", "rb") as environ:
                if needle in environ.read().split(b"\0"):
                    found.append(int(name))
        except (OSError, ValueError):
            continue
    return found


def _kill_all(groups: set[int], mark: str) -> None:
    for pid in groups:
        with suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
    # Twice: a process may fork while the list is read.
    for _ in range(2):
        for pid in _marked(mark):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


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
    _kill_all(groups, sys.argv[1])


if __name__ == "__main__":
    main()
