"""Jobs of external children whose trace nobody could see: they are done without one.

Layer: above `compat` and `tasks`; imports Celery.

Celery's tracer calls hooks, signals and the result backend around a task. They may block, so each
job that is traced in the worker has a thread, and handing it to and fro costs more than what the
child does. A task that has none of these, and whose result nobody stores, goes another way: its
request is written as soon as a child is idle, and `ok` is told to Celery in the tracer's words. Any
other reply (an error, a retry, ...) is Celery's business: the job is traced after all, with the
reply at hand, and nobody is there to see that the trace began late.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from celery import Celery, Task
from celery.app.task import Context
from celery.app.trace import LOG_SUCCESS
from celery.app.trace import logger as tracers_logger
from celery.utils.saferepr import saferepr
from kombu.serialization import loads, prepare_accept_content

from .compat import ignores_result, is_observed, may_be_observed
from .protocol import encode_request
from .tasks import payload

__all__ = ("Untraced",)


class Untraced:
    """Finds such jobs, and tells of their success.

    Arguments:
        app: the worker's app.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._accept = prepare_accept_content(app.conf.accept_content)
        #: Of each task that came: whether its class leaves nothing to see. A reloaded module makes
        #: another task of the same name.
        self._known: dict[str, tuple[Task, bool]] = {}

    def request(self, arguments: Sequence[Any]) -> bytes | None:
        """Return the request of a job, if it needs no trace.

        Arguments:
            arguments: the tracer's: the task's name and id, the request's headers, the body, its
                content type and encoding.

        Returns:
            The line for the child; None if the tracer must see to it, which also fails the job if
            its arguments can't be read or written.
        """
        name, task_id, headers, body, content_type, content_encoding = arguments
        task = self._app.tasks[name]
        if is_observed() or not self._leaves_nothing_to_see(task):
            return None
        try:
            if content_type:
                body = loads(body, content_type, content_encoding, accept=self._accept)
            args, kwargs, embed = body
            request = Context(headers, **embed or {})
            if (
                request.callbacks
                or request.chain
                or request.chord
                or not ignores_result(task, request)
            ):
                return None
            return encode_request(task_id, payload(name, request, args, kwargs))
        except Exception:
            return None

    def succeed(
        self, arguments: Sequence[Any], result: Any, runtime: float
    ) -> tuple[int, str, float]:
        """Log that a job succeeded, and return what the tracer would.

        Arguments:
            arguments: as for `request`.
            result: what the child replied.
            runtime: seconds that it took.
        """
        name, task_id, headers = arguments[:3]
        text: str = "None"
        if result is not None:
            text = saferepr(result, self._app.tasks[name].resultrepr_maxsize)
        if tracers_logger.isEnabledFor(logging.INFO):
            facts = {
                "id": task_id,
                "name": headers.get("shadow") or name,
                "return_value": text,
                "runtime": runtime,
                "args": headers.get("argsrepr"),
                "kwargs": headers.get("kwargsrepr"),
            }
            tracers_logger.info(LOG_SUCCESS, facts)
        return 0, text, runtime

    def _leaves_nothing_to_see(self, task: Task) -> bool:
        known, nothing = self._known.get(task.name, (None, False))
        if known is not task:
            nothing = not may_be_observed(self._app, task)
            self._known[task.name] = task, nothing
        return nothing
