"""The messages of the protocol, as in docs/protocol.md: requests, replies, the handshake.

In the order in which a child meets them: the request and its cancel, the six final replies, what
else a child may write about a job, the handshake and the features that it announces. The functions
below encode what the worker writes and decode what a child writes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from ..errors import ProtocolFault, RequestEncodeError
from .json_lines import ENCODE_ERRORS, decode_line, encode, without_mark
from .text import CONTROLS, quote

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
    "decode_reply",
    "encode_cancel",
    "encode_request",
)

#: The version of the protocol, which a child names in its `Ready`.
PROTOCOL = 1

#: Seconds to wait after a `throttled` reply that names none.
DEFAULT_RETRY_AFTER = 60.0

#: The message of an `error` reply that has none.
DEFAULT_ERROR_MESSAGE = "worker reported error"

#: A hundred years in seconds. More is no countdown, and overflows dates.
_MAX_SECONDS = 100 * 365 * 86400.0

#: The log shows names of tasks unescaped.
TaskName = Annotated[str, msgspec.Meta(pattern=rf"\A[^{CONTROLS}]+\Z")]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=_MAX_SECONDS)]


# -- requests: ``{"id": ..., "payload": {...}}`` and ``{"id": ..., "cancel": reason}``


class CancelReason(enum.Enum):
    """Why the worker tells a child to end a job."""

    SOFT_TIME_LIMIT = "soft_time_limit"
    TIME_LIMIT = "time_limit"
    REVOKED = "revoked"
    SHUTDOWN = "shutdown"


# -- final replies: one for each request


class Reply(msgspec.Struct, tag_field="status", frozen=True, kw_only=True):
    """A child's final reply."""

    #: The id of the request. None: the child does not echo it.
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
    """Not now: try the job again after `retry_after_secs` seconds."""

    retry_after_secs: Seconds | None = None


class Retry(Reply, tag="retry", frozen=True, kw_only=True):
    """The job failed and is worth another try, after `countdown` seconds."""

    countdown: Seconds | None = None
    message: str | None = None


class Reject(Reply, tag="reject", frozen=True, kw_only=True):
    """Give the message back to the broker, to be delivered again if `requeue`."""

    requeue: bool | None = False


class Ignore(Reply, tag="ignore", frozen=True, kw_only=True):
    """The job is done; store nothing."""


# -- other messages: any number, from a child that announced the feature


class Progress(msgspec.Struct, tag_field="status", tag="progress", frozen=True, kw_only=True):
    """How far a job is."""

    id: str | None = None
    #: None counts as left out.
    meta: dict[str, Any] | None = None


class Log(msgspec.Struct, tag_field="status", tag="log", frozen=True, kw_only=True):
    """A record for the worker's log, about the job `id` if it has one."""

    id: str | None = None
    #: None counts as left out, also for `message`.
    level: str | None = None
    message: str | None = None


#: What a child may write after its boot.
Message = Reply | Progress | Log


# -- the handshake: the first line of a child whose group has the setting `handshake`


class Feature(enum.Enum):
    """What a child may announce beyond the core of the protocol."""

    # Members are looked up for each job. There is one object of each, so identity serves as the
    # hash, and C computes it.
    __hash__ = object.__hash__

    #: The child sends `Progress`.
    PROGRESS = "progress"
    #: The child sends `Log`.
    LOG = "log"
    #: The child understands a cancel.
    CANCEL = "cancel"
    #: The child does several jobs at a time, and replies in any order.
    MULTIPLEX = "multiplex"


