"""A trace: Celery's tracer, in a greenlet that gives up the processor where the body would run.

Celery's tracer is one synchronous function with the body of the task in its middle. The greenlet of
a trace runs it. Where the trace has to wait, it switches to the loop of its process, its parent.
The loop switches back when what the trace waits for is there. Celery keeps its stacks of current
tasks by greenlet (celery/utils/threads.py, 5.3 to 5.7).
"""

from __future__ import annotations

import contextvars
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.app.trace import fast_trace_task
from greenlet import getcurrent, greenlet

from ..errors import JobAbandoned
from .codec import End, escaped_end

__all__ = ("MOST_IDLE", "Trace", "current_trace")

#: Greenlets that are kept for the next traces. Each takes about 20 kB.
MOST_IDLE = 64


class Trace:
    """One job.

    `begin`, `go_on` and `abandon` are called in the greenlet of the loop. They return when the
    trace waits again, or is over.

    Arguments:
        arguments: Celery's tracer's.
    """

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.task_id: str = arguments[1]
        self.title = f"{arguments[0]}[{arguments[1]}]"
        #: How it ended; None if it was abandoned, or has not ended.
        self.end: End | None = None
        self.over = False
        self._arguments = arguments
        self._greenlet: _TraceGreenlet

    def begin(self, idle: list[_TraceGreenlet]) -> None:
        """Begin, in one of the `idle` greenlets, which it goes back to at the end."""
        self._greenlet = idle.pop() if idle else _TraceGreenlet(partial(_run_traces, idle))
        # Each trace has a context of its own. What was set when the process began counts.
        self._greenlet.gr_context = contextvars.copy_context()
        self._greenlet.trace = self
        self._greenlet.switch(self)

    def go_on(self, news: Any) -> None:
        """Go on with `news`, which is what it waits for."""
        self._greenlet.switch(news)

    def abandon(self) -> None:
        """Unwind: the job has ended in another way."""
        self._greenlet.throw(JobAbandoned())

    def wait(self) -> Any:
        """Give up the processor; return the next news. To be called in the trace's greenlet.

        Raises:
            JobAbandoned: the job is over, and Celery knows how.
        """
        loop = self._greenlet.parent
        assert loop is not None
        return loop.switch()

    def run(self) -> None:
        """Trace the job."""
        try:
            self.end = End(False, fast_trace_task(*self._arguments))
        except JobAbandoned:
            pass
        except Exception:
            self.end = escaped_end()
        except BaseException as exc:
            # A hook has called `sys.exit`. On prefork, it would have ended its process.
            self.end = _lost(exc)


class _TraceGreenlet(greenlet):
    """A greenlet that runs one trace after the other."""

    #: The trace that it runs.
    trace: Trace


def current_trace() -> Trace | None:
    """Return the trace whose greenlet runs now; None if no trace's does."""
    current = getcurrent()
    return current.trace if type(current) is _TraceGreenlet else None


def _run_traces(idle: list[_TraceGreenlet], trace: Trace) -> None:
    """Run one trace after the other. To make a greenlet for each costs as much as a tenth of a
    trace."""
    own = getcurrent()
    assert isinstance(own, _TraceGreenlet)
    assert own.parent is not None
    while True:
        trace.run()
        trace.over = True
        if len(idle) >= MOST_IDLE:
            return
        idle.append(own)
        trace = own.parent.switch()


def _lost(exc: BaseException) -> End:
    try:
        raise WorkerLostError(f"Worker exited prematurely: {exc!r}")
    except WorkerLostError:
        return End(True, ExceptionInfo())
