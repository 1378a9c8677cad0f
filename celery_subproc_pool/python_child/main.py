"""A Python child: a fresh interpreter that loads the worker's project and runs its tasks.

Run as ``python -m celery_subproc_pool.python_child.main``. The first line of its stdin is a
`wire.python.Boot`, every later one a `wire.python.TaskRequest`.

The top of this module must not import the project, Celery or msgspec. First the wire is made safe:
descriptor 0 is empty and descriptor 1 is stderr from then on, whatever the project does to them.
Then the search path of the boot line counts.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn, Protocol

from ..serve import flush_prints, take_wire, write_all
from ..wire.environment import FIRST, SLOT, STDERR, STDOUT
from .frames import is_ours
from .template import audit, serve_forks, template_socket

__all__ = ("boot_and_serve", "main")


class Server(Protocol):
    """Does jobs."""

    @property
    def features(self) -> Sequence[str]:
        """What to announce in the handshake."""

    def serve(self) -> NoReturn:
        """Do jobs until there will be no more, and exit."""


def main() -> NoReturn:
    """Boot, then serve jobs until stdin ends."""
    boot_and_serve("SubprocPoolWorker", _child)


def _child(*arguments: Any) -> Server:
    from .serving import Child

    return Child(*arguments)


def boot_and_serve(
    name: str, make: Callable[..., Server], prepare: Callable[[Any], None] | None = None
) -> NoReturn:
    """Boot, then serve jobs until stdin ends.

    Arguments:
        name: of this kind of process, for logs and `ps`.
        make: is called when the project is loaded, with the app, the boot line, the stream of
            requests and the descriptor for replies. What it returns serves.
        prepare: is called with the app before Celery's tracers are built.
    """
    requests, replies = take_wire()
    stdout, stderr = _inherited(STDOUT), _inherited(STDERR)
    orders = template_socket()
    try:
        boot = _read_boot(requests)
        _enter_project(boot)
        from . import loading

        title = name if orders is None else f"{name}Template"
        loading.name_process(title, boot.hostname, int(os.environ.get(SLOT, "0")))
        first = os.environ.pop(FIRST, None) is not None
        app = loading.load(boot, first, prepare, orders is not None)
        if orders is not None:
            requests.close()
            why_not = audit(orders, boot.not_forkable) if boot.audits else None
            birth = serve_forks(orders, replies, why_not)
            # This is a forked child.
            requests, replies = os.fdopen(birth.requests, "rb"), birth.replies
            stdout, stderr = birth.stdout, birth.stderr
            os.environ[SLOT] = str(birth.slot)
            loading.name_process(name, boot.hostname, birth.slot)
            loading.after_fork()
        loading.begin(app, boot, forked=orders is not None)
        child = make(app, boot, requests, replies)
    except Exception as exc:
        _say(replies, status="fatal", message=_why(exc))
        sys.exit(1)
    _take_over(stdout, stderr)
    try:
        _say(replies, status="ready", protocol=1, pid=os.getpid(), features=child.features)
    except BrokenPipeError:
        # The worker is gone.
        sys.exit(0)
    child.serve()


def _inherited(name: str) -> int | None:
    """Return the descriptor in the environment variable `name`: the worker's stdout or stderr.

    The child writes there only after its boot. During the boot the worker reads what the child
    writes, to know why a boot failed.
    """
    descriptor = os.environ.pop(name, None)
    try:
        if descriptor is not None:
            os.set_inheritable(int(descriptor), False)
            return int(descriptor)
    except OSError:
        # A wrapper has closed it. The worker then goes on reading what the child writes.
        pass
    return None


def _read_boot(requests: BinaryIO) -> Any:
    line = requests.readline()
    if not line:
        # The worker is gone, or a person runs this by hand.
        sys.exit("a program of celery_subproc_pool: the pool starts it and sends it jobs on stdin")
    from ..wire.python import decode_boot

    return decode_boot(line)


def _enter_project(boot: Any) -> None:
    """Take over the worker's search path and command line."""
    sys.path[:] = boot.path if boot.whole_path else _in_front(boot.path, sys.path)
    sys.argv[:] = boot.argv
    if boot.main_path is not None:
        # With this, Celery names the tasks of such a file as in the worker
        # (celery/utils/imports.py).
        os.environ["MP_MAIN_FILE"] = boot.main_path


def _in_front(first: list[str], then: list[str]) -> list[str]:
    return [*first, *(entry for entry in then if entry not in first)]


def _take_over(stdout: int | None, stderr: int | None) -> None:
    """Write to the worker's streams from now on. Without its stdout, all goes to its stderr."""
    # What the boot has printed belongs to the boot's output.
    flush_prints()
    if stdout is None:
        stdout = stderr
    for ours, workers in ((1, stdout), (2, stderr)):
        if workers is not None:
            os.dup2(workers, ours)
    for workers in {stdout, stderr} - {None}:
        assert workers is not None
        os.close(workers)
    if sys.stdout is not None and os.isatty(1):
        # It was a pipe when Python started, so Python buffers it.
        with suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _why(exc: Exception) -> str:
    """Return what went wrong: in one line, then with the traceback."""
    frames = exc.__traceback__
    # The first frames are ours. They say nothing about the project.
    while frames is not None and is_ours(frames.tb_frame):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(exc), exc, frames))
    summary = f"{type(exc).__name__}: {exc}".replace("\n", " ")
    message = f"{sys.executable} can't load the app: {summary}\n{text}"
    return message.encode("utf-8", "backslashreplace").decode()


def _say(descriptor: int, **fields: Any) -> None:
    write_all(descriptor, json.dumps(fields).encode() + b"\n")


if __name__ == "__main__":
    main()
