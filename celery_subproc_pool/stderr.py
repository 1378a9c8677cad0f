"""Text lines out of a child's stderr, in bounded memory and safe to log. Performs no I/O.

Layer: above `protocol`.
"""

from __future__ import annotations

from collections import deque

from .protocol import printable

__all__ = ("StderrLines",)

#: Bytes of a line that are kept; a longer line is cut into pieces of this size.
LINE_BYTES = 8192

#: Lines that are kept for error messages.
TAIL_LINES = 5


class StderrLines:
    """Cuts a child's stderr into lines and keeps the last of them."""

    __slots__ = ("_open", "tail")

    def __init__(self) -> None:
        #: The last lines, oldest first.
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._open = b""

    def feed(self, data: bytes) -> list[str]:
        """Take in `data`; empty means the end. Return the lines that it completes."""
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
