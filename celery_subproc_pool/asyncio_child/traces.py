"""The trace of a task whose body is a coroutine: its greenlet waits while the coroutine runs.

The coroutine runs as an asyncio task in the context of its trace. Both see the same context
variables: receivers of `task_prerun` set them for the coroutine, too.
"""

from __future__ import annotations

import asyncio
import builtins
import contextvars
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import ContextVar
from types import NoneType
from types import coroutine as generator_coroutine
from typing import Any, ClassVar

from billiard.exceptions import SoftTimeLimitExceeded
from celery.utils.log import get_logger
from greenlet import getcurrent

from ..errors import CoroutineCancelledError
from ..python_child.coroutines import run_to_end
from ..python_child.frames import is_ours
from ..python_child.traces import Trace, current_trace

__all__ = ("CURRENT", "CoroutineTrace", "await_in_trace")

logger = get_logger(__name__)

#: Python 3.10 has none.
_Group: Any = getattr(builtins, "BaseExceptionGroup", ())


class SoftLimitReached(SoftTimeLimitExceeded, asyncio.CancelledError):
    """Is raised in a coroutine when the soft time limit of its job is over.

    For the task it is Celery's exception. For asyncio it is also a cancellation: a `TaskGroup` that
    sees it ends its tasks and waits for them, and lets it pass.
    """


# What logs and tracebacks show is what users know.
SoftLimitReached.__name__ = SoftLimitReached.__qualname__ = SoftTimeLimitExceeded.__name__
SoftLimitReached.__module__ = SoftTimeLimitExceeded.__module__


#: The trace that runs in this context.
CURRENT: ContextVar[CoroutineTrace | None] = ContextVar("CURRENT", default=None)


