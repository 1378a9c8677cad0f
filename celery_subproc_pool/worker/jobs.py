"""A job as Celery sees it: what `apply_async` returns, and how a thread traces it.

A job knows no pool. It calls its `Owner`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError

from ..core.model import Job
from ..errors import JobAbandoned, SubprocPoolError
from ..wire.messages import Reply
from .fast_path import FastRequest
from .outcome import exception_info
from .tasks import exchanging

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

    def provide(self, job: PoolJob, line: bytes) -> None:
        """Give the engine the request line of `job`."""

    def traced(self, job: PoolJob) -> None:
        """Tell the engine that the tracing thread of `job` is done, and `job.ending` is set."""

    def unwound(self, job: PoolJob, report: Callable[[], None]) -> None:
        """Let `report` tell Celery how `job` ended. It was abandoned, and stores no more states."""

    def terminate_jobs(self, jobs: Sequence[PoolJob], signum: int | str | None) -> None:
        """End `jobs`, with the signal `signum` (default SIGTERM) for their children."""


class PoolJob(Job):
    """A job, with what Celery gave for it.

    Celery has only a weak reference to a job; `slots.Slots` keeps it alive until it is over.

    `admission.Admission` finds its group, its limits and its request later. That may fail, and then
    there must be a job that can fail.

    Arguments:
        owner: passes on to the engine what the job asks for.
        target: Celery's tracer.
        arguments: the tracer's: the task's name, its id, and the rest of the message.
        callbacks: tell Celery what becomes of the job.
    """

    __slots__ = (
        "_answer",
        "_answered",
        "_asked",
        "_owner",
        "_progress",
        "_report",
        "_storing",
        "_target",
        "arguments",
        "callbacks",
        "ending",
        "fast",
        "pid",
        "stored_before",
    )

    def __init__(
        self,
        owner: Owner,
        target: Callable[..., Any],
        arguments: Sequence[Any],
        callbacks: Callbacks,
    ) -> None:
        retries = arguments[2].get("retries")
        super().__init__(
            task_id=arguments[1],
            task_name=arguments[0],
            group=None,
            # Foreign producers send null, or leave it out.
            retries=retries if type(retries) is int else 0,
        )
        self.arguments = arguments
        self.callbacks = callbacks
        #: Its request, if it is on the fast path.
        self.fast: FastRequest | None = None
        #: Once accepted: the child's pid, or the worker's own pid for a job without a child.
        self.pid = 0
        #: Tells Celery what the tracer returned or raised. To be called at the end.
        self.ending: Callable[[], None] | None = None
        #: Whether a state was stored before the last one.
        self.stored_before = False
        self._owner = owner
        self._target = target
        self._asked = False
        self._answer: Reply | BaseException | None = None
        #: The latest progress that the child told of.
        self._progress: dict[str, Any] | None = None
        # A lock: the cheapest way to wait for another thread. It is free when there is news.
        self._answered = threading.Lock()
        self._answered.acquire()
        #: Tells Celery of the end of a job that was abandoned.
        self._report: Callable[[], None] | None = None
        # Held while the tracing thread stores a state; and forever once the job was abandoned.
        self._storing = threading.Lock()

    def terminate(self, signum: int | str | None = None) -> None:
        """End the job, as `celery.worker.request.Request.terminate` asks.

        Arguments:
            signum: the signal for its child, a number or name; SIGTERM if None.
        """
        self._owner.terminate_jobs([self], signum)

    def answer(self, answer: Reply | BaseException) -> None:
        """Give `answer` to the tracing thread, now or when it asks.

        If it is an exception, the thread raises it.
        """
        self._answer = answer
        self._wake()

    def abandon(self, report: Callable[[], None]) -> bool:
        """Unwind the tracing thread: its job has ended in another way.

        Arguments:
            report: tells Celery of that end.

        Returns:
            Whether `report` can be called now. If not, the thread is storing an earlier state, and
            the last one must come after that: the thread calls `Owner.unwound` when it is done.
        """
        self._report = report
        self.answer(JobAbandoned())
        return self._storing.acquire(blocking=False)

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Let a state before the last one be stored within this context.

        Raises:
            JobAbandoned: the job is over, and Celery knows how.
        """
        if not self._storing.acquire(blocking=False):
            raise JobAbandoned
        self.stored_before = True
        try:
            yield
        finally:
            self._storing.release()
            # After the release: the thread that gets the lock now, this or the engine's, reports.
            if self._report is not None and self._storing.acquire(blocking=False):
                self._owner.unwound(self, self._report)

    def progress(self, meta: dict[str, Any]) -> None:
        """Let the tracing thread store `meta`. It skips what is not the latest by then."""
        self._progress = meta
        self._wake()

    def _wake(self) -> None:
        # If the lock is free, the thread was woken and has not looked yet. There is no race: only
        # the engine's thread releases it.
        if self._answered.locked():
            self._answered.release()

    def exchange(self, line: bytes, on_progress: Callable[[dict[str, Any]], None]) -> Reply:
        """Give the request `line` to the child, and return its reply. Call `on_progress` with the
        latest progress that the child told of. Runs in the tracing thread.

        Raises:
            ProtocolFault: the child broke the protocol.
            JobAbandoned: the job is over, and Celery knows how.
            SubprocPoolError: it was called before: a job is one exchange.
        """
        if self._asked:
            raise SubprocPoolError(
                f"{self.task_name}[{self.task_id}] has asked its child already; a task that runs"
                " in a child can call run() once for each job"
            )
        self._asked = True
        if self._answer is None:
            self._owner.provide(self, line)
        seen = None
        while True:
            self._answered.acquire()
            if isinstance(self._answer, BaseException):
                raise self._answer
            if self._answer is not None:
                return self._answer
            if seen is not self._progress:
                seen = self._progress
                assert seen is not None
                on_progress(seen)

    def trace(self) -> Callable[[], None] | None:
        """Run Celery's tracer, which stores the result. Runs in a tracing thread.

        Returns:
            A function that tells the engine; None if the job was abandoned.
        """
        try:
            with exchanging(self):
                result = self._target(*self.arguments)
        except JobAbandoned:
            return None
        except Exception as exc:
            self.ending = partial(self.callbacks.error_callback, exception_info(exc))
        except BaseException as exc:
            # A hook has called `sys.exit`. On prefork, it would have ended its process.
            lost = WorkerLostError(f"Worker exited prematurely: {exc!r}")
            self.ending = partial(self.callbacks.error_callback, exception_info(lost))
        else:
            self.ending = partial(self.callbacks.callback, result)
        return partial(self._owner.traced, self)

    def store(self, store: Callable[[], None], reply: Reply) -> Callable[[], None] | None:
        """Call `store` for the result of a job on the fast path. Runs in a tracing thread.

        If that raises, the job falls back to the tracer, which fails it as Celery does.

        Arguments:
            store: stores the result.
            reply: the child's reply, with the result.

        Returns:
            As `trace`.
        """
        try:
            store()
        except Exception:
            self.answer(reply)
            return self.trace()
        return partial(self._owner.traced, self)
