"""JSON on one line: encodes messages, decodes lines, and explains what is wrong with a line.

Whatever bytes a child sends, `decode_line` returns a message or raises `ProtocolFault`.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from ..errors import ProtocolFault
from .text import QUOTED_BYTES, quote, visible

__all__ = ("ENCODE_ERRORS", "decode_line", "encode", "is_explained", "without_mark")

#: What `encode` raises for a value that JSON can't hold.
ENCODE_ERRORS = (TypeError, ValueError, RecursionError, msgspec.MsgspecError)

_Message = TypeVar("_Message")

_encoder = msgspec.json.Encoder()

#: Characters that some languages take for the end of a line beside the newline, though JSON does
#: not: as UTF-8, and escaped.
_LINE_ENDS = tuple(
    (character.encode(), b"\\u%04x" % ord(character)) for character in "\u2028\u2029\x85"
)


def encode(message: Any) -> bytes:
    """Encode `message`, a struct or a mapping, as a line with its newline.

    It is one line for every reader: the line ends of other languages are escaped.

    Raises:
        TypeError, ValueError, RecursionError or msgspec.MsgspecError: JSON can't hold it.
    """
    line = _encoder.encode(message)
    # A search for one byte is much faster than one for several, and most texts have neither.
    if 0xE2 in line or 0xC2 in line:
        line = _escape_line_ends(line)
    return line + b"\n"


def _escape_line_ends(line: bytes) -> bytes:
    """Return `line` without U+2028, U+2029 and U+0085. In JSON only strings can hold them."""
    for raw, escaped in _LINE_ENDS:
        line = line.replace(raw, escaped)
    return line


def decode_line(decoder: msgspec.json.Decoder[_Message], line: bytes) -> _Message:
    """Decode one line that a child wrote.

    Arguments:
        decoder: a decoder of the messages that are allowed now.
        line: the line's bytes, without the newline.

    Returns:
        The message.

    Raises:
        ProtocolFault: the line is no such message. The text says why, hints at the usual cause if
            there is one, and quotes the start of the line. It is safe to log.
    """
    try:
        if not line.isascii():
            # msgspec does not check strings in fields that it skips.
            line.decode()
        return decoder.decode(line)
    except RecursionError:
        # Python's own text is about its stack, and differs between versions.
        raise ProtocolFault(f"nested too deeply, in the line {quote(line)}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        # msgspec quotes what the child wrote, at any length and with control characters.
        reason = visible(str(exc)[:QUOTED_BYTES])
        hint = _hint(line, reason)
        raise ProtocolFault(
            f"{reason}{f' ({hint})' if hint else ''}, in the line {quote(line)}"
        ) from None


# -- hints

#: One half of a surrogate pair. Some languages write it for a text cut inside a character.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

#: Invisible bytes that may stand before a text, and their names.
_MARKS = {
    b"\xef\xbb\xbf": "a byte order mark (U+FEFF)",
    b"\xff\xfe": "the byte order mark of UTF-16",
    b"\xfe\xff": "the byte order mark of UTF-16",
}

_HALF = "does it have half of a pair of surrogates, which is no character?"
_MARKED = "write UTF-8 without one"
_TOO_LARGE = (
    "numbers go up to about 1.8e308, integers to 4300 digits: write what is larger as a string"
)


def is_explained(reason: str) -> bool:
    """Return whether `reason`, the text of a `ProtocolFault`, has a hint that says what to do.

    A caller then need not suggest that stray output is the cause.
    """
    return any(hint in reason for hint in (_HALF, _TOO_LARGE, _MARKED))


def without_mark(line: bytes) -> bytes:
    """Return `line` without a byte order mark."""
    for mark in _MARKS:
        line = line.removeprefix(mark)
    return line


def _hint(line: bytes, reason: str) -> str:
    """Return what is wrong with a line that should be a message; empty if that is unknown."""
    mark = next((name for mark, name in _MARKS.items() if line.startswith(mark)), None)
    if mark is not None:
        return f"it begins with {mark}: {_MARKED}"
    if "out of range" in reason:
        return _TOO_LARGE
    return _HALF if _SURROGATE.search(line) else ""
