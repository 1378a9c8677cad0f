"""The fast path: a job of an external child that Celery's tracer has no part in, if it succeeds.

Celery's tracer calls hooks, signals and the result backend around a task. They may block. So a
tracer does that, another process, and passing the job to it and back costs more than what the child
does. A task without hooks and without receivers of signals needs none of that. On the fast path its
request is written as soon as a child is idle, and Celery is told of ``ok`` with what the tracer
would have returned. If the result is to be stored, or for any other reply (an error, a retry, ...),
a tracer traces the job with the reply at hand, and no code can see that the trace began late.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from celery import Celery, Task, signals
from celery.app.task import Context
from celery.app.trace import LOG_SUCCESS
from celery.app.trace import info as log_of_tracer
from celery.app.trace import logger as tracers_logger
from celery.utils.saferepr import saferepr
from kombu.serialization import loads, prepare_accept_content
from kombu.utils.encoding import safe_repr

from ..tracer.compat import (
    ignores_result,
    is_observed,
    is_received,
    may_be_observed,
    own_headers,
)
from ..tracer.tasks import payload
from ..wire.messages import encode_request
from .compat import as_current

__all__ = ("FastPath", "FastRequest", "expects_traces")


class FastRequest(NamedTuple):
    """The request of a job on the fast path."""

    #: The line for the child.
    line: bytes
    #: The request's fields, as the tracer would have them in a `Context`.
    fields: dict[str, Any]
    #: Whether the result is to be stored.
    stores: bool

    @property
    def context(self) -> Context:
        """The request, as Celery has it. Made on demand: it is costly, and most jobs need none."""
        return Context(self.fields)


class FastPath:
    """Finds the jobs that can take the fast path, and does what the tracer does when they succeed.

    Arguments:
        app: the worker's app.
        hostname: the worker's node name.
    """

    def __init__(self, app: Celery, hostname: str) -> None:
        self._app = app
        # `app.tasks` takes a lock: not for each job.
        self._tasks = app.tasks
        self._hostname = hostname
        self._accept = prepare_accept_content(app.conf.accept_content)
        #: By the name of each task that came: the task, and whether its class lets nothing be seen
        #: of a trace. A reloaded module makes another task of the same name.
        self._known: dict[str, tuple[Task, bool]] = {}
        #: Whether the tracers say that nobody watches tasks there.
        self.tracers_are_silent = False

    def request_for(
        self, arguments: Sequence[Any], stores_earlier: bool = False, body: Any = None
    ) -> FastRequest | None:
        """Return the request of a job, if the job can take the fast path.

        Arguments:
            arguments: the tracer's: the task's name and id, the request's headers, the body, its
                content type and encoding.
            stores_earlier: whether a state may have to be stored before the last one.
            body: the body, if Celery has deserialized it already.

        Returns:
            None if the job needs the tracer. The tracer also fails a job whose arguments can't be
            read or written.
        """
        name, task_id, *_ = arguments
        task = self._tasks[name]
        if is_observed() or not self._is_silent(task) or self._may_be_observed_in_tracers():
            return None
        try:
            fields = self._fields(arguments, body)
            if fields is None:
                return None
            stores = not ignores_result(task, fields)
            if stores and stores_earlier:
                return None
            args, kwargs = fields["args"], fields["kwargs"]
            message = payload(name, fields, own_headers(fields), args, kwargs)
            return FastRequest(encode_request(task_id, message), fields, stores)
        except Exception:
            return None

    def _fields(self, arguments: Sequence[Any], body: Any) -> dict[str, Any] | None:
        """Return the fields of a request, as the tracer makes them of a message.

        Return None if the tracer has to send what follows the job, or to fail it because the task
        can't be called with its arguments.
        """
        name, task_id, headers, sent_body, content_type, content_encoding = arguments
        if not content_type:
            body = sent_body
        elif body is None:
            body = loads(sent_body, content_type, content_encoding, accept=self._accept)
        args, kwargs, embed = body
        if not isinstance(args, (list, tuple)) or not isinstance(kwargs, dict):
            return None
        if kwargs and ("self" in kwargs or not all(isinstance(key, str) for key in kwargs)):
            return None
        fields = {
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
        follows = fields.get("callbacks") or fields.get("chain") or fields.get("chord")
        return None if follows else fields

    def succeed(self, request: FastRequest, result: Any, runtime: float) -> tuple[int, str, float]:
        """Log that a job succeeded, and return what the tracer would.

        Arguments:
            request: the job's.
            result: what the child replied.
            runtime: seconds that the job took.
        """
        fields = request.fields
        task = self._tasks[fields["task"]]
        text: str = "None"
        if result is not None:
            text = saferepr(result, task.resultrepr_maxsize)
        if tracers_logger.isEnabledFor(logging.INFO):
            facts = {
                "id": fields["id"],
                "name": fields.get("shadow") or task.name,
                "return_value": text,
                "runtime": runtime,
                "args": fields.get("argsrepr") or safe_repr(fields["args"]),
                "kwargs": fields.get("kwargsrepr") or safe_repr(fields["kwargs"]),
            }
            with as_current(task, request.context):
                log_of_tracer(LOG_SUCCESS, facts)
        return 0, text, runtime

    def _may_be_observed_in_tracers(self) -> bool:
        """Return whether tasks may be watched in tracers only: agents begin to watch in receivers
        of `worker_process_init`, which is sent there."""
        return not self.tracers_are_silent and is_received(signals.worker_process_init)

    def _is_silent(self, task: Task) -> bool:
        """Return whether no code but Celery's and ours is called when `task` is traced."""
        known, silent = self._known.get(task.name, (None, False))
        if known is not task:
            silent = not may_be_observed(self._app, task)
            self._known[task.name] = task, silent
        return silent


def expects_traces(app: Celery, names: Iterable[str]) -> bool:
    """Return whether a tracer is needed for one of the external tasks `names` if it succeeds.

    Arguments:
        app: the worker's app.
        names: the tasks that are known by now.
    """
    tasks = [app.tasks[name] for name in names]
    return bool(tasks) and (
        is_observed()
        or is_received(signals.worker_process_init)
        or any(may_be_observed(app, task) or not ignores_result(task, {}) for task in tasks)
    )
