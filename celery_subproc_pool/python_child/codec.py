"""Celery's task messages on their way to a Python child, and what its trace of a task came to.

Layer: above `protocol`; imports Celery. Both ends stand here, the worker's and the child's, so that
they agree. Ends of tasks travel as JSON, in the words of Celery's own JSON results, never as a
pickle; requests are a pickle only where JSON would change them, and come from the worker.
Callables that are no tasks go to the child as a pickle; what they return comes back as JSON.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback, rebuild_exc
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry
from kombu.utils.encoding import safe_repr

from ..errors import CallError, TaskMemoryError
from ..wire import messages
from ..wire.python import Raised, Returned, TaskMessage, TaskRequest, Traced

__all__ = (
    "End",
    "Recipe",
    "call",
    "decode_end",
    "encode_call",
    "encode_end",
    "encode_task",
    "name_of",
    "recipe_of",
    "task_arguments",
)

#: Of the longest exception that is worth being sent whole, in bytes.
_LONGEST = 1 << 20

#: Of the longest value that a callable may return as JSON, in bytes: no line may be as long as
#: `max_message_bytes`.
_LONGEST_VALUE = 1 << 25

_PLAIN = frozenset((str, int, bool, type(None)))

#: What binding a task to an app puts into its class, beside settings.
_OF_THE_APP = ("app", "run", "request_stack")

#: Celery's own exceptions, which mean the same whatever class of a project derives from them.
_RETRY, _REJECT, _IGNORE = "Retry", "Reject", "Ignore"
_PREDICATES = "celery.exceptions"


class Recipe(NamedTuple):
    """How to make a task that importing its module does not make."""

    #: The class of the task; or its function, and the arguments of ``app.task``.
    target: Any
    options: dict[str, Any] | None


class End(NamedTuple):
    """How a child's trace ended, or its call of a callable, as the pool's callbacks want it."""

    #: Whether `result` is for the error callback: the tracer itself failed, or the callable.
    escaped: bool
    #: ``(failed, retval, runtime)`` as Celery's tracer returns it, what the callable returned, or
    #: what either raised.
    result: Any
    #: Whether `result` is what a callable returned.
    returned: bool = False


# -- the request


def encode_task(task_id: str, arguments: Sequence[Any]) -> bytes:
    """Encode the request for a Python child.

    Arguments:
        task_id: Celery's id of the task.
        arguments: what `celery.worker.request.Request.execute_using_pool` has for the tracer: the
            task's name and id, the request's headers, the body, its content type and encoding.

    Raises:
        pickle.PicklingError or TypeError: it holds an object that can't leave the process.
    """
    name, _, headers, body, content_type, content_encoding = arguments
    request = headers.copy()
    # The worker has deserialized the arguments into its own copy; the child does it again.
    request.pop("args", None)
    request.pop("kwargs", None)
    if content_type and _is_plain(request):
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
            return messages.encode(TaskRequest(id=task_id, payload=message))
        except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
            # A number or a string that JSON lacks.
            pass
    if isinstance(body, memoryview):
        body = body.tobytes()
    message = TaskMessage(
        task=name,
        content_type=content_type,
        content_encoding=content_encoding,
        pickled=pickle.dumps((request, body), protocol=4),
    )
    return messages.encode(TaskRequest(id=task_id, payload=message))


def task_arguments(request: TaskRequest) -> tuple[Any, ...]:
    """Return the arguments for the tracer, as `encode_task` was given them."""
    message = request.payload
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


def _is_plain(value: Any) -> bool:
    """Return whether JSON gives `value` back as it is, but for tuples, which become lists."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is dict:
        # For each task, so a loop: it costs half of what `all` does.
        for key, inner in value.items():
            if type(key) is not str or (type(inner) not in _PLAIN and not _is_plain(inner)):
                return False
        return True
    if kind is list or kind is tuple:
        return all(map(_is_plain, value))
    return kind is float and math.isfinite(value)


def _text_or_bytes(body: Any, content_encoding: str | None) -> tuple[str | None, bytes | None]:
    if isinstance(body, str):
        return body, None
    data = bytes(body)
    if content_encoding == "utf-8":
        # kombu takes text as decoded already (kombu/serialization.py).
        try:
            return data.decode(), None
        except UnicodeDecodeError:
            pass
    return None, data


# -- a callable that is no task


def name_of(target: Any) -> str:
    """Return what to call the callable `target` in logs: its module and name, in ASCII."""
    try:
        full = f"{target.__module__}.{target.__qualname__}"
    except Exception:
        # No function, but an object that can be called; some answer to every name.
        full = f"{type(target).__module__}.{type(target).__qualname__}"
    return full.encode("unicode_escape").decode("ascii")


