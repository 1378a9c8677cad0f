"""Cuts a child's stdout and stderr into lines. Performs no I/O."""

from __future__ import annotations

from collections import deque

from .text import QUOTED_BYTES, printable, quote

__all__ = ("LineBuffer", "StderrLines")

#: The longest line of stderr, in bytes. A longer one is cut into pieces of this size.
LINE_BYTES = 8192

#: The number of last lines of stderr that are kept for error messages.
TAIL_LINES = 5


class LineBuffer:
    """Cuts a stream of bytes into lines, and keeps at most `max_bytes` of an unfinished one.

    Arguments:
        max_bytes: the longest line allowed, in bytes, without its newline.
    """

    __slots__ = ("_open", "_open_bytes", "max_bytes", "overlong")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        #: The start of a line that was too long, or None. Everything after it is dropped.
        self.overlong: bytes | None = None
        self._open: list[bytes] = []
        self._open_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Add `data`.

        Returns:
            The lines that `data` completes, without their newlines. Once a line is longer than
            `max_bytes`, `overlong` is set, and neither that line nor a later one is returned.
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

    @property
    def has_open(self) -> bool:
        """Whether there is an unfinished line."""
        return bool(self._open)

    def quote_open(self) -> str:
        """Return the start of the unfinished line, safe to log; empty if there is none."""
        # No piece is empty, so this many pieces have enough bytes.
        start = b"".join(self._open[:QUOTED_BYTES])
        return quote(start, self._open_bytes) if start else ""

    def take_open(self) -> bytes:
        """Return the unfinished line, and forget it."""
        rest = b"".join(self._open)
        self._open.clear()
        self._open_bytes = 0
        return rest

    def _overflow(self, line: bytes) -> None:
        self.overlong = line[:QUOTED_BYTES]
        self._open.clear()
        self._open_bytes = 0


class StderrLines:
    """Cuts a child's stderr into lines, and keeps the last `TAIL_LINES`."""

    __slots__ = ("_open", "tail")

    def __init__(self) -> None:
        #: The last lines, oldest first.
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._open = b""

    def feed(self, data: bytes) -> list[str]:
        """Add `data`; empty bytes mean the end.

        Returns:
            The lines that `data` completes, safe to log.
        """
        pieces = (self._open + data).split(b"\n")
        self._open = pieces.pop()
        while len(self._open) >= LINE_BYTES:
            pieces.append(self._open[:LINE_BYTES])
            self._open = self._open[LINE_BYTES:]
        if not data and self._open:
            pieces.append(self._open)
            self._open = b""
        lines = [
            printable(piece[start : start + LINE_BYTES].decode("utf-8", "backslashreplace"))
            for piece in pieces
            for start in range(0, max(len(piece), 1), LINE_BYTES)
        ]
        lines = [line.removesuffix("\\r") for line in lines]
        self.tail.extend(lines)
        return lines