class Ready(msgspec.Struct, tag_field="status", tag="ready", frozen=True, kw_only=True):
    """The child has booted."""

    #: The version of the protocol that the child speaks.
    protocol: int
    #: The process that does the work, if the child knows it. Under a wrapper it is not the process
    #: that the pool started.
    pid: int | None = None
    #: The child's own name.
    name: str | None = None
    #: The names of the tasks that the child does.
    tasks: tuple[TaskName, ...] | None = None
    #: Values of `Feature`, and names of features newer than this pool.
    features: tuple[str, ...] | None = None
    #: The most jobs at a time of a child with `multiplex`. None: as many as it gets.
    max_in_flight: Annotated[int, msgspec.Meta(ge=1)] | None = None

    @property
    def known_features(self) -> frozenset[Feature]:
        """The features that this pool knows."""
        return frozenset(each for each in Feature if each.value in (self.features or ()))

    @property
    def unknown_features(self) -> tuple[str, ...]:
        """The names of features that this pool does not know."""
        known = {each.value for each in Feature}
        return tuple(each for each in self.features or () if each not in known)


class Fatal(msgspec.Struct, tag_field="status", tag="fatal", frozen=True, kw_only=True):
    """The child can't boot, and says why."""

    message: str = "no reason given"


# -- decoding

_replies: msgspec.json.Decoder[Message] = msgspec.json.Decoder(
    Ok | Error | Throttled | Retry | Reject | Ignore | Progress | Log
)
_greetings: msgspec.json.Decoder[Ready | Fatal] = msgspec.json.Decoder(Ready | Fatal)


def decode_reply(line: bytes) -> Message:
    """Decode one line that an external child wrote after its boot.

    Arguments:
        line: the line's bytes, without the newline.

    Returns:
        One of the six final replies, a `Progress` or a `Log`. Whether the child announced the last
        two is for the caller to check.

    Raises:
        ProtocolFault: the line is no such message. The text says why and quotes its start.
    """
    try:
        return decode_line(_replies, line)
    except ProtocolFault:
        if _is_ready(line):
            raise ProtocolFault(
                "it says that it is ready, but its group has no handshake: set handshake for its"
                " group,"
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
        The greeting. None: the line is no JSON object, but output of the boot.

    Raises:
        ProtocolFault: the line is a JSON object, but neither `ready` nor `fatal`; or the child
            speaks another version of the protocol.
    """
    if not without_mark(line).lstrip(b"\0 \t\r\v\f").startswith(b"{"):
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
    """Return a hint about a greeting that is not alone on its line; None if `line` has none.

    Arguments:
        line: a line that `decode_greeting` took for output of the boot.
    """
    before, brace, rest = line.partition(b"{")
    if brace and b'"status"' in rest and b'"ready"' in rest:
        return f"{quote(before)} stands before the greeting in its line {quote(line)}"
    return None


# -- encoding


def encode_request(task_id: str, payload: Mapping[str, Any]) -> bytes:
    """Encode one request as a line.

    Arguments:
        task_id: the id that the child must echo.
        payload: what the child gets as ``payload``.

    Returns:
        The line's bytes, with the newline.

    Raises:
        RequestEncodeError: JSON can't hold a value. The message names the argument.
    """
    try:
        return encode({"id": task_id, "payload": payload})
    except ENCODE_ERRORS as exc:
        raise RequestEncodeError(_blame(payload, exc)) from exc


def encode_cancel(task_id: str, reason: CancelReason) -> bytes:
    """Encode as a line that the child must end the job `task_id`."""
    return encode({"id": task_id, "cancel": reason})


def _blame(payload: Mapping[str, Any], error: Exception) -> str:
    for path, value in _leaves(payload):
        try:
            encode(value)
        except ENCODE_ERRORS as exc:
            return f"{path} can't be sent to the child as JSON: {exc}"
    return f"the payload can't be sent to the child as JSON: {error}"


def _leaves(payload: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in payload.items():
        if isinstance(value, Mapping):
            # The pair, not only the value: JSON may lack the key.
            yield from ((f"{name}[{key!r}]", {key: inner}) for key, inner in value.items())
        elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            yield from ((f"{name}[{index}]", inner) for index, inner in enumerate(value))
        else:
            yield name, value
