"""The trace of an external task: its greenlet waits while the child works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Task
from celery.app.task import Context

from ..errors import ProtocolFault, SubprocPoolError
from ..python_child.traces import Trace
from ..wire.messages import Reply
from ..wire.python import Exchange, Notice, encode_ask
from .tasks import CURRENT

__all__ = ("ExternalTrace",)


class ExternalTrace(Trace):
    """One job of an external child: a `tasks.JobOfChild`.

    Arguments:
        arguments: Celery's tracer's.
        exchange: what is to be known of the child; None: the body of the task runs here.
        send: sends a line to the worker.
    """

    def __init__(
        self, arguments: tuple[Any, ...], exchange: Exchange | None, send: Callable[[bytes], None]
    ) -> None:
        super().__init__(arguments)
        #: What is to be known of the child.
        self.facts = exchange
        self.stored: tuple[Task, Context] | None = None
        self.asked: tuple[Task, Context] | None = None
        self._send = send
        self._asked = False

    def run(self) -> None:
        """Trace the job."""
        if self.facts is not None:
            CURRENT.set(self)
        super().run()

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
        while True:
            notice: Notice = self.wait()
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
