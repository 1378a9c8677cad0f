"""Write an external child in Python.

    from celery_subproc_pool.serve import Throttled, serve

    def charge(amount, currency="EUR"):
        if not budget_left():
            raise Throttled(seconds=30)
        return {"charged": amount, "currency": currency}

    serve({"billing.charge": charge})

This is one file for Python 3.6 or newer. It needs only the standard library, and nothing of the
package around it. Import it where the package is installed, or copy it next to a program that runs
on another interpreter.

The wire is protected. While your functions run, descriptor 1 is stderr and descriptor 0 is empty:
a ``print``, a C library or a subprocess can't put a stray line between two replies. That holds from
the call of ``serve`` on. A ``print`` before that call is safe too if Python buffers its output,
that is, without ``-u`` and ``PYTHONUNBUFFERED``.
"""

import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any, BinaryIO, Callable, Dict, Mapping, Optional, Tuple, Type, Union

__all__ = ["Ignore", "Reject", "Retry", "Throttled", "UnknownTask", "serve"]

Payload = Dict[str, Any]
Reply = Dict[str, Any]

#: A hundred years. The worker refuses more.
_MAX_SECONDS = 100 * 365 * 86400


class _Outcome(Exception):
    """How a job ended, if with neither a result nor an error."""

    def reply(self) -> Reply:
        """Return the reply to send, without its id."""
        raise NotImplementedError


class Throttled(_Outcome):
    """Not now. Celery publishes the job again, and counts neither a failure nor a retry."""

    def __init__(self, seconds: Optional[float] = None) -> None:
        """Ask for the job again in *seconds* (0 or more; by default the worker waits 60)."""
        super().__init__("throttled")
        self.seconds = _delay(seconds, "seconds")

    def reply(self) -> Reply:
        """Return the reply to send, without its id."""
        return _present(status="throttled", retry_after_secs=self.seconds)


class Retry(_Outcome):
    """The job failed and is worth another try. It counts against the task's ``max_retries``."""

    def __init__(self, countdown: Optional[float] = None, message: Optional[str] = None) -> None:
        """Ask for another try.

        *countdown* is in seconds; the default is the task's own. *message* says why it failed.
        """
        super().__init__(message or "retry")
        self.countdown = _delay(countdown, "countdown")
        self.message = None if message is None else _plain(str(message))

    def reply(self) -> Reply:
        """Return the reply to send, without its id."""
        return _present(status="retry", countdown=self.countdown, message=self.message)


class Reject(_Outcome):
    """Give the message back to the broker, which queues it again with ``requeue=True``."""

    def __init__(self, requeue: bool = False) -> None:
        super().__init__("reject")
        self.requeue = bool(requeue)

    def reply(self) -> Reply:
        """Return the reply to send, without its id."""
        return _present(status="reject", requeue=self.requeue)


class Ignore(_Outcome):
    """The job is done. Celery stores no result."""

    def __init__(self) -> None:
        super().__init__("ignore")

    def reply(self) -> Reply:
        """Return the reply to send, without its id."""
        return _present(status="ignore")


class UnknownTask(Exception):
    """The worker asked for a task that this child doesn't serve."""


def serve(tasks: Union[Mapping[str, Callable[..., Any]], Callable[[Payload], Any]]) -> None:
    """Answer requests until the worker closes stdin, then return.

    *tasks* maps task names to functions, which get the task's own arguments. Or it is one function,
    which gets the whole payload of every request.

    What a function returns is the task's result. What it raises becomes an error reply, and the
    child goes on. ``SystemExit`` and ``KeyboardInterrupt`` end the process, and the job is lost.
    A request that can't be read ends the process with status 2.
    """
    run = _dispatcher(tasks)
    requests, replies = take_wire()
    _ignore_ctrl_c()
    with requests:
        for line in requests:
            task_id, payload = _parse(line)
            reply = _encode(task_id, _outcome(run, payload))
            flush_prints()
            try:
                write_all(replies, reply)
            except BrokenPipeError:
                return  # the worker is gone


def _dispatcher(
    tasks: Union[Mapping[str, Callable[..., Any]], Callable[[Payload], Any]],
) -> Callable[[Payload], Any]:
    if not isinstance(tasks, Mapping):
        if not callable(tasks):
            raise TypeError("serve() takes a function or a mapping of task names to functions")
        return tasks
    functions = dict(tasks)

    def run(payload: Payload) -> Any:
        name = payload.get("task", "")
        function = functions.get(name)
        if function is None:
            served = ", ".join(sorted(functions)) or "nothing"
            raise UnknownTask(f"no task {name!r} here; this child serves {served}")
        return function(*payload.get("args") or (), **payload.get("kwargs") or {})

    return run


