"""A Python child: a fresh interpreter that loads the worker's project and runs its tasks.

Run as ``python -m celery_subproc_pool.python_child.main``. The first line of its stdin is a
`wire.python.Boot`, every other a `wire.python.TaskRequest`.

Nothing of the project, and nothing of Celery, is imported before the wire is safe: from then on,
descriptor 0 is empty and descriptor 1 is stderr, whatever user code does to them.
"""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from ..serve import flush_prints, take_wire, write_all

__all__ = ("main",)

#: As `supervisor.SLOT`, `child.STDOUT` and `child.STDERR`, which this does not import.
_SLOT = "CELERY_SUBPROC_POOL_SLOT"
_STDOUT = "CELERY_SUBPROC_POOL_STDOUT"
_STDERR = "CELERY_SUBPROC_POOL_STDERR"
#: As `supervisor.FIRST`.
_FIRST = "CELERY_SUBPROC_POOL_FIRST"


#: Seconds that a child's last words may take.
LAST_WORDS = 0.5


def main() -> NoReturn:
    """Be a child, until stdin ends."""
    requests, replies = take_wire()
    stdout, stderr = _workers(_STDOUT), _workers(_STDERR)
    try:
        boot = _read_boot(requests)
        sys.path[:] = boot.path if boot.whole_path else _in_front(boot.path, sys.path)
        sys.argv[:] = boot.argv
        if boot.main_path is not None:
            # Celery names the tasks of such a file as the worker does (celery/utils/imports.py).
            os.environ["MP_MAIN_FILE"] = boot.main_path
        from . import loading

        first = os.environ.pop(_FIRST, None) is not None
        app = loading.load(boot, int(os.environ.get(_SLOT, "0")), first)
    except Exception as exc:
        _say(replies, status="fatal", message=_why(exc))
        sys.exit(1)
    _take_over(stdout, stderr)
    child = _Child(app, boot.hostname, requests, replies, boot.exit_grace)
    try:
        _say(replies, status="ready", protocol=1, pid=os.getpid())
    except BrokenPipeError:
        # The worker is gone.
        sys.exit(0)
    child.serve()


def _workers(name: str) -> int | None:
    """Return the descriptor of the worker's own stdout or stderr, to be ours once we have booted:
    until then the worker reads what we write, to know why we could not."""
    descriptor = os.environ.pop(name, None)
    try:
        if descriptor is not None:
            os.set_inheritable(int(descriptor), False)
            return int(descriptor)
    except OSError:
        # A wrapper has closed it: it stays with the worker's reading.
        pass
    return None


def _take_over(stdout: int | None, stderr: int | None) -> None:
    """Let what we write go where it goes in the worker; all to its stderr if it has no stdout."""
    # What the boot has printed stands with the boot's words.
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
        # Python took it for a pipe when it started.
        with suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _read_boot(requests: BinaryIO) -> Any:
    line = requests.readline()
    if not line:
        # The worker is gone, or a person tries it by hand.
        sys.exit(
            "celery_subproc_pool.python_child.main: started by the pool, it reads jobs from stdin"
        )
    from ..wire.python import decode_boot

    return decode_boot(line)


def _in_front(first: list[str], then: list[str]) -> list[str]:
    return [*first, *(entry for entry in then if entry not in first)]


def _why(exc: Exception) -> str:
    """Return what went wrong: first in one line, then with all that Python has to say."""
    frames = exc.__traceback__
    # The first frames are ours, and tell nothing of the project.
    while frames is not None and frames.tb_frame.f_globals.get("__package__") == __package__:
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(exc), exc, frames))
    summary = f"{type(exc).__name__}: {exc}".replace("\n", " ")
    message = f"{sys.executable} can't load the app: {summary}\n{text}"
    return message.encode("utf-8", "backslashreplace").decode()


def _say(descriptor: int, **fields: Any) -> None:
    write_all(descriptor, json.dumps(fields).encode() + b"\n")


