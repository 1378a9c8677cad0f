"""Errbacks that are coroutine functions.

Celery sends an errback that takes only the id of the failed task as a task of its own. Any other
it calls where it stores the failure, and throws away what the call returns: for an ``async def``,
a coroutine that nobody has awaited.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from celery import Task, _state
from celery.app.task import Context
from celery.backends.base import Backend

__all__ = ("is_errback", "prepare_errbacks")

#: Set in Celery's class once it is changed.
_PREPARES = "_subproc_pool_prepares"

#: How many tasks Celery's stack had when it began to call errbacks; None while it calls none.
_DEPTH: ContextVar[int | None] = ContextVar("_DEPTH", default=None)


def is_errback() -> bool:
    """Return whether Celery calls the current task as an errback. What an errback calls is none:
    it is deeper in the stack."""
    depth = _DEPTH.get()
    return depth is not None and len(_state._task_stack.stack) <= depth + 1


def prepare_errbacks(prepare: Callable[[Task], None]) -> None:
    """Let `prepare` have each task that Celery is about to call as an errback, in this process."""
    if hasattr(Backend, _PREPARES):
        return
    # Celery 5.3 to 5.7 have no public way (celery/backends/base.py).
    call_all = Backend._call_task_errbacks

    @functools.wraps(call_all)
    def call(backend: Backend, request: Context, exc: Any, traceback: Any) -> Any:
        for errback in request.errbacks or ():
            task = backend.app.tasks.get(backend.app.signature(errback).task)
            if task is not None:
                prepare(task)
        token = _DEPTH.set(len(_state._task_stack.stack))
        try:
            return call_all(backend, request, exc, traceback)
        finally:
            _DEPTH.reset(token)

    Backend._call_task_errbacks = call
    setattr(Backend, _PREPARES, True)
