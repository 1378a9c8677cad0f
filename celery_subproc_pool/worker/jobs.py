"""A job as Celery sees it: what `apply_async` returns, and how it is traced.

Layer: above `outcome` and `tasks`; imports Celery. Knows no pool: it is given what it calls.
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
from .fast_path import Shortcut
from .outcome import exception_info
from .tasks import exchanging

__all__ = ("Callbacks", "Owner", "PoolJob")


class Callbacks(NamedTuple):
    """What Celery wants to be told of one job, by the names that `apply_async` has for it."""

    accept_callback: Callable[[int, float], None]
    callback: Callable[[tuple[int, Any, float]], None]
    error_callback: Callable[[ExceptionInfo], None]
    timeout_callback: Callable[..., None]


class Owner(Protocol):
    """Who takes a job's wishes to the engine, from any thread."""

    def provide(self, job: PoolJob, line: bytes) -> None:
        """`job` has its request line."""

    def traced(self, job: PoolJob) -> None:
        """The tracing thread of `job` is through, and `job.ending` is set."""

    def unwound(self, job: PoolJob, report: Callable[[], None]) -> None:
        """`job`, which was abandoned, stores nothing any more: its end can be told by `report`."""

    def terminate_jobs(self, jobs: Sequence[PoolJob], signum: int | str | None) -> None:
        """`jobs` are to end."""


class PoolJob(Job):
    """A job, with what Celery gave for it.

    Celery keeps only a weak reference to it; the pool keeps it alive until it is over.

    Arguments:
        owner: takes its wishes to the engine.
        target: Celery's tracer.
        arguments: the tracer's: the task's name, its id, and the rest of the message.
        callbacks: Celery's.

    Its group, its limits and who traces it are found out later: that may fail, and then there must
    be a job that fails.
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
        "pid",
        "shortcut",
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
            # Other producers than Celery send null, or leave it out.
            retries=retries if type(retries) is int else 0,
        )
        self.arguments = arguments
        self.callbacks = callbacks
        #: How it is done, if it is a job of an external child that is not traced from the start.
        self.shortcut: Shortcut | None = None
        #: Once accepted: the child's pid, or the worker's own for a job that no child takes.
        self.pid = 0
        #: Celery's callback for what the tracer returned or raised, to be called at the end.
        self.ending: Callable[[], None] | None = None
        #: Whether a state was stored that is not its last.
        self.stored_before = False
        self._owner = owner
        self._target = target
        self._asked = False
        self._answer: Reply | BaseException | None = None
        #: The latest.
        self._progress: dict[str, Any] | None = None
        # A bare lock: the cheapest way to wait for another thread.
        self._answered = threading.Lock()
        self._answered.acquire()
        #: Tells the end of a job that was abandoned.
        self._report: Callable[[], None] | None = None
        # Taken while the tracing thread stores a state, and for good once the job was abandoned.
        self._storing = threading.Lock()

    def terminate(self, signum: int | str | None = None) -> None:
        """End the job, as `celery.worker.request.Request.terminate` asks.

        Arguments:
            signum: the signal for its child, a number or name; SIGTERM if None.
        """
        self._owner.terminate_jobs([self], signum)

    def answer(self, answer: Reply | BaseException) -> None:
        """Let the tracing thread, now or when it asks, have `answer`, or raise it."""
        self._answer = answer
        self._wake()

    def abandon(self, report: Callable[[], None]) -> bool:
        """Unwind the tracing thread, whose job has come to another end.

        Arguments:
            report: tells Celery of that end.

        Returns:
            Whether that can be done now. Otherwise the thread is storing an earlier state, which
            must not come after the last one: `Owner.unwound` is called when it has.
        """
        self._report = report
        self.answer(JobAbandoned())
        return self._storing.acquire(blocking=False)

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Within this context, a state of the job that is not its last may be stored.

        Raises:
            JobAbandoned: the job is over; its end was reported already.
        """
        if not self._storing.acquire(blocking=False):
            raise JobAbandoned
        self.stored_before = True
        try:
            yield
        finally:
            self._storing.release()
            # After the release: whoever of the two threads gets the lock now reports.
            if self._report is not None and self._storing.acquire(blocking=False):
                self._owner.unwound(self, self._report)

    def progress(self, meta: dict[str, Any]) -> None:
        """Let the tracing thread store `meta`, unless something newer comes before it can."""
        self._progress = meta
        self._wake()

    def _wake(self) -> None:
        # If it is not locked, the thread was woken and has not looked yet. Only one thread wakes
        # it: that which turns the engine.
        if self._answered.locked():
            self._answered.release()

    def exchange(self, line: bytes, on_progress: Callable[[dict[str, Any]], None]) -> Reply:
        """Give the request `line` to the child, and return its reply; call `on_progress` with the
        latest that it told of its progress. For the tracing thread.

        Raises:
            ProtocolFault: the child broke the protocol.
            JobAbandoned: the job is over; its end was reported already.
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
        """Run Celery's tracer, which stores the result. Called in a tracing thread.

        Returns:
            What tells the engine of it; None if the job was abandoned.
        """
        try:
            with exchanging(self):
                result = self._target(*self.arguments)
        except JobAbandoned:
            return None
        except Exception as exc:
            self.ending = partial(self.callbacks.error_callback, exception_info(exc))
        except BaseException as exc:
            # A hook that exits would have ended a prefork process.
            lost = WorkerLostError(f"Worker exited prematurely: {exc!r}")
            self.ending = partial(self.callbacks.error_callback, exception_info(lost))
        else:
            self.ending = partial(self.callbacks.callback, result)
        return partial(self._owner.traced, self)