def take_wire() -> Tuple[BinaryIO, int]:
    """Move the pipes away from descriptors 0 and 1.

    Return the stream of requests and the descriptor for replies. Descriptor 0 is empty then, and
    descriptor 1 is stderr.
    """
    # A subprocess doesn't inherit what dup() and open() return. It inherits what dup2() makes.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 0)
    try:
        os.dup2(2, 1)
    except OSError:  # stderr is closed
        os.dup2(devnull, 1)
    os.close(devnull)
    return requests, replies


def _ignore_ctrl_c() -> None:
    """Leave a terminal's Ctrl-C to the worker. It closes our stdin when this process must end."""
    with suppress(ValueError):  # not the main thread, so the signal is not ours to set
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _parse(line: bytes) -> Tuple[str, Payload]:
    try:
        request = json.loads(line.decode("utf-8"))
        task_id, payload = request["id"], request["payload"]
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise _give_up(line, f"{type(exc).__name__}: {exc}") from None
    if not isinstance(task_id, str) or not isinstance(payload, dict):
        raise _give_up(line, "its id must be a string and its payload an object")
    return task_id, payload


def _give_up(line: bytes, why: str) -> SystemExit:
    """Say why on stderr. Without an id there is no job to answer, and the next lines may be bad."""
    sys.stderr.write(f"serve: not a request ({_plain(why)}): {line[:200]!r}\n")
    sys.stderr.flush()
    return SystemExit(2)


def _outcome(run: Callable[[Payload], Any], payload: Payload) -> Reply:
    try:
        return _present(status="ok", result=run(payload))
    except (SystemExit, KeyboardInterrupt):
        raise
    except _Outcome as outcome:
        return outcome.reply()
    except BaseException as exc:  # time-outs and cancellations of some libraries are no Exception
        return _error(exc)


def _error(exc: BaseException) -> Reply:
    try:
        message = str(exc)
    except Exception as broken:  # an exception's own __str__ may raise
        message = f"(its message can't be shown: {type(broken).__name__})"
    # The first frames are this file's. They say nothing about the job.
    frames = exc.__traceback__
    while frames is not None and frames.tb_frame.f_globals is globals():
        frames = frames.tb_next
    try:
        text = "".join(traceback.format_exception(type(exc), exc, frames))
    except Exception:
        text = ""
    reply = {"message": message, "type": _qualified_name(type(exc)), "traceback": text}
    return dict({key: _plain(value) for key, value in reply.items()}, status="error")


def _encode(task_id: str, reply: Reply) -> bytes:
    try:
        return _line(task_id, reply)
    except Exception as exc:  # a type JSON lacks, a cycle, NaN, a lone surrogate, a tuple as key
        kind = _qualified_name(type(reply.get("result")))
        why = f"JSON can't hold the result, {kind}: {exc}"
        return _line(task_id, {"status": "error", "message": _plain(why), "type": "TypeError"})


def _line(task_id: str, reply: Reply) -> bytes:
    message = dict({"id": task_id}, **reply)
    text = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8") + b"\n"


def flush_prints() -> None:
    """Show what the job printed before its reply is sent. Errors are not the job's fault."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # None, closed, without a reader, or an object of the job's
            stream.flush()


def write_all(descriptor: int, line: bytes) -> None:
    """Write all of *line*. Wait while the pipe is full."""
    left = memoryview(line)
    while left:
        left = left[os.write(descriptor, left) :]


def _present(**fields: Any) -> Reply:
    return {key: value for key, value in fields.items() if value is not None}


def _delay(seconds: Optional[float], name: str) -> Optional[float]:
    if seconds is None:
        return None
    if not 0 <= seconds <= _MAX_SECONDS:
        raise ValueError(f"{name} must be between 0 and {_MAX_SECONDS}, not {seconds!r}")
    return float(seconds)


def _qualified_name(cls: Type[Any]) -> str:
    if cls.__module__ in ("builtins", "__main__"):
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"


def _plain(text: str) -> str:
    """Escape lone surrogates, which UTF-8 can't hold (for example from an odd file name)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
