"""The wire protocol, performing no I/O: messages, line framing, encode and decode.

Layer: above `errors` only. Must not import processes, clocks or Celery.
Whatever bytes a child sends, `decode_reply` gives a `Reply` or raises `ProtocolFault`.
The rules are those of ``docs/protocol.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from .errors import ProtocolFault, RequestEncodeError

__all__ = (
    "DEFAULT_ERROR_MESSAGE",
    "DEFAULT_RETRY_AFTER",
    "Error",
    "Ignore",
    "LineBuffer",
    "Ok",
    "Reject",
    "Reply",
    "Retry",
    "Throttled",
    "decode_reply",
    "encode_request",
    "printable",
    "quote",
)

#: Seconds to wait when a `throttled` reply names none.
DEFAULT_RETRY_AFTER = 60.0

#: What an `error` reply without a message means.
DEFAULT_ERROR_MESSAGE = "worker reported error"

#: Bytes of an unusable line that are quoted to the person who reads the log.
QUOTED_BYTES = 200

#: A hundred years: what lies beyond is no countdown, and overflows dates.
_MAX_SECONDS = 100 * 365 * 86400.0

Seconds = Annotated[float, msgspec.Meta(ge=0, le=_MAX_SECONDS)]


class Reply(msgspec.Struct, tag_field="status", frozen=True, kw_only=True):
    """What a child answers. `id` is the request's, or None from a child that does not echo it."""

    id: str | None = None


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


_decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(
    Ok | Error | Throttled | Retry | Reject | Ignore
)
_encoder = msgspec.json.Encoder()


def decode_reply(line: bytes) -> Reply:
    """Decode one line of a child's stdout.

    Arguments:
        line: the line's bytes, without the newline.

    Returns:
        The reply: one of the six kinds.

    Raises:
        ProtocolFault: the line is no reply; the message says why and quotes its start.
    """
    try:
        if not line.isascii():
            # msgspec does not look into the strings of fields that it skips.
            line.decode()
        return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        # msgspec quotes the child: as much of it as there is, control characters and all.
        reason = "".join(map(_visible, str(exc)[:QUOTED_BYTES]))
        raise ProtocolFault(f"{reason}, in the line {quote(line)}") from None


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


#: What could forge a record of a log or take over a terminal, but for the tab.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def printable(text: str) -> str:
    """Return `text` with its control characters escaped, so that it stays one line of a log."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def quote(line: bytes) -> str:
    """Return the start of `line` (200 bytes at most) as text that is safe to log."""
    if len(line) <= QUOTED_BYTES:
        return repr(bytes(line))
    return f"{bytes(line[:QUOTED_BYTES])!r}... ({len(line)} bytes)"


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
        return _encoder.encode({"id": task_id, "payload": payload}) + b"\n"
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as exc:
        raise RequestEncodeError(_blame(payload, exc)) from exc


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


class LineBuffer:
    """Cuts a stream of bytes into lines, holding no more than `max_bytes` of an open one.

    Arguments:
        max_bytes: the longest line allowed, in bytes, without its newline.
    """

    __slots__ = ("_open", "_open_bytes", "max_bytes", "overlong")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        #: The start of a line that grew too long, or None. Nothing is kept after it.
        self.overlong: bytes | None = None
        self._open: list[bytes] = []
        self._open_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Take in `data`.

        Returns:
            The lines that it completes, without their newlines. Once a line is longer than
            `max_bytes`, `overlong` is set and neither that line nor a later one is returned.
        """
        if self.overlong is not None:
            return []
        *lines, rest = data.split(b"\n")
        if lines and self._open:
            lines[0] = b"".join((*self._open, lines[0]))
            self._open.clear()
            self._open_bytes = 0
        for number, line in enumerate(lines):
            if len(line) > self.max_bytes:
                self._overflow(line)
                return lines[:number]
        if rest:
            self._open.append(rest)
            self._open_bytes += len(rest)
            if self._open_bytes > self.max_bytes:
                self._overflow(b"".join(self._open))
        return lines

    def take_open(self) -> bytes:
        """Return what has come of an unfinished line, and forget it."""
        rest = b"".join(self._open)
        self._open.clear()
        self._open_bytes = 0
        return rest

    def _overflow(self, line: bytes) -> None:
        self.overlong = line[:QUOTED_BYTES]
        self._open.clear()
        self._open_bytes = 0
