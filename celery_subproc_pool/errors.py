"""The exceptions of this package."""

from __future__ import annotations

from typing import Any

__all__ = (
    "CallError",
    "ChildTaskError",
    "ConfigError",
    "CoroutineCancelledError",
    "JobAbandoned",
    "NotInWorkerError",
    "PoisonousTaskError",
    "ProtocolFault",
    "RequestEncodeError",
    "SpawnError",
    "SubprocPoolError",
    "TaskMemoryError",
    "TransitionError",
)


class SubprocPoolError(Exception):
    """The base of the errors that this package raises."""


class ConfigError(SubprocPoolError):
    """A setting is wrong. The message names its path, what was expected and what came."""


class SpawnError(SubprocPoolError):
    """A child process could not be started. The message names the setting to look at."""


class ProtocolFault(SubprocPoolError):
    """A child wrote what the protocol does not allow. The message quotes it."""


class RequestEncodeError(SubprocPoolError):
    """A task's arguments can't be written as JSON. The message names the argument."""


class CallError(SubprocPoolError):
    """A callable that is not a task can't be called in a Python child. The message says why."""


class TaskMemoryError(SubprocPoolError):
    """A task in a Python child raised `MemoryError`.

    It is no `MemoryError`: Celery would raise that again in the worker, and the worker would end
    (celery/worker/request.py: `Request.on_failure`).
    """


class NotInWorkerError(SubprocPoolError):
    """A task that runs in an external child was called outside a worker that has such children."""


class CoroutineCancelledError(SubprocPoolError):
    """The coroutine of a task was cancelled, but not by a time limit or a revoke.

    It takes the place of `asyncio.CancelledError`, which is no `Exception`: Celery's tracer would
    store nothing.
    """


class PoisonousTaskError(SubprocPoolError):
    """A job has crashed as many children as `max_crashes` allows. Its message was rejected.

    It is no `WorkerLostError` of billiard's: Celery would have the message delivered again.
    """


class TransitionError(SubprocPoolError):
    """A job or child was moved to a state that can't follow its own. This is a bug of this
    package."""


class ChildTaskError(SubprocPoolError):
    """A job failed in a healthy child: it replied ``error``, or ``retry`` more often than allowed.

    The text is ``type: message``, for example ``CardError: no such card``, or the message alone.

    In the worker, and after pickle, all three attributes are set. A client that reads a JSON result
    has only the text: as `message`, with `type` and `traceback` None. The child's traceback is then
    in `AsyncResult.traceback`.

    Arguments:
        message: the child's message.
        type: the name of the child's own exception type, or None.
        traceback: the child's own traceback as text, or None. It becomes the cause of this
            exception, so that the worker's log and the stored result show it.
    """

    def __init__(self, message: str, type: str | None = None, traceback: str | None = None) -> None:
        # One text: JSON results keep only `args`, and a client that has not imported this class
        # shows them unchanged.
        super().__init__(f"{type}: {message}" if type else message)
        self.message = message
        self.type = type
        self.traceback = traceback
        if traceback:
            self.__cause__ = _ChildTraceback(traceback)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.__class__, (self.message, self.type, self.traceback), self.__dict__


class _ChildTraceback(Exception):
    """Holds a child's traceback as text, as the cause of a `ChildTaskError`."""

    def __str__(self) -> str:
        return f"\n{str(self.args[0]).rstrip()}"


class JobAbandoned(BaseException):
    """Unwinds the trace of a job whose outcome Celery already knows.

    It is no `Exception`: Celery's tracer stores the outcome of every `Exception`, and a lost,
    timed-out or terminated job already has its outcome.
    """
