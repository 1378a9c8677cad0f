"""Task messages on their way to a Python child, and how the child's trace of a task ended.

Both ends are here, the worker's and the child's, so that they agree. A request is Celery's own
message, as JSON; it is a pickle only where JSON would change it, and pickles come only from the
worker. A reply is JSON in the terms of Celery's own JSON results. The worker unpickles nothing that
a child sends.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback, rebuild_exc
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry
from kombu.utils.encoding import safe_repr

from ..errors import TaskMemoryError
from ..wire.json_lines import encode
from ..wire.python import (
    Exchange,
    Notice,
    Order,
    Raised,
    Returned,
    TaskMessage,
    TaskRequest,
    Traced,
)
from .calls import decode_returned, encode_returned
from .values import is_plain, utf8_text

__all__ = ("End", "decode_end", "encode_end", "encode_task", "escaped_end", "task_arguments")

#: Bytes of the longest exception that is sent whole.
_LONGEST = 1 << 20

#: Celery's own exceptions. A class of a project that derives from one means the same.
_RETRY, _REJECT, _IGNORE = "Retry", "Reject", "Ignore"
_PREDICATES = "celery.exceptions"


# -- the request


def encode_task(task_id: str, arguments: Sequence[Any], exchange: Exchange | None = None) -> bytes:
    """Encode the request to run a task in a Python child, or to trace it.

    Arguments:
        task_id: Celery's id of the task.
        arguments: what `celery.worker.request.Request.execute_using_pool` passes to the tracer:
            the task's name and id, the request's headers, the body, its content type and encoding.
        exchange: for a tracer: what it must know of the external child that runs the task.

    Raises:
        pickle.PicklingError or TypeError: the request holds an object that can't be pickled.
    """
    name, _, headers, body, content_type, content_encoding = arguments
    request = headers.copy()
    # The worker has deserialized the arguments into its own copy; the child does it again.
    request.pop("args", None)
    request.pop("kwargs", None)
    if content_type and is_plain(request):
        text, raw = _text_or_bytes(body, content_encoding)
        message = TaskMessage(
            task=name,
            content_type=content_type,
            content_encoding=content_encoding,
            request=request,
            body=text,
            raw=raw,
        )
        try:
            return encode(_request(task_id, message, exchange))
        except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
            # It holds a number or a string that JSON lacks.
            pass
    return encode(_request(task_id, _pickled(arguments, request), exchange))


def _request(task_id: str, message: TaskMessage, exchange: Exchange | None) -> TaskRequest | Notice:
    if exchange is None:
        return TaskRequest(id=task_id, payload=message)
    return Notice(id=task_id, payload=message, exchange=exchange)


def _pickled(arguments: Sequence[Any], request: dict[str, Any]) -> TaskMessage:
    name, _, _, body, content_type, content_encoding = arguments
    if isinstance(body, memoryview):
        body = body.tobytes()
    return TaskMessage(
        task=name,
        content_type=content_type,
        content_encoding=content_encoding,
        pickled=pickle.dumps((request, body), protocol=4),
    )


def _text_or_bytes(body: Any, content_encoding: str | None) -> tuple[str | None, bytes | None]:
    if isinstance(body, str):
        return body, None
    data = bytes(body)
    if content_encoding == "utf-8":
        # kombu takes a str as decoded already (kombu/serialization.py).
        try:
            return data.decode(), None
        except UnicodeDecodeError:
            pass
    return None, data


def task_arguments(request: TaskRequest | Notice | Order) -> tuple[Any, ...]:
    """Return the arguments for the tracer, as `encode_task` got them."""
    message = request.payload
    assert message is not None
    if message.pickled is not None:
        headers, body = pickle.loads(message.pickled)
    else:
        headers = message.request
        body = message.body if message.raw is None else message.raw
    return (
        message.task,
        request.id,
        headers,
        body,
        message.content_type,
        message.content_encoding,
    )


# -- the reply


class End(NamedTuple):
    """How the trace of a task ended, or a call, in the form that the pool's callbacks take."""

    #: Whether `result` is for the error callback: the tracer itself raised, or the callable did.
    escaped: bool
    #: ``(failed, retval, runtime)`` as Celery's tracer returns it; what the callable returned; or
    #: the `ExceptionInfo` of what escaped.
    result: Any
    #: Whether `result` is what a callable returned.
    returned: bool = False


def escaped_end() -> End:
    """Return the end of a job that raised the exception now being handled, past its tracer."""
    return End(True, ExceptionInfo())


def encode_end(app: Celery, task_id: str, end: End) -> bytes:
    """Encode a child's final reply.

    Arguments:
        app: the child's app.
        task_id: the id of the request.
        end: how the job ended.
    """
    if end.returned:
        return encode_returned(task_id, end.result)
    if not end.escaped:
        failed, retval, runtime = end.result
        if not failed:
            return encode(Traced(id=task_id, result=utf8_text(retval), runtime=runtime))
        einfo = retval
    else:
        einfo, runtime = end.result, None
    try:
        raised = _raised(app, einfo)
        line = _encode_raised(task_id, raised, runtime, end.escaped)
        if len(line) <= _LONGEST:
            return line
        reason = "its arguments are too long to be sent to the worker"
    except Exception as exc:
        reason = f"its arguments can't be sent to the worker: {safe_repr(exc)}"
    return _encode_raised(task_id, _shortened(einfo, reason), runtime, end.escaped)


