"""What a message must hold before Celery's consumer or the engine works with it.

Layer: above nothing of ours; imports Celery.

Celery's consumer takes a message's fields as they are. It looks its id up in a set, unpacks its
time limits, and walks through its stamps. If one of them is of another type, the error ends the
worker; or it comes when the job has a slot already, which is then lost. So a task's strategy, which
is Celery's extension point for what becomes of a message (`celery.app.task.Task.Strategy`), is
Celery's own one behind a check. A message that fails is rejected, as Celery does with those that it
finds invalid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery, Task
from celery.exceptions import InvalidTaskError
from celery.worker import strategy
from kombu.exceptions import ContentDisallowed, DecodeError

__all__ = ("ODD_VALUE_ERRORS", "guard_consumer", "seconds")

#: A hundred years, in seconds: what lies beyond is no limit, and overflows clocks.
LONGEST = 100 * 365 * 86400.0

#: Celery's word for its own strategy.
_CELERYS = Task.Strategy

#: What Celery's consumer sees to itself.
_CELERY_HANDLES = (InvalidTaskError, ContentDisallowed, DecodeError)

#: What code raises that meets a value of another type than it expects. Other errors are not the
#: message's fault: the broker, the result backend or the system is in trouble.
ODD_VALUE_ERRORS = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


def guard_consumer(app: Celery) -> None:
    """Let a message that Celery's consumer can't work with be rejected, rather than end the worker.

    Tasks that have a strategy of their own keep it.

    Arguments:
        app: the worker's app. Tasks that are registered later need another call.
    """
    for task in app.tasks.values():
        if task.Strategy == _CELERYS:
            task.Strategy = _checked_strategy


def _checked_strategy(task: Task, app: Celery, consumer: Any) -> Callable[..., Any]:
    """Return what Celery's own strategy does with a message of `task`, behind a check."""
    handle = strategy.default(task, app, consumer)
    errors = (*_CELERY_HANDLES, *consumer.connection_errors, *consumer.channel_errors)

    def handle_message(message: Any, body: Any, *rest: Any, **options: Any) -> Any:
        # An older client has all its fields in the body.
        _check(body if isinstance(body, Mapping) else message.headers)
        try:
            return handle(message, body, *rest, **options)
        except errors:
            raise
        except ODD_VALUE_ERRORS as exc:
            raise InvalidTaskError(f"Celery can't work with its fields: {exc!r}") from exc

    return handle_message


def _check(fields: Mapping[str, Any]) -> None:
    """Check what would do harm later than in the strategy itself.

    Raises:
        InvalidTaskError: a field is not what it must be.
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
    """Return whether UTF-8 can hold `value`: half of a surrogate pair is no character."""
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


def seconds(value: Any, name: str) -> float | None:
    """Return a time limit as seconds; None for none.

    Arguments:
        value: what a message, a task or the configuration has for it: a number, or what can be
            read as one, such as text from an environment variable.
        name: what the error calls it.

    Raises:
        ValueError: it is no number, or a negative one.
    """
    if not value:
        return None
    try:
        limit = float(value)
    except (TypeError, ValueError, OverflowError):
        limit = math.nan
    if limit >= 0:
        if not 0 < limit < LONGEST:
            return None
        # As it came, if it is a number: it stands in the log.
        return value if type(value) in (int, float) else limit
    raise ValueError(f"{name}: expected a number of seconds, got {value!r}")
