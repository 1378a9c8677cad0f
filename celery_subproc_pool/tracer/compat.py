"""What versions of Celery need done differently in a tracer, or by its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any
from weakref import ReferenceType

import celery
from celery import Celery, Task, signals
from celery.app import trace
from celery.app.task import Context
from celery.backends.base import DisabledBackend
from celery.utils.dispatch import Signal

from .. import PACKAGE
from ..signals import child_request

__all__ = ("ignores_result", "is_observed", "is_received", "may_be_observed", "own_headers")


def ignores_result(task: Task, request: Mapping[str, Any]) -> bool:
    """Return whether no result is to be stored.

    Since Celery 5.7, the request overrides the task (celery/app/task.py:
    `get_actual_ignore_result`). Before, it is enough that one of them ignores it.

    Arguments:
        task: the task.
        request: the fields of its request.
    """
    if isinstance(task.backend, DisabledBackend):
        return True
    asked = request.get("ignore_result")
    if celery.VERSION >= (5, 7) and asked is not None:
        return bool(asked)
    return bool(task.ignore_result or asked)


def is_observed() -> bool:
    """Return whether anybody receives the signals that are sent for each task that succeeds."""
    return (
        is_received(signals.task_prerun)
        or is_received(signals.task_postrun)
        or is_received(signals.task_success)
        or is_received(child_request)
    )


def is_received(signal: Signal) -> bool:
    """Return whether `signal` has other receivers than Celery's for Django: they close what a task
    has opened in its process, and an external task opens nothing there."""
    # Asked for each job: most signals have none.
    return bool(signal.receivers) and not all(_is_of_django(it) for _, it in signal.receivers)


def _is_of_django(receiver: Any) -> bool:
    """Return whether a signal's `receiver` is a method of `celery.fixups.django`, as it is there
    (5.3 to 5.7: `DjangoWorkerFixup.install`)."""
    if isinstance(receiver, ReferenceType):
        receiver = receiver()
    if type(receiver) is not MethodType or type(receiver.__func__) is not FunctionType:
        return False
    return receiver.__func__.__globals__.get("__name__") == "celery.fixups.django"


#: The methods of a task that a tracer calls, in Celery 5.3 to 5.7 (celery/app/trace.py:
#: `build_tracer`). Later versions are not known.
_CALLED_OF_TASKS = ("__call__", "before_start", "on_success", "after_return")

#: The modules whose functions run no code but Celery's and ours. A running worker has replaced
#: `Task.__call__` by a function of `celery.app.trace` (`setup_worker_optimizations`).
_SILENT_MODULES = {
    "celery.app.task",
    "celery.app.trace",
    "celery.backends.base",
    "celery.loaders.base",
    f"{PACKAGE}.tracer.tasks",
}


def may_be_observed(app: Celery, task: Task) -> bool:
    """Return whether other code than Celery's and ours may be called when `task` is traced and
    succeeds. Its result is ignored.

    Packages that watch tasks wrap what a tracer calls, the tracer, or what makes the tracer
    (Sentry: all three; New Relic: the last).
    """
    loader, backend = type(app.loader), type(task.backend)
    called = [vars(kind).get(name) for kind in type(task).__mro__ for name in _CALLED_OF_TASKS]
    called += [trace.build_tracer, task.__trace__, loader.on_task_init, loader.on_process_cleanup]
    called += [backend.process_cleanup, backend.mark_as_done]
    return (
        celery.VERSION >= (5, 8)
        or not all(function is None or _is_silent(function) for function in called)
        or bool(app.conf.worker_deduplicate_successful_tasks)
    )


def _is_silent(function: object) -> bool:
    """Return whether `function` is Celery's or ours, and not wrapped.

    Look at its globals: a wrapper of `functools.wraps` or wrapt has the module name of what it
    wraps; one of wrapt even passes `isinstance`.
    """
    if type(function) is not FunctionType:
        return False
    return function.__globals__.get("__name__") in _SILENT_MODULES


def own_headers(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the headers of a request that are not Celery's own, as a `Context` has them."""
    headers: Mapping[str, Any] | None = fields.get("headers")
    if headers is None:
        return {name: fields[name] for name in _own_names(tuple(fields))}
    return headers


@lru_cache(maxsize=1000)
def _own_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the `names` of a request's fields that Celery does not know.

    Cached: most requests have the same names, and Celery's own search costs as much as all the
    rest of a job.
    """
    return tuple(Context(dict.fromkeys(names)).headers or ())
