"""Checks messages before Celery's consumer or the engine works with them.

Celery's consumer takes a message's fields as they are. It looks up the id in a set, unpacks the
time limits, and walks through the stamps. If one of them has another type, the error ends the
worker. Or the error comes when the job has a slot already: the slot is lost then.

Celery's extension point for what to do with a message is a task's strategy
(`celery.app.task.Task.Strategy`). Here it is Celery's own strategy behind a check. A message that
fails is rejected, as Celery does with messages that it finds invalid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery, Task
from celery.exceptions import InvalidTaskError
from celery.worker import strategy
from kombu.exceptions import ContentDisallowed, DecodeError

__all__ = ("ODD_VALUE_ERRORS", "guard_consumer")

#: How Celery's own strategy is written.
_CELERYS = Task.Strategy

#: The errors that Celery's consumer handles.
_CELERY_HANDLES = (InvalidTaskError, ContentDisallowed, DecodeError)

#: What code raises for a value of an unexpected type. Other errors are not the message's fault: the
#: broker, the result backend or the system has failed.
ODD_VALUE_ERRORS = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


def guard_consumer(app: Celery) -> None:
    """Reject messages that Celery's consumer can't work with, so that they don't end the worker.

    Tasks with a strategy of their own keep it. Tasks that are registered later need another call.

    Arguments:
        app: the worker's app.
    """
    for task in app.tasks.values():
        if task.Strategy == _CELERYS:
            task.Strategy = _checked_strategy


def _checked_strategy(task: Task, app: Celery, consumer: Any) -> Callable[..., Any]:
    """Return Celery's own strategy for messages of `task`, behind a check."""
    handle = strategy.default(task, app, consumer)
    errors = (*_CELERY_HANDLES, *consumer.connection_errors, *consumer.channel_errors)

    def handle_message(message: Any, body: Any, *rest: Any, **options: Any) -> Any:
        # Protocol 1 of older clients has all fields in the body.
        _check(body if isinstance(body, Mapping) else message.headers)
        try:
            return handle(message, body, *rest, **options)
        except errors:
            raise
        except ODD_VALUE_ERRORS as exc:
            raise InvalidTaskError(f"Celery can't work with its fields: {exc!r}") from exc

    return handle_message


def _check(fields: Mapping[str, Any]) -> None:
    """Check the fields that would raise later than in the strategy itself.

    Raises:
        InvalidTaskError: a field is of a wrong type.
    """
    task_id = fields.get("id")
    if type(task_id) is not str or not _is_text(task_id):
        raise InvalidTaskError(f"its id: expected text, got {task_id!r}")
    shadow = fields.get("shadow")
    if shadow and not isinstance(shadow, str):
        raise InvalidTaskError(f"its shadow: expected text, or null, got {shadow!r}")
    limits = fields.get("timelimit")
    if limits and not (isinstance(limits, (list, tuple)) and len(limits) == 2):
        raise InvalidTaskError(
            f"its timelimit: expected two limits in seconds, hard and soft, or null, got {limits!r}"
        )
    stamped = fields.get("stamped_headers")
    if stamped:
        _check_stamps(stamped, fields.get("stamps"))


def _is_text(value: str) -> bool:
    """Return whether UTF-8 can encode `value`: half of a surrogate pair is not a character."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_stamps(stamped: Any, stamps: Any) -> None:
    names = stamped if isinstance(stamped, (list, tuple)) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise InvalidTaskError(f"its stamped_headers: expected a list of names, got {stamped!r}")
    if stamps and not isinstance(stamps, Mapping):
        raise InvalidTaskError(f"its stamps: expected a mapping, got {stamps!r}")