def encode_call(call_id: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """Encode the request that has a Python child call ``target(*args, **kwargs)``.

    Arguments:
        call_id: an id of its own.
        target: the callable.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        CallError: they can't be pickled; the message says which of them, and why.
    """
    name = name_of(target)
    try:
        call = pickle.dumps((target, tuple(args), dict(kwargs)), protocol=4)
    except Exception as exc:
        raise CallError(
            f"{name} can't be sent to a Python child, as {_blame(target, args, kwargs)} can't be"
            f" pickled: {type(exc).__name__}: {exc}"
        ) from exc
    return messages.encode(TaskRequest(id=call_id, payload=TaskMessage(task=name, call=call)))


def _blame(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return which of them can't be pickled."""
    named = {
        "the callable": target,
        **{f"args[{number}]": value for number, value in enumerate(args)},
        **{f"kwargs[{name!r}]": value for name, value in kwargs.items()},
    }
    for what, value in named.items():
        try:
            pickle.dumps(value, protocol=4)
        except Exception:
            return what
    return "all of it together"


def call(request: TaskRequest) -> Any:
    """Call what `encode_call` was given, in the child; return what it returns.

    Raises:
        CallError: this interpreter can't unpickle it.
        BaseException: whatever the callable raises.
    """
    message = request.payload
    assert message.call is not None
    try:
        target, args, kwargs = pickle.loads(message.call)
    except Exception as exc:
        raise CallError(
            f"the Python child can't load {message.task} and its arguments: {type(exc).__name__}:"
            f" {exc}. Define it, and the classes of its arguments, in modules that a fresh"
            " interpreter can import"
        ) from exc
    return target(*args, **kwargs)


def _encode_returned(call_id: str, value: Any) -> bytes:
    try:
        if _is_plain(value):
            line = messages.encode(Returned(id=call_id, value=value))
            if len(line) <= _LONGEST_VALUE:
                return line
    except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        # It refers to itself, or has a number or a string that JSON lacks.
        pass
    return messages.encode(Returned(id=call_id, words=_text(safe_repr(value))[:_LONGEST]))


# -- the reply


def encode_end(app: Celery, task_id: str, end: End) -> bytes:
    """Encode a child's final reply: how its trace ended.

    Arguments:
        app: the child's app.
        task_id: Celery's id of the task.
        end: the end.
    """
    if end.returned:
        return _encode_returned(task_id, end.result)
    if not end.escaped:
        failed, retval, runtime = end.result
        if not failed:
            return messages.encode(Traced(id=task_id, result=_text(retval), runtime=runtime))
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
    return _encode_raised(task_id, _curtailed(einfo, reason), runtime, end.escaped)


def _encode_raised(task_id: str, raised: Raised, runtime: float | None, escaped: bool) -> bytes:
    return messages.encode(Traced(id=task_id, raised=raised, runtime=runtime, escaped=escaped))


def decode_end(app: Celery, reply: Traced | Returned) -> End:
    """Return what a child's reply stands for, in the types that prefork would give Celery.

    Arguments:
        app: the worker's app.
        reply: the reply.
    """
    if isinstance(reply, Returned):
        return End(False, reply.value if reply.words is None else reply.words, returned=True)
    if reply.raised is None:
        return End(False, (0, reply.result, reply.runtime))
    exc = _rebuilt(app, reply.raised)
    if isinstance(exc, MemoryError):
        exc = TaskMemoryError(f"the task ran out of memory: {exc}")
    einfo = _exception_info(exc, reply.raised)
    return End(True, einfo) if reply.escaped else End(False, (1, einfo, reply.runtime))


def _raised(app: Celery, einfo: ExceptionInfo) -> Raised:
    exc = _bare(einfo.exception)
    facts: dict[str, Any] = {
        "traceback": _text(einfo.traceback),
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
        reason = exc.reason if _is_plain(exc.reason) else _text(safe_repr(exc.reason))
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


def _curtailed(einfo: ExceptionInfo, reason: str) -> Raised:
    """Describe an exception that can't be sent as it is."""
    exc = _bare(einfo.exception)
    return Raised(
        type=type(exc).__qualname__,
        module=type(exc).__module__,
        args=[f"{_text(safe_repr(exc))[:1000]} ({reason})"],
        traceback=_text(einfo.traceback)[-_LONGEST // 2 :],
        internal=bool(einfo.internal),
        requeue=bool(getattr(exc, "requeue", False)),
    )


def _text(value: Any) -> str:
    """Return `value` as text that UTF-8 can hold."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _bare(exc: BaseException) -> BaseException:
    bare: BaseException = exc.exc if isinstance(exc, ExceptionWithTraceback) else exc
    return bare


def _exception_info(exc: BaseException, raised: Raised) -> ExceptionInfo:
    try:
        raise exc
    except BaseException:
        einfo = ExceptionInfo()
    # As if it had been pickled, as prefork does: the exception itself, with the child's traceback.
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
        # Celery refuses what is no exception's class.
        return refused
    return exc


def _retry(app: Celery, raised: Raised) -> BaseException:
    cause = raised.cause
    exc = _rebuilt(app, cause) if isinstance(cause, Raised) else cause
    retry: BaseException = Retry(raised.message, exc, _moment(raised.when))
    return retry


def _sendable(when: Any) -> Any:
    """Return the time of a retry for the wire: seconds from now, a datetime's text, or words."""
    if isinstance(when, datetime):
        return when.isoformat()
    return when if _is_plain(when) else _text(safe_repr(when))


def _moment(when: Any) -> Any:
    """Return what `_sendable` was given, as far as it can be told."""
    try:
        return datetime.fromisoformat(when) if isinstance(when, str) else when
    except ValueError:
        return when


def recipe_of(task: Any) -> bytes | None:
    """Return how to make `task` where no import makes it; None if that can't be told.

    A function that is a task's body from the moment it is defined can't be told: its name stands
    for the task. Importing its module makes the task.
    """
    kind = type(task)
    own: Mapping[str, Any] = vars(kind)
    target, options = kind, None
    if own.get("_decorated"):
        run = own["run"]
        bound = not isinstance(run, staticmethod)
        target = run if bound else run.__func__
        options = {
            key: value
            for key, value in own.items()
            if not key.startswith("_") and key not in _OF_THE_APP
        }
        options["bind"] = bound
        if kind.__bases__ != (task.app.Task,):
            options["base"] = kind.__bases__[0]
    try:
        return pickle.dumps(Recipe(target, options), protocol=4)
    except Exception:
        return None