class CoroutineTrace(Trace):
    """One job.

    `soft_limit` and `cancel` are called in the greenlet of the loop, as `begin` is.

    Arguments:
        arguments: Celery's tracer's.
        loop: the event loop. It runs in the greenlet that calls `begin`.
        on_return: is called in the greenlet of the loop when the trace has gone on and waits again,
            or is over.
    """

    #: The trace whose synchronous code runs now: hooks, receivers of signals, the result backend.
    at_work: ClassVar[CoroutineTrace | None] = None
    #: Is awaited when a coroutine has failed.
    after_failure: ClassVar[Callable[[], Awaitable[None]] | None] = None

    def __init__(
        self,
        arguments: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        on_return: Callable[[CoroutineTrace], None],
    ) -> None:
        super().__init__(arguments)
        self._loop = loop
        self._on_return = on_return
        #: What runs the coroutine.
        self._task: asyncio.Task[_Ended] | None = None
        #: Whether the coroutine is to get the soft limit when it goes on.
        self._soft_limit_over = False
        self._interruptible = False
        #: Whether the job is over for the worker.
        self.cancelled = False

    # -- in the greenlet of the loop

    def start(self, idle: list[Any]) -> None:
        """Begin, in one of the `idle` greenlets."""
        self._let_run(lambda: self.begin(idle))

    def soft_limit(self) -> None:
        """Raise `SoftTimeLimitExceeded` in the coroutine. What it awaits is cancelled first."""
        if self._task is not None and self._interruptible and not self.cancelled:
            self._soft_limit_over = True
            self._task.cancel()

    def cancel(self) -> None:
        """Cancel the coroutine. The trace is unwound when it has ended, and stores nothing."""
        if not self.cancelled and self._task is not None:
            self.cancelled = True
            self._task.cancel()

    def _resume(self, task: asyncio.Task[_Ended]) -> None:
        """Go on with the trace: its coroutine has ended."""
        if self.cancelled:
            if not task.cancelled():
                # Nobody takes its result.
                task.exception()
            self._let_run(self.abandon)
        else:
            self._let_run(lambda: self.go_on(task))

    def _let_run(self, switch: Callable[[], None]) -> None:
        """Let the trace go on by `switch`. What it runs is synchronous: no event loop must be
        there for it to see (Django refuses to use a database then), or in its way."""
        asyncio._set_running_loop(None)
        CoroutineTrace.at_work = self
        try:
            switch()
        finally:
            CoroutineTrace.at_work = None
            asyncio._set_running_loop(self._loop)
        self._on_return(self)

    # -- in the greenlet of the trace

    def run(self) -> None:
        """Trace the job."""
        CURRENT.set(self)
        super().run()

    def await_(self, coroutine: Coroutine[Any, Any, Any], interruptible: bool) -> Any:
        """Wait until `coroutine` has ended; return its result.

        Arguments:
            coroutine: the body of the task, or a hook.
            interruptible: whether a soft limit may be raised there.

        Raises:
            SoftTimeLimitExceeded: the soft limit ended it.
            CoroutineCancelledError: it was cancelled, and not by us.
            JobAbandoned: the job is over, and Celery knows how.
            BaseException: what it raises.
        """
        self._interruptible = interruptible
        self._task = task = self._make_task(coroutine)
        task.add_done_callback(self._resume)
        try:
            self.wait()
        finally:
            self._task = None
            over, self._soft_limit_over = self._soft_limit_over, False
            if task.cancelled():
                # Before it had begun.
                coroutine.close()
        if task.cancelled():
            if over:
                raise SoftTimeLimitExceeded()
            raise CoroutineCancelledError(_CANCELLED)
        result, error = task.result()
        if error is not None:
            raise _as_celery_knows_it(error)
        return result

    def _make_task(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[_Ended]:
        context = getcurrent().gr_context
        assert context is not None
        if sys.version_info >= (3, 11):
            return asyncio.Task(
                self._run(coroutine), loop=self._loop, name=self.title, context=context
            )
        # It gets a copy: what the coroutine sets there is not seen in `task_postrun`.
        return contextvars.copy_context().run(
            lambda: asyncio.Task(self._run(coroutine), loop=self._loop, name=self.title)
        )

    # -- in the asyncio task

    async def _run(self, coroutine: Coroutine[Any, Any, Any]) -> _Ended:
        """Return how `coroutine` ended. Its exception must not pass through the event loop, which
        `SystemExit` would end."""
        try:
            return await self._steps(coroutine), None
        except BaseException as exc:
            await self._clean_up()
            return None, exc

    async def _clean_up(self) -> None:
        """Look after what the failure of a coroutine may have left broken for the next ones."""
        if CoroutineTrace.after_failure is None or self.cancelled:
            return
        try:
            await CoroutineTrace.after_failure()
        except Exception as exc:
            logger.warning("Clean-up after the failure of %s has failed: %r", self.title, exc)

    @generator_coroutine
    def _steps(self, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, None, Any]:
        """Await `coroutine`; raise the soft limit in it when that is over.

        `asyncio.Task.cancel` has cancelled what it awaits. Only then it goes on, with this
        exception in the place of `CancelledError`.
        """
        error: BaseException | None = None
        while True:
            try:
                awaited = coroutine.send(None) if error is None else coroutine.throw(error)
            except StopIteration as end:
                return end.value
            error = None
            try:
                yield awaited
            except BaseException as exc:
                error = exc
            if self._soft_limit_is_due and isinstance(error, (asyncio.CancelledError, NoneType)):
                self._soft_limit_over = False
                error = SoftLimitReached()
                self._forget_cancel()

    @property
    def _soft_limit_is_due(self) -> bool:
        return self._soft_limit_over and not self.cancelled

    def _forget_cancel(self) -> None:
        """Take back the request to cancel: `asyncio.timeout` and `TaskGroup` ask for it."""
        if sys.version_info >= (3, 11) and self._task is not None:
            self._task.uncancel()


#: The result of a coroutine, or what it has raised.
_Ended = tuple[Any, "BaseException | None"]

_CANCELLED = (
    "the coroutine was cancelled by the task's own code, or by a library that it uses, and not by a"
    " time limit or revoke"
)


def _as_celery_knows_it(error: BaseException) -> BaseException:
    """Return the exception that Celery's tracer is to see for `error`, which a coroutine raised."""
    frames = error.__traceback__
    # The first frames are ours. They say nothing about the task.
    while frames is not None and is_ours(frames.tb_frame):
        frames = frames.tb_next
    error = error.with_traceback(frames)
    if isinstance(error, SoftLimitReached) or _holds_soft_limit(error):
        plain: BaseException = SoftTimeLimitExceeded(
            *(error.args if isinstance(error, SoftLimitReached) else ())
        )
        plain.__cause__ = None if isinstance(error, SoftLimitReached) else error
        return plain.with_traceback(frames)
    if isinstance(error, asyncio.CancelledError):
        cancelled = CoroutineCancelledError(_CANCELLED)
        cancelled.__cause__ = error
        return cancelled
    return error


def _holds_soft_limit(error: BaseException) -> bool:
    """Return whether `error` is a group with a soft limit in it: a `TaskGroup` makes such groups of
    what its body raises."""
    group: Any = error
    return isinstance(group, _Group) and group.subgroup(SoftLimitReached) is not None


def await_in_trace(coroutine: Coroutine[Any, Any, Any], interruptible: bool = True) -> Any:
    """Wait for `coroutine` in the trace that runs now: other jobs go on. Without a trace (a task is
    called with `apply()`), an event loop of its own runs it."""
    trace = current_trace()
    if isinstance(trace, CoroutineTrace):
        return trace.await_(coroutine, interruptible)
    return run_to_end(coroutine)
