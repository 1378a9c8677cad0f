"""The exceptions of this package. Bottom layer: imports nothing of ours."""

from __future__ import annotations

from typing import Any

__all__ = (
    "CallError",
    "ChildTaskError",
    "ConfigError",
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
    """Base of every error that this package raises on purpose."""


class ConfigError(SubprocPoolError):
    """A setting is wrong. The message names its path, what was expected and what came."""


class SpawnError(SubprocPoolError):
    """A child process could not be started. The message names the setting to look at."""


class ProtocolFault(SubprocPoolError):
    """A child wrote what the protocol does not allow. The message quotes it."""


class RequestEncodeError(SubprocPoolError):
    """A task's arguments can't be written as JSON. The message names the argument."""


class CallError(SubprocPoolError):
    """A callable that is no task can't be called in a Python child. The message says why."""


class TaskMemoryError(SubprocPoolError):
    """A task in a Python child raised `MemoryError`.

    Not a `MemoryError` itself: Celery raises one that it is told of again, in the worker, which
    would end (celery/worker/request.py: `Request.on_failure`).
    """


class NotInWorkerError(SubprocPoolError):
    """A task that runs in an external child was called where there is no such child."""


class PoisonousTaskError(SubprocPoolError):
    """A job has cost as many children as it may (`max_crashes`); its message was rejected.

    Not billiard's `WorkerLostError`: Celery would have that one delivered again.
    """


class TransitionError(SubprocPoolError):
    """A child was moved to a state that its state does not lead to: a bug of this package."""


class ChildTaskError(SubprocPoolError):
    """A job failed in a healthy child, which replied ``error`` (or ``retry`` once too often).

    Its text is the message, behind the type if the child told one: ``CardError: no such card``.

    A client that reads a JSON result has the text alone: as `message`, with `type` and `traceback`
    None. The child's traceback stands in the result's own (`AsyncResult.traceback`). In the worker,
    and through pickle, all three are there.

    Arguments:
        message: what the child said.
        type: the name of the child's own exception type, if it told.
        traceback: the child's own traceback as text, if it told. It is shown as the cause
            of this exception, so that it stands in the worker's log and in the stored result.
    """

    def __init__(self, message: str, type: str | None = None, traceback: str | None = None) -> None:
        # One text: `args` is all that JSON results keep, and a client that has not imported this
        # class shows them as they are.
        super().__init__(f"{type}: {message}" if type else message)
        self.message = message
        self.type = type
        self.traceback = traceback
        if traceback:
            self.__cause__ = _ChildTraceback(traceback)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.__class__, (self.message, self.type, self.traceback), self.__dict__


class _ChildTraceback(Exception):
    """Carries a child's traceback text as the cause of a `ChildTaskError`."""

    def __str__(self) -> str:
        return f"\n{str(self.args[0]).rstrip()}"


class JobAbandoned(BaseException):
    """Unwinds the tracing thread of a job whose end was already reported to Celery.

    Not an `Exception`: Celery's tracer stores the outcome of every `Exception`, and a lost,
    timed-out or terminated job has its outcome already.
    """
