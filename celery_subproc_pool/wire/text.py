"""Makes text that children write safe for a log."""

from __future__ import annotations

import re

__all__ = ("CONTROLS", "QUOTED_BYTES", "printable", "quote", "visible")

#: The most bytes of an unusable line that a message quotes.
QUOTED_BYTES = 200

#: Characters that could forge a log record or control a terminal, as the inside of a regular
#: expression's ``[...]``. The tab is not among them.
CONTROLS = "\\x00-\\x08\\x0a-\\x1f\\x7f-\\x9f\u2028\u2029"

_CONTROL = re.compile(f"[{CONTROLS}]")


def printable(text: str) -> str:
    """Return `text` with control characters escaped, so that it stays on one line of a log."""
    return _CONTROL.sub(lambda match: _escaped(match[0]), text)


def visible(text: str) -> str:
    """Return `text` with every invisible character escaped, also tabs and unusual spaces."""
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def quote(line: bytes, length: int | None = None) -> str:
    """Return the start of `line` (`QUOTED_BYTES` at most) as text that is safe to log.

    Arguments:
        line: a line, or its start.
        length: the bytes of the whole line, if `line` is only its start.
    """
    length = len(line) if length is None else length
    if length <= QUOTED_BYTES:
        return repr(bytes(line))
    return f"{bytes(line[:QUOTED_BYTES])!r}... ({length} bytes)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
