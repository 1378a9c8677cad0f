"""What the reply of an external child means for Celery: a result, or an exception to raise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from celery import Task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from ..errors import ChildTaskError
from ..wire import messages

__all__ = ("THROTTLES_HEADER", "conclude", "throttles_of")

#: The message header with the number of times that a task was throttled.
THROTTLES_HEADER = "subproc_throttles"


def conclude(
    task: Task,
    reply: messages.Reply,
    throttle_max_retries: int | None,
    over: float | None = None,
) -> Any:
    """Return the result in `reply`, or raise the exception that `reply` means.

    The request is the current one of `task`.

    Arguments:
        task: the task.
        reply: what the child answered.
        throttle_max_retries: how often the task may be throttled; None is without limit.
        over: the soft time limit, in seconds, if the child was told that it is over; else None.

    Raises:
        SoftTimeLimitExceeded: for `error`, if the soft time limit is over.
        ChildTaskError: for `error`, and for `retry` once `max_retries` is used up.
        celery.exceptions.Retry: for `throttled` and `retry`.
        celery.exceptions.MaxRetriesExceededError: throttled more than `throttle_max_retries`.
        celery.exceptions.Reject: for `reject`.
        celery.exceptions.Ignore: for `ignore`.
    """
    if isinstance(reply, messages.Ok):
        return reply.result
    if isinstance(reply, messages.Error):
        message = messages.DEFAULT_ERROR_MESSAGE if reply.message is None else reply.message
        error = ChildTaskError(message, reply.type, reply.traceback)
        if over is not None:
            raise SoftTimeLimitExceeded(over) from error
        raise error
    if isinstance(reply, messages.Throttled):
        _throttle(task, reply, throttle_max_retries)
    if isinstance(reply, messages.Retry):
        message = messages.DEFAULT_ERROR_MESSAGE if reply.message is None else reply.message
        raise task.retry(countdown=reply.countdown, exc=ChildTaskError(message))
    if isinstance(reply, messages.Reject):
        raise Reject("the child rejected the job", requeue=bool(reply.requeue))
    raise Ignore()


def throttles_of(headers: Mapping[str, Any]) -> int:
    """Return how often a request was throttled before, by its `headers` that are not Celery's."""
    count = headers.get(THROTTLES_HEADER, 0)
    return count if isinstance(count, int) else 0


def _throttle(task: Task, reply: messages.Throttled, most: int | None) -> NoReturn:
    request = task.request
    headers = request.headers or {}
    throttles = throttles_of(headers) + 1
    if most is not None and throttles > most:
        raise task.MaxRetriesExceededError(
            f"{task.name}[{request.id}] was throttled {throttles} times;"
            f" throttle_max_retries is {most}"
        )
    countdown = reply.retry_after_secs
    retries = request.retries
    # `retry` adds one, but being throttled is not a failure: the count stays the same.
    request.retries = retries - 1
    try:
        raise task.retry(
            countdown=messages.DEFAULT_RETRY_AFTER if countdown is None else countdown,
            headers={**headers, THROTTLES_HEADER: throttles},
        )
    finally:
        request.retries = retries
