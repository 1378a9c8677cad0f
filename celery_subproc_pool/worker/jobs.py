"""A job as Celery sees it: what `apply_async` returns.

A job knows no pool. It calls its `Owner`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from billiard.einfo import ExceptionInfo

from ..core.model import Job
from ..wire.messages import Reply
from .fast_path import FastRequest

__all__ = ("Callbacks", "Owner", "PoolJob")


class Callbacks(NamedTuple):
    """What tells Celery of one job, by the names that `apply_async` has for it."""

    #: Called with the child's pid and the monotonic time, when a child has the job.
    accept_callback: Callable[[int, float], None]
    #: Called with the tracer's ``(failed, retval, runtime)``; or with what another callable
    #: returned, as JSON has it, or its repr if JSON can't have it.
    callback: Callable[[tuple[int, Any, float]], None]
    #: Called if the tracer could not finish, or if another callable has raised.
    error_callback: Callable[[ExceptionInfo], None]
    #: Called with the keywords ``soft`` and ``timeout``, when a time limit is over.
    timeout_callback: Callable[..., None]


class Owner(Protocol):
    """Passes on to the engine what a job asks for, from any thread."""

    def terminate_jobs(self, jobs: Sequence[PoolJob], signum: int | str | None) -> None:
        """End `jobs`, with the signal `signum` (default SIGTERM) for their children."""


class PoolJob(Job):
    """A job, with what Celery gave for it.

    Celery has only a weak reference to a job; `slots.Slots` keeps it alive until it is over.

    `admission.Admission` finds its group, its limits and its request later. That may fail, and then
    there must be a job that can fail.

    Arguments:
        owner: passes on to the engine what the job asks for.
        arguments: the tracer's: the task's name, its id, and the rest of the message.
        callbacks: tell Celery what becomes of the job.
    """

    __slots__ = ("_owner", "arguments", "callbacks", "ending", "fast", "pid", "probes")

    def __init__(self, owner: Owner, arguments: Sequence[Any], callbacks: Callbacks) -> None:
        retries = arguments[2].get("retries")
        super().__init__(
            task_id=arguments[1],
            task_name=arguments[0],
            group="",
            # Foreign producers send null, or leave it out.
            retries=retries if type(retries) is int else 0,
        )
        self.arguments = arguments
        self.callbacks = callbacks
        #: Its request, if it is on the fast path.
        self.fast: FastRequest | None = None
        #: The child's pid, once accepted.
        self.pid = 0
        #: If it ended before its trace: tells Celery of that, when the trace is over. To be called
        #: with what the tracer said at last.
        self.ending: Callable[[Reply | None], None] | None = None
        #: Whether a tracer is to look whether the result backend answers, before `ending`.
        self.probes = False
        self._owner = owner

    def terminate(self, signum: int | str | None = None) -> None:
        """End the job, as `celery.worker.request.Request.terminate` asks.

        Arguments:
            signum: the signal for its child, a number or name; SIGTERM if None.
        """
        self._owner.terminate_jobs([self], signum)
