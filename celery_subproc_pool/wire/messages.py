"""The wire protocol, performing no I/O: messages, encode and decode.

Layer: above `errors` and `printing` only. Must not import processes, clocks or Celery.
Whatever bytes a child sends, `decode_reply` gives a `Reply` or raises `ProtocolFault`.
The rules are those of ``docs/protocol.md``.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from ..errors import ProtocolFault, RequestEncodeError
from .text import CONTROLS, QUOTED_BYTES, quote, visible

__all__ = (
    "DEFAULT_ERROR_MESSAGE",
    "DEFAULT_RETRY_AFTER",
    "PROTOCOL",
    "CancelReason",
    "Error",
    "Fatal",
    "Feature",
    "Ignore",
    "Log",
    "Message",
    "Ok",
    "Progress",
    "Ready",
    "Reject",
    "Reply",
    "Retry",
    "Throttled",
    "around_greeting",
    "decode_greeting",
    "decode_line",
    "decode_reply",
    "encode",
    "encode_cancel",
    "encode_request",
    "is_explained",
)

#: Seconds to wait when a `throttled` reply names none.
DEFAULT_RETRY_AFTER = 60.0

#: What an `error` reply without a message means.
DEFAULT_ERROR_MESSAGE = "worker reported error"

#: The number of the protocol that this is, in a child's `Ready`.
PROTOCOL = 1

#: A hundred years: what lies beyond is no countdown, and overflows dates.
_MAX_SECONDS = 100 * 365 * 86400.0

#: It stands in logs, as it is.
TaskName = Annotated[str, msgspec.Meta(pattern=rf"\A[^{CONTROLS}]+\Z")]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=_MAX_SECONDS)]


class Reply(msgspec.Struct, tag_field="status", frozen=True, kw_only=True):
    """What a child answers. `id` is the request's, or None from a child that does not echo it."""

    id: str | None = None
    #: Whether the child asks to be replaced.
    retire: bool | None = None


class Ok(Reply, tag="ok", frozen=True, kw_only=True):
    """The job is done; `result` is the task's return value."""

    result: Any = None


class Error(Reply, tag="error", frozen=True, kw_only=True):
    """The job failed; the child is healthy."""

    message: str | None = None
    type: str | None = None
    traceback: str | None = None


class Throttled(Reply, tag="throttled", frozen=True, kw_only=True):
    """Not now: to be tried again after `retry_after_secs` seconds."""

    retry_after_secs: Seconds | None = None


class Retry(Reply, tag="retry", frozen=True, kw_only=True):
    """The job failed and is worth another try, after `countdown` seconds."""

    countdown: Seconds | None = None
    message: str | None = None


class Reject(Reply, tag="reject", frozen=True, kw_only=True):
    """The message is given back to the broker, to be delivered again if `requeue`."""

    requeue: bool | None = False


class Ignore(Reply, tag="ignore", frozen=True, kw_only=True):
    """The job is done; nothing is stored."""


class Feature(enum.Enum):
    """What a child may announce, beyond the core of the protocol."""

    # Its members are looked up for each job: by identity, which C does, as there is one of each.
    __hash__ = object.__hash__

    #: It sends `Progress`, or `Log`.
    PROGRESS = "progress"
    LOG = "log"
    #: It can be told to end a job.
    CANCEL = "cancel"
    #: It can have several jobs at a time, and answers in any order.
    MULTIPLEX = "multiplex"


class CancelReason(enum.Enum):
    """Why a child is told to end a job."""

    SOFT_TIME_LIMIT = "soft_time_limit"
    TIME_LIMIT = "time_limit"
    REVOKED = "revoked"
    SHUTDOWN = "shutdown"


class Progress(msgspec.Struct, tag_field="status", tag="progress", frozen=True, kw_only=True):
    """How far a job is."""

    id: str | None = None
    #: None is as good as none at all, here and in `Log`.
    meta: dict[str, Any] | None = None


class Log(msgspec.Struct, tag_field="status", tag="log", frozen=True, kw_only=True):
    """Something for the worker's log, about the job `id` or none."""

    id: str | None = None
    level: str | None = None
    message: str | None = None