def _encode_raised(task_id: str, raised: Raised, runtime: float | None, escaped: bool) -> bytes:
    return encode(Traced(id=task_id, raised=raised, runtime=runtime, escaped=escaped))


def _raised(app: Celery, einfo: ExceptionInfo) -> Raised:
    exc = _unwrapped(einfo.exception)
    facts: dict[str, Any] = {
        "traceback": utf8_text(einfo.traceback),
        "internal": bool(einfo.internal),
    }
    if isinstance(exc, Retry):
        cause = exc.excs if exc.exc is None else _described(app, exc.exc)
        return Raised(
            type=_RETRY,
            module=_PREDICATES,
            cause=cause,
            message=exc.message,
            when=_sendable(exc.when),
            **facts,
        )
    if isinstance(exc, Reject):
        reason = exc.reason if is_plain(exc.reason) else utf8_text(safe_repr(exc.reason))
        return Raised(
            type=_REJECT, module=_PREDICATES, args=[reason], requeue=bool(exc.requeue), **facts
        )
    if isinstance(exc, Ignore):
        return Raised(type=_IGNORE, module=_PREDICATES, **facts)
    return _described(app, exc, **facts)


def _described(app: Celery, exc: Any, **facts: Any) -> Raised:
    if not isinstance(exc, BaseException):
        return Raised(type="str", module="builtins", args=[safe_repr(exc)], **facts)
    words = app.backend.prepare_exception(exc, "json")
    return Raised(
        type=words["exc_type"], module=words["exc_module"], args=words["exc_message"], **facts
    )


def _shortened(einfo: ExceptionInfo, reason: str) -> Raised:
    """Describe an exception that can't be sent whole; `reason` says why."""
    exc = _unwrapped(einfo.exception)
    return Raised(
        type=type(exc).__qualname__,
        module=type(exc).__module__,
        args=[f"{utf8_text(safe_repr(exc))[:1000]} ({reason})"],
        traceback=utf8_text(einfo.traceback)[-_LONGEST // 2 :],
        internal=bool(einfo.internal),
        requeue=bool(getattr(exc, "requeue", False)),
    )


def _unwrapped(exc: BaseException) -> BaseException:
    bare: BaseException = exc.exc if isinstance(exc, ExceptionWithTraceback) else exc
    return bare


def _sendable(when: Any) -> Any:
    """Return a retry's time for JSON: seconds from now, a datetime in ISO 8601, or else a repr."""
    if isinstance(when, datetime):
        return when.isoformat()
    return when if is_plain(when) else utf8_text(safe_repr(when))


# -- the reply, read by the worker


def decode_end(app: Celery, reply: Traced | Returned) -> End:
    """Return how a child's job ended, in the types that prefork would give Celery.

    Arguments:
        app: the worker's app.
        reply: the child's reply.
    """
    if isinstance(reply, Returned):
        return End(False, decode_returned(reply), returned=True)
    if reply.raised is None:
        return End(False, (0, reply.result, reply.runtime))
    exc = _rebuilt(app, reply.raised)
    if isinstance(exc, MemoryError):
        exc = TaskMemoryError(f"the task ran out of memory: {exc}")
    einfo = _exception_info(exc, reply.raised)
    return End(True, einfo) if reply.escaped else End(False, (1, einfo, reply.runtime))


def _exception_info(exc: BaseException, raised: Raised) -> ExceptionInfo:
    try:
        raise exc
    except BaseException:
        einfo = ExceptionInfo()
    # On prefork it was pickled: it is the exception itself, with the child's traceback.
    einfo.exception = rebuild_exc(exc, f'\n"""\n{raised.traceback}"""')
    einfo.traceback = raised.traceback
    einfo.internal = raised.internal
    return einfo


def _rebuilt(app: Celery, raised: Raised) -> BaseException:
    if raised.module == _PREDICATES:
        if raised.type == _RETRY:
            return _retry(app, raised)
        if raised.type == _REJECT:
            rejected: BaseException = Reject(*raised.args, requeue=raised.requeue)
            return rejected
        if raised.type == _IGNORE:
            ignored: BaseException = Ignore()
            return ignored
    words = {"exc_type": raised.type, "exc_module": raised.module, "exc_message": raised.args}
    try:
        exc: BaseException = app.backend.exception_to_python(words)
    except Exception as refused:
        # Celery refuses a name that is not that of an exception class.
        return refused
    return exc


def _retry(app: Celery, raised: Raised) -> BaseException:
    cause = raised.cause
    exc = _rebuilt(app, cause) if isinstance(cause, Raised) else cause
    retry: BaseException = Retry(raised.message, exc, _moment(raised.when))
    return retry


def _moment(when: Any) -> Any:
    """Return the time that `_sendable` got, or its repr."""
    try:
        return datetime.fromisoformat(when) if isinstance(when, str) else when
    except ValueError:
        return when
