"""Calls: requests to run a callable that is not a task, and what it returns.

The callable and its arguments go to the child as a pickle. What it returns comes back as JSON: the
worker unpickles nothing that a child sends. Both ends are here, so that they agree. A call that
raises is encoded as the end of a task is: see `codec`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from kombu.utils.encoding import safe_repr

from ..errors import CallError
from ..wire.json_lines import encode
from ..wire.python import Returned, TaskMessage, TaskRequest
from .values import is_plain, utf8_text

__all__ = ("call", "decode_returned", "encode_call", "encode_returned", "name_of")

#: Bytes of the longest returned value that is sent as JSON. It is below the default of
#: `max_message_bytes`, which is the longest line that the worker takes.
_LONGEST_VALUE = 1 << 25

#: Characters of the longest repr that is sent instead of a value.
_LONGEST_REPR = 1 << 20


def name_of(target: Any) -> str:
    """Return a name for the callable `target` in logs: its module and name, in ASCII."""
    try:
        full = f"{target.__module__}.{target.__qualname__}"
    except Exception:
        # An object that can be called, not a function. Some objects answer to every attribute.
        full = f"{type(target).__module__}.{type(target).__qualname__}"
    return full.encode("unicode_escape").decode("ascii")


def encode_call(call_id: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """Encode the request to call ``target(*args, **kwargs)`` in a Python child.

    Arguments:
        call_id: the id of this request. Callers may use their own ids twice.
        target: the callable.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        CallError: one of them can't be pickled. The message says which, and why.
    """
    name = name_of(target)
    try:
        call = pickle.dumps((target, tuple(args), dict(kwargs)), protocol=4)
    except Exception as exc:
        raise CallError(
            f"{name} can't be sent to a Python child, as {_blame(target, args, kwargs)} can't be"
            f" pickled: {type(exc).__name__}: {exc}"
        ) from exc
    return encode(TaskRequest(id=call_id, payload=TaskMessage(task=name, call=call)))


def _blame(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return words for the first of them that can't be pickled."""
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
    """Do in the child what `encode_call` was asked for.

    Returns:
        What the callable returns.

    Raises:
        CallError: this interpreter can't unpickle the callable or its arguments.
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


def encode_returned(call_id: str, value: Any) -> bytes:
    """Encode the reply to a call: what the callable returned, as JSON or else as its repr."""
    try:
        if is_plain(value):
            line = encode(Returned(id=call_id, value=value))
            if len(line) <= _LONGEST_VALUE:
                return line
    except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        # The value refers to itself, or holds a number or a string that JSON lacks.
        pass
    return encode(Returned(id=call_id, words=utf8_text(safe_repr(value))[:_LONGEST_REPR]))


def decode_returned(reply: Returned) -> Any:
    """Return what the callable returned, or its repr."""
    return reply.value if reply.words is None else reply.words