class Ready(msgspec.Struct, tag_field="status", tag="ready", frozen=True, kw_only=True):
    """A child with a handshake has booted."""

    protocol: int
    #: The process that does the work, if it knows; under a wrapper it may be another than the
    #: one that the pool started.
    pid: int | None = None
    #: What it calls itself.
    name: str | None = None
    #: The names of tasks that it does.
    tasks: tuple[TaskName, ...] | None = None
    #: Names of `Feature`, and of others, which came after this pool.
    features: tuple[str, ...] | None = None
    #: How many jobs it can have at a time, if it can `multiplex`; None: as many as it gets.
    max_in_flight: Annotated[int, msgspec.Meta(ge=1)] | None = None

    @property
    def known_features(self) -> frozenset[Feature]:
        """The features that this pool knows too."""
        return frozenset(each for each in Feature if each.value in (self.features or ()))

    @property
    def unknown_features(self) -> tuple[str, ...]:
        """The others."""
        known = {each.value for each in Feature}
        return tuple(each for each in self.features or () if each not in known)


class Fatal(msgspec.Struct, tag_field="status", tag="fatal", frozen=True, kw_only=True):
    """A child with a handshake can't boot, and says why."""

    message: str = "no reason given"


#: What a child that has booted may write: its final replies, and what it says beside.
Message = Reply | Progress | Log

_Message = TypeVar("_Message")

_replies: msgspec.json.Decoder[Message] = msgspec.json.Decoder(
    Ok | Error | Throttled | Retry | Reject | Ignore | Progress | Log
)
_greetings: msgspec.json.Decoder[Ready | Fatal] = msgspec.json.Decoder(Ready | Fatal)
_encoder = msgspec.json.Encoder()

#: What some languages take for the end of a line beside a newline, and JSON does not: as it stands
#: in UTF-8, and escaped.
_LINE_ENDS = tuple(
    (character.encode(), b"\\u%04x" % ord(character)) for character in "\u2028\u2029\x85"
)


def decode_reply(line: bytes) -> Message:
    """Decode one line of an external child's stdout.

    Arguments:
        line: the line's bytes, without the newline.

    Returns:
        A final reply, one of the six kinds; or, of a child that has announced such, what it says
        beside.

    Raises:
        ProtocolFault: the line is no reply; the message says why and quotes its start.
    """
    try:
        return decode_line(_replies, line)
    except ProtocolFault:
        if _is_ready(line):
            raise ProtocolFault(
                "it says that it is ready, and is not asked to: set handshake for its group,"
                f" in the line {quote(line)}"
            ) from None
        raise


def _is_ready(line: bytes) -> bool:
    try:
        return isinstance(decode_greeting(line), Ready)
    except ProtocolFault:
        return False


def decode_greeting(line: bytes) -> Ready | Fatal | None:
    """Decode a line that a child with a handshake wrote before it was ready.

    Arguments:
        line: the line's bytes, without the newline.

    Returns:
        What it says of itself; None if the line is no JSON object, but some output of its boot.

    Raises:
        ProtocolFault: it is a JSON object, and not one that says ready or fatal.
    """
    if not _unmarked(line).lstrip(b"\0 \t\r\v\f").startswith(b"{"):
        return None
    try:
        greeting = decode_line(_greetings, line)
    except ProtocolFault as exc:
        raise ProtocolFault(f"it did not say that it is ready (handshake), but: {exc}") from None
    if isinstance(greeting, Ready) and greeting.protocol != PROTOCOL:
        raise ProtocolFault(
            f"it speaks protocol {greeting.protocol}, and this pool protocol {PROTOCOL},"
            f" in the line {quote(line)}"
        )
    return greeting


def around_greeting(line: bytes) -> str | None:
    """Say what stands around the greeting in `line`, which `decode_greeting` took for output; None
    if there is none in it."""
    before, brace, rest = line.partition(b"{")
    if brace and b'"status"' in rest and b'"ready"' in rest:
        return f"{quote(before)} stands before the greeting in its line {quote(line)}"
    return None


