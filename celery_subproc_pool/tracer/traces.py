"""A trace: Celery's tracer, in a greenlet that gives up the processor where the body would run.

Celery's tracer is one synchronous function with the body of the task in its middle. The greenlet of
a trace runs it. The body switches to the tracer's loop, its parent, and the loop switches back when
there is news from the child. Celery keeps its stacks of current tasks by greenlet
(celery/utils/threads.py, 5.3 to 5.7).
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery import Task
from celery.app.task import Context
from celery.app.trace import fast_trace_task
from greenlet import getcurrent, greenlet

from ..errors import JobAbandoned, ProtocolFault, SubprocPoolError
from ..python_child.codec import End, escaped_end
from ..wire.messages import Reply
from ..wire.python import Exchange, Notice, encode_ask
from .tasks import CURRENT

__all__ = ("Trace",)


#: Greenlets that are kept for the next traces. Each takes about 20 kB.
MOST_IDLE = 64


class Trace:
    """One job of an external child: a `tasks.JobOfChild`.

    `begin`, `hear` and `abandon` are called in the greenlet of the tracer's loop. They return when
    the trace waits for the next news, or is over.

    Arguments:
        arguments: Celery's tracer's.
        exchange: what is to be known of the child; None: the body of the task runs here.
        send: sends a line to the worker.
    """

    def __init__(
        self, arguments: tuple[Any, ...], exchange: Exchange | None, send: Callable[[bytes], None]
    ) -> None:
        self.task_id: str = arguments[1]
        self.title = f"{arguments[0]}[{arguments[1]}]"
        #: What is to be known of the child.
        self.facts = exchange
        self.stored: tuple[Task, Context] | None = None
        self.asked: tuple[Task, Context] | None = None
        #: How it ended; None if it was abandoned, or has not ended.
        self.end: End | None = None
        self.over = False
        self._arguments = arguments
        self._send = send
        self._asked = False

    def begin(self, idle: list[greenlet]) -> None:
        """Begin, in one of the `idle` greenlets, which it goes back to at the end."""
        self._greenlet = idle.pop() if idle else _new_greenlet(idle)
        self._greenlet.switch(self)

    def hear(self, notice: Notice) -> None:
        """Go on with `notice`."""
        self._greenlet.switch(notice)

    def abandon(self) -> None:
        """Unwind: the job has ended in another way."""
        self._greenlet.throw(JobAbandoned())

    def run(self) -> None:
        """Trace the job."""
        if self.facts is not None:
            CURRENT.set(self)
        try:
            self.end = End(False, fast_trace_task(*self._arguments))
        except JobAbandoned:
            pass
        except Exception:
            self.end = escaped_end()
        except BaseException as exc:
            # A hook has called `sys.exit`. On prefork, it would have ended its process.
            self.end = _lost(exc)

    def exchange(
        self, line: bytes, on_progress: Callable[[dict[str, Any]], None]
    ) -> tuple[Reply, float | None]:
        """Give the request `line` to the child, and wait; see `tasks.JobOfChild`.

        Raises:
            ProtocolFault: the child broke the protocol.
            SoftTimeLimitExceeded: the child did not end the job after its soft limit.
            JobAbandoned: the job is over, and Celery knows how.
            SubprocPoolError: it was called before: a job is one exchange.
        """
        if self._asked:
            raise SubprocPoolError(
                f"{self.title} has asked its child already; a task that runs in a child can call"
                " run() once for each job"
            )
        self._asked = True
        self._send(encode_ask(self.task_id, line))
        loop = self._greenlet.parent
        assert loop is not None
        while True:
            notice: Notice = loop.switch()
            if notice.progress is not None:
                on_progress(notice.progress)
            elif notice.answer is not None:
                break
        answer = notice.answer
        if answer.fault is not None:
            raise ProtocolFault(answer.fault)
        if answer.reply is None:
            raise SoftTimeLimitExceeded(answer.over)
        return answer.reply, answer.over


def _new_greenlet(idle: list[greenlet]) -> greenlet:
    made = greenlet(partial(_run_traces, idle))
    # Without this, the context would be empty: what was set when the process began counts.
    made.gr_context = contextvars.copy_context()
    return made


def _run_traces(idle: list[greenlet], trace: Trace) -> None:
    """Run one trace after the other, each in a context of its own. To make a greenlet for each
    costs as much as a tenth of a trace."""
    own = getcurrent()
    assert own.parent is not None
    while True:
        contextvars.copy_context().run(trace.run)
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