class _Child:
    """Runs one job after the other.

    Arguments:
        app: the project's app.
        hostname: the worker's node name.
        requests: where requests come from.
        replies: the descriptor for replies.
        exit_grace: seconds that what is registered with `atexit` may take.
    """

    def __init__(
        self, app: Any, hostname: str, requests: BinaryIO, replies: int, exit_grace: float
    ) -> None:
        # Not at the top of the module: see there. Not for each job either: it costs.
        from celery.app.trace import fast_trace_task

        from ..wire import python
        from . import codec
        from .soft_limits import SoftLimits

        self._app = app
        self._hostname = hostname
        self._requests = requests
        self._replies = replies
        self._exit_grace = exit_grace
        self._trace = fast_trace_task
        self._limits = SoftLimits(fast_trace_task, codec.task_arguments, self._require)
        self._codec = codec
        self._decode = python.decode_request
        self._working = False
        self._pid = os.getpid()
        signal.signal(signal.SIGUSR1, self._on_soft_limit)

    def serve(self) -> NoReturn:
        """Do jobs until stdin ends, or a job ends the process."""
        status = 0
        try:
            self._serve()
        except BrokenPipeError:
            # The worker is gone, and nobody is left to answer.
            pass
        except SystemExit as exc:
            status = _exit_status(exc)
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            self._exit(status)

    def _serve(self) -> None:
        encode_end = self._codec.encode_end
        for line in self._requests:
            request = self._decode(line)
            self._limits.begin()
            end = self._run(request)
            if os.getpid() != self._pid:
                # A task forked, and its copy of this process came back here.
                os._exit(0)
            flush_prints()
            write_all(self._replies, encode_end(self._app, request.id, end))

    def _run(self, request: Any) -> Any:
        codec = self._codec
        end = None
        try:
            self._working = True
            try:
                if request.payload.call is None:
                    self._require(request.payload.task)
                    end = codec.End(False, self._trace(*codec.task_arguments(request)))
                else:
                    end = codec.End(False, codec.call(request), returned=True)
            finally:
                self._working = False
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:
            # A soft limit that came when the trace had ended changes nothing any more.
            if end is None:
                return codec.End(True, codec.ExceptionInfo())
        return end

    def _require(self, name: str) -> None:
        if name not in self._app.tasks:
            from celery.exceptions import NotRegistered

            raise NotRegistered(
                f"{name}: the worker knows this task and its Python children do not. Define it in a"
                " module that loading the app imports"
            )

    def _on_soft_limit(self, signum: int, frame: FrameType | None) -> None:
        # One that comes between two jobs was meant for the one that just ended.
        if self._working:
            self._limits.reached(frame)

    def _exit(self, status: int) -> NoReturn:
        """End as a process of prefork does, whatever threads the tasks have left; but let agents
        send first what they have queued."""
        from celery import signals

        try:
            signals.worker_process_shutdown.send(
                sender=self._hostname, pid=self._pid, exitcode=status
            )
            _run_exit_handlers(self._exit_grace, status)
            flush_prints()
        finally:
            os._exit(status)


def _run_exit_handlers(grace: float, status: int) -> None:
    """Run what is to run when an interpreter ends, in its order: the ends of executors, for whose
    processes `multiprocessing` would wait; then what is registered with `atexit`, that of agents
    that queue, and at last, for it was the first, `logging.shutdown`.

    If it is not done after `grace` seconds, exit.
    """
    timer = threading.Timer(grace, _leave, (grace, status))
    timer.daemon = True
    timer.start()
    # What has a name of `threading`'s own also waits for threads, and those may never end.
    for end in reversed(getattr(threading, "_threading_atexits", ())):
        try:
            end()
        except Exception:
            traceback.print_exc()
    atexit._run_exitfuncs()
    timer.cancel()


def _leave(grace: float, status: int) -> None:
    try:
        teller = threading.Thread(target=_tell_overdue, args=(grace,), daemon=True)
        teller.start()
        # Logging may be what hangs.
        teller.join(LAST_WORDS)
        # They work for this process, unlike programs that it has started.
        for process in multiprocessing.active_children():
            process.terminate()
    finally:
        os._exit(status)


def _tell_overdue(grace: float) -> None:
    logging.getLogger("celery_subproc_pool").warning(
        "Child with pid %d: what is registered with atexit is not done after %g s"
        " (subproc_pool.python.exit_grace); the child ends without it",
        os.getpid(),
        grace,
    )


def _exit_status(exc: SystemExit) -> int:
    """Return the exit status that Python would give."""
    if exc.code is None:
        return 0
    if isinstance(exc.code, int):
        return exc.code & 0xFF
    print(exc.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
