"""One template: its process, its streams, and the children that it is to fork."""

from __future__ import annotations

import os
import socket

from ..core.model import Child, Group
from ..core.outcomes import describe_exit
from ..wire.lines import LineBuffer, StderrLines
from .starting import Program, Streams

__all__ = ("Template",)

#: Seconds to wait for the exit of a template that has closed its stdout.
EXIT_PATIENCE = 0.1

#: Bytes of the longest line that a template writes: the traceback of a boot that failed.
LONGEST_LINE = 1 << 20


class Template:
    """One template.

    Arguments:
        group: whose children it forks.
        program: its process.
        orders: our end of the socket by which it is asked.
        streams: our ends of its stdin, its stdout and, if there is a pipe for it, its stderr.
    """

    def __init__(
        self, group: Group, program: Program, orders: socket.socket, streams: list[int]
    ) -> None:
        self.group = group
        self.boot = group.boot
        self.program = program
        self.pid = program.pid
        self.orders = orders
        self.stdin, self.stdout = streams[:2]
        self.stderr = streams[2] if len(streams) > 2 else None
        #: What it has written there. While it boots, it writes in the place of its children.
        self.words = StderrLines()
        #: Until when it must be ready; None if it is.
        self.deadline: float | None = None
        self.is_ready = False
        self.is_gone = False
        #: Children that it has not forked yet, in order, each with its pipes once it was asked.
        self.awaited: dict[int, tuple[Child, Streams | None]] = {}
        #: How many children it has forked, and the seconds that this took, from asking on.
        self.forks = 0
        self.seconds = 0.0
        #: When it was asked for each child that it has still to fork.
        self.asked_at: dict[int, float] = {}
        #: The pids of its children that are not reaped.
        self.children: set[int] = set()
        self.lines = LineBuffer(LONGEST_LINE)
        #: What is left to write to its stdin: the first line.
        self.rest = memoryview(group.boot)

    @property
    def descriptors(self) -> list[int]:
        """Our ends of its pipes."""
        ends = (self.stdin, self.stdout, self.stderr)
        return [each for each in ends if each is not None]

    def close(self) -> None:
        """Close our ends."""
        self.orders.close()
        for descriptor in self.descriptors:
            os.close(descriptor)

    def why_it_ended(self) -> str:
        """Return how it has ended, and its last words."""
        self.program.wait(EXIT_PATIENCE)
        status = self.program.status()
        how = "it closed its stdout" if status is None else f"it exited: {describe_exit(status)}"
        return how + self.last_words

    @property
    def last_words(self) -> str:
        """The last lines of its stderr, in words."""
        lines = " | ".join(self.words.tail)
        return f"; its last stderr lines: {lines}" if lines else ""
