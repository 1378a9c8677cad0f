"""What versions of Celery need done differently in a tracer, or by its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import celery
from celery import Task
from celery.backends.base import DisabledBackend

__all__ = ("ignores_result",)


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
