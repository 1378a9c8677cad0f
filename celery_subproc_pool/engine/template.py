"""One template: its process, its streams, and the children that it is to fork."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Mapping
from contextlib import suppress

from ..core.model import Child, Group
from ..core.outcomes import describe_exit
from ..errors import SpawnError
from ..wire.environment import TEMPLATE
from ..wire.lines import LineBuffer, StderrLines
from .starting import Program, Streams

__all__ = ("READ_BYTES", "Template", "start_template")

#: Bytes that are read at a time.
READ_BYTES = 1 << 16

#: Children that one message has reaped.
MOST_REAPED = 100

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
        self.boot_deadline: float | None = None
        #: Until when it must be ready, or have forked; None if it has nothing to do.
        self.deadline: float | None = None
        self.is_ready = False
        self.is_gone = False
        #: Children that it has not forked yet, in order, each with its pipes once it was asked.
        self.awaited: dict[int, tuple[Child, Streams | None]] = {}
        #: How many children it has forked, and the seconds that this took, from asking on.
        self.forks = 0
        self.seconds = 0.0
        #: The number of the child that it was asked for, and when; None if it has forked it.
        self.asked: tuple[int, float] | None = None
        #: The pids of children that it has still to reap.
        self.to_reap: list[int] = []
        #: The pids of its children that are not reaped.
        self.children: set[int] = set()
        self.lines = LineBuffer(LONGEST_LINE)
        #: What is left to write to its stdin: the first line.
        self.rest = memoryview(group.boot)

    # -- what it reads

    def write_boot(self) -> None:
        """Write more of its first line."""
        try:
            self.rest = self.rest[os.write(self.stdin, self.rest) :]
        except BlockingIOError:
            pass
        except OSError:
            # Its end tells why.
            self.rest = self.rest[:0]

    def order(self, child: Child, streams: Streams) -> None:
        """Ask it to fork `child`, with the child's ends of `streams`.

        Raises:
            OSError: it can't be asked.
        """
        order = {
            "child": child.number,
            "slot": child.slot.number,
            "handed_over": list(streams.handed_over),
        }
        descriptors = [*streams.theirs, *streams.handed_over.values()]
        socket.send_fds(self.orders, [json.dumps(order).encode()], descriptors)

    def order_reaping(self) -> bool:
        """Ask it to reap children that have ended. Return False if that is to be tried again,
        because its socket is full."""
        while self.to_reap:
            try:
                self.orders.send(json.dumps({"reap": self.to_reap[:MOST_REAPED]}).encode())
            except BlockingIOError:
                return False
            except OSError:
                # It has ended, and with it the need.
                self.to_reap.clear()
            else:
                del self.to_reap[:MOST_REAPED]
        return True

    # -- what it writes

    def read_words(self) -> bool:
        """Take in what it has written to its stderr. Return whether more can come."""
        if self.stderr is None:
            return False
        try:
            data = os.read(self.stderr, READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        lines, name = self.words.feed(data), self.group.name
        if self.group.settings.stderr == "inherit":
            with suppress(OSError):
                os.write(2, data)
        else:
            log = logging.getLogger(f"celery_subproc_pool.child.{name}")
            for line in lines:
                log.info("[%s template pid %d] %s", name, self.pid, line)
        return bool(data)

    # -- its end

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


def start_template(group: Group, environ: Mapping[str, str]) -> Template:
    """Start a template for the children of `group`.

    Arguments:
        group: the group.
        environ: its environment.

    Raises:
        SpawnError: its program can't be started.
        OSError: there are no more descriptors.
    """
    settings = group.settings
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    streams = Streams("null" if settings.stderr == "null" else "log")
    try:
        environ = {**environ, TEMPLATE: str(theirs.fileno())}
        program = Program(settings.command, environ, settings.cwd, streams, [theirs.fileno()])
    except SpawnError:
        streams.close_ours()
        ours.close()
        raise
    finally:
        streams.close_theirs()
        theirs.close()
    for descriptor in streams.ours:
        os.set_blocking(descriptor, False)
    # A template that hangs must not hang the worker.
    ours.setblocking(False)
    return Template(group, program, ours, streams.ours)
