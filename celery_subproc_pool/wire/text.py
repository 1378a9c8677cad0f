"""Puts what children write into words that are safe to log.

Layer: standard library only; imports nothing of ours. Pure.
"""

from __future__ import annotations

import re

__all__ = ("CONTROLS", "QUOTED_BYTES", "printable", "quote", "visible")

#: Bytes of an unusable line that are quoted to the person who reads the log.
QUOTED_BYTES = 200

#: What could forge a record of a log or take over a terminal, but for the tab: for a set of
#: characters in a regular expression.
CONTROLS = "\\x00-\\x08\\x0a-\\x1f\\x7f-\\x9f\u2028\u2029"

_CONTROL = re.compile(f"[{CONTROLS}]")


def printable(text: str) -> str:
    """Return `text` with its control characters escaped, so that it stays one line of a log."""
    return _CONTROL.sub(lambda match: _escaped(match[0]), text)


def visible(text: str) -> str:
    """Return `text` with all escaped that can't be seen, tabs and odd spaces included."""
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def quote(line: bytes, length: int | None = None) -> str:
    """Return the start of `line` (200 bytes at most) as text that is safe to log.

    Arguments:
        line: a line, or its start.
        length: how many bytes the line has, if `line` is only its start.
    """
    length = len(line) if length is None else length
    if length <= QUOTED_BYTES:
        return repr(bytes(line))
    return f"{bytes(line[:QUOTED_BYTES])!r}... ({length} bytes)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
