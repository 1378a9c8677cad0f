"""Jobs of external children whose trace nobody could see: they are done without one.

Layer: above `compat` and `tasks`; imports Celery.

Celery's tracer calls hooks, signals and the result backend around a task. They may block, so each
job that is traced in the worker has a thread, and handing it to and fro costs more than what the
child does. A task that has no hooks and no receivers of signals goes another way: its request is
written as soon as a child is idle, and `ok` is told to Celery in the tracer's words. If its result
is to be stored, a thread does that, and only that. Any other reply (an error, a retry, ...) is
Celery's business: the job is traced after all, with the reply at hand, and nobody is there to see
that the trace began late.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from celery import Celery, Task
from celery.app.task import Context
from celery.app.trace import LOG_SUCCESS
from celery.app.trace import info as log_of_tracer
from celery.app.trace import logger as tracers_logger
from celery.utils.saferepr import saferepr
from kombu.serialization import loads, prepare_accept_content
from kombu.utils.encoding import safe_repr

from ..wire.messages import encode_request
from .compat import as_current, ignores_result, is_observed, may_be_observed
from .tasks import payload

__all__ = ("Shortcut", "Untraced")


class Shortcut(NamedTuple):
    """How a job is done without a trace."""

    #: The request for the child.
    line: bytes
    #: The fields of the request, as the tracer would have them in a `Context`.
    request: dict[str, Any]
    #: Whether its result is to be stored.
    stores: bool

    @property
    def context(self) -> Context:
        """The request, as Celery has it. Made anew: it costs, and most jobs don't need it."""
        return Context(self.request)


class Untraced:
    """Finds such jobs, and tells of their success.

    Arguments:
        app: the worker's app.
        hostname: the worker's node name.
        tracked: the tasks that are to be STARTED while they run, by name.
    """

    def __init__(self, app: Celery, hostname: str, tracked: Mapping[str, bool]) -> None:
        self._app = app
        # Not by `app.tasks` for each job: that takes a lock.
        self._tasks = app.tasks
        self._hostname = hostname
        self._tracked = tracked
        self._accept = prepare_accept_content(app.conf.accept_content)
        #: Of each task that came: whether its class leaves nothing to see. A reloaded module makes
        #: another task of the same name.
        self._known: dict[str, tuple[Task, bool]] = {}

    def shortcut(
        self, arguments: Sequence[Any], tells_progress: bool, body: Any = None
    ) -> Shortcut | None:
        """Return how to do a job, if it needs no trace.

        Arguments:
            arguments: the tracer's: the task's name and id, the request's headers, the body, its
                content type and encoding.
            tells_progress: whether its child may tell of its progress, which is stored too.
            body: the body, if somebody has deserialized it already.

        Returns:
            None if the tracer must see to it, which also fails the job if its arguments can't be
            read or written.
        """
        name, task_id, headers, sent_body, content_type, content_encoding = arguments
        task = self._tasks[name]
        if is_observed() or not self._leaves_nothing_to_see(task):
            return None
        try:
            if not content_type:
                body = sent_body
            elif body is None:
                body = loads(sent_body, content_type, content_encoding, accept=self._accept)
            args, kwargs, embed = body
            if not isinstance(args, (list, tuple)) or not isinstance(kwargs, dict):
                return None
            if kwargs and ("self" in kwargs or not all(isinstance(key, str) for key in kwargs)):
                # The tracer can't call a task with these: it fails the job.
                return None
            request = {
                **headers,
                **(embed or {}),
                "task": name,
                "id": task_id,
                "args": args,
                "kwargs": kwargs,
                "hostname": self._hostname,
                "is_eager": False,
                "called_directly": False,
            }
            if request.get("callbacks") or request.get("chain") or request.get("chord"):
                return None
            ignored = ignores_result(task, request)
            if not ignored and (tells_progress or self._tracked.get(name)):
                return None
            message = payload(name, request, _own_headers(request), args, kwargs)
            line = encode_request(task_id, message)
        except Exception:
            return None
        return Shortcut(line, request, stores=not ignored)

    def store(self, shortcut: Shortcut, result: Any) -> None:
        """Store the `result` of a job, as the tracer would. It may block."""
        context = shortcut.context
        self._tasks[context.task].backend.mark_as_done(context.id, result, context)

    def succeed(self, shortcut: Shortcut, result: Any, runtime: float) -> tuple[int, str, float]:
        """Log that a job succeeded, and return what the tracer would.

        Arguments:
            shortcut: how the job was done.
            result: what the child replied.
            runtime: seconds that it took.
        """
        request = shortcut.request
        task = self._tasks[request["task"]]
        text: str = "None"
        if result is not None:
            text = saferepr(result, task.resultrepr_maxsize)
        if tracers_logger.isEnabledFor(logging.INFO):
            facts = {
                "id": request["id"],
                "name": request.get("shadow") or task.name,
                "return_value": text,
                "runtime": runtime,
                "args": request.get("argsrepr") or safe_repr(request["args"]),
                "kwargs": request.get("kwargsrepr") or safe_repr(request["kwargs"]),
            }
            with as_current(task, shortcut.context):
                log_of_tracer(LOG_SUCCESS, facts)
        return 0, text, runtime

    def _leaves_nothing_to_see(self, task: Task) -> bool:
        known, nothing = self._known.get(task.name, (None, False))
        if known is not task:
            nothing = not may_be_observed(self._app, task)
            self._known[task.name] = task, nothing
        return nothing


def _own_headers(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the headers of `request` that are none of Celery's, as a `Context` has them."""
    headers: Mapping[str, Any] | None = request.get("headers")
    if headers is None:
        return {name: request[name] for name in _own_names(tuple(request))}
    return headers


@lru_cache(maxsize=1000)
def _own_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the `names` of a request's fields that Celery does not know.

    Most requests have the same, and Celery's own search costs as much as all the rest of a job.
    """
    return tuple(Context(dict.fromkeys(names)).headers or ())