def decode_line(decoder: msgspec.json.Decoder[_Message], line: bytes) -> _Message:
    try:
        if not line.isascii():
            # msgspec does not look into the strings of fields that it skips.
            line.decode()
        return decoder.decode(line)
    except RecursionError:
        # Python's own words speak of its stack, differently in each version.
        raise ProtocolFault(f"nested too deeply, in the line {quote(line)}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        # msgspec quotes the child: as much of it as there is, control characters and all.
        reason = visible(str(exc)[:QUOTED_BYTES])
        hint = _explain(line, reason)
        raise ProtocolFault(
            f"{reason}{f' ({hint})' if hint else ''}, in the line {quote(line)}"
        ) from None


#: What some languages write for a text that they have cut in the midst of a character.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

#: What may stand before a text, invisibly, and what each is called.
_MARKS = {
    b"\xef\xbb\xbf": "a byte order mark (U+FEFF)",
    b"\xff\xfe": "the byte order mark of UTF-16",
    b"\xfe\xff": "the byte order mark of UTF-16",
}

_HALF = "it has half of a pair of surrogates, which is no character?"
_MARKED = "write UTF-8 without one"
_TOO_LARGE = (
    "numbers go up to about 1.8e308, integers to 4300 digits: write what is larger as a string"
)


def _explain(line: bytes, reason: str) -> str:
    """Say what is wrong with a line that is meant to be a message; empty if nobody knows."""
    mark = next((name for mark, name in _MARKS.items() if line.startswith(mark)), None)
    if mark is not None:
        return f"it begins with {mark}: {_MARKED}"
    if "out of range" in reason:
        return _TOO_LARGE
    return _HALF if _SURROGATE.search(line) else ""


def _unmarked(line: bytes) -> bytes:
    for mark in _MARKS:
        line = line.removeprefix(mark)
    return line


def is_explained(reason: str) -> bool:
    """Whether `reason`, of a `ProtocolFault`, tells all that there is to do: no stray output is to
    blame."""
    return any(hint in reason for hint in (_HALF, _TOO_LARGE, _MARKED))


def encode(message: Any) -> bytes:
    """Encode `message`, a struct or mapping, as a line: one for whatever may count as the end of
    a line elsewhere.

    Raises:
        TypeError, ValueError, RecursionError or msgspec.MsgspecError: JSON can't hold it.
    """
    line = _encoder.encode(message)
    # One byte is found much faster than several, and most texts have none of these two.
    if 0xE2 in line or 0xC2 in line:
        line = _escape_line_ends(line)
    return line + b"\n"


def _escape_line_ends(line: bytes) -> bytes:
    """Return `line` without U+2028, U+2029 and U+0085: only strings can have held them."""
    for raw, escaped in _LINE_ENDS:
        line = line.replace(raw, escaped)
    return line


def encode_request(task_id: str, payload: Mapping[str, Any]) -> bytes:
    """Encode one request as a line.

    Arguments:
        task_id: the id that the child is to echo.
        payload: what the child gets as ``payload``.

    Returns:
        The line's bytes, with the newline.

    Raises:
        RequestEncodeError: a value has no JSON form; the message names the argument.
    """
    try:
        return encode({"id": task_id, "payload": payload})
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as exc:
        raise RequestEncodeError(_blame(payload, exc)) from exc


def encode_cancel(task_id: str, reason: CancelReason) -> bytes:
    """Encode as a line that the child is to end the job `task_id`."""
    return encode({"id": task_id, "cancel": reason})


def _blame(payload: Mapping[str, Any], error: Exception) -> str:
    for path, value in _leaves(payload):
        try:
            _encoder.encode(value)
        except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as exc:
            return f"{path} can't be sent to the child as JSON: {exc}"
    return f"the payload can't be sent to the child as JSON: {error}"


def _leaves(payload: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in payload.items():
        if isinstance(value, Mapping):
            # The pair, not the value alone: a key may be what JSON lacks.
            yield from ((f"{name}[{key!r}]", {key: inner}) for key, inner in value.items())
        elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            yield from ((f"{name}[{index}]", inner) for index, inner in enumerate(value))
        else:
            yield name, value
