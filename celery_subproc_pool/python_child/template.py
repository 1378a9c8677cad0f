"""A template: a process that has loaded the project, and forks a child whenever the worker asks.

What it has loaded is shared by all children that it forks. It stays single-threaded, holds no
connection and runs no task. So what prefork is blamed for, sockets and locks that a fork copies,
can't happen: `audit` looks whether that holds, and the worker starts children as programs if not.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from ..serve import write_all
from ..wire.environment import STDERR, STDOUT, TEMPLATE

__all__ = ("Birth", "audit", "serve_forks", "template_socket")

#: Bytes of the longest order.
LONGEST = 4096

#: Descriptors that an order brings: stdin, stdout, stderr, and the worker's stdout and stderr.
MOST_DESCRIPTORS = 5

#: Modules that do not survive a fork once they are loaded: they begin to work at their import.
NOT_FORKABLE = ("grpc._cython.cygrpc",)

#: Places of devices that do not survive a fork once they are open.
DEVICES = ("/dev/nvidia", "/dev/dri/", "/dev/kfd")


class Birth(NamedTuple):
    """What a forked child begins with."""

    slot: int
    #: The descriptors of its pipes.
    requests: int
    replies: int
    #: The worker's own streams, for the time after its boot; None if it has none.
    stdout: int | None
    stderr: int | None


def template_socket() -> socket.socket | None:
    """Return the socket by which the worker asks a template to fork; None if this is none."""
    number = os.environ.pop(TEMPLATE, None)
    if number is None:
        return None
    orders = socket.socket(fileno=int(number))
    orders.set_inheritable(False)
    return orders


def audit(own: socket.socket, more: Sequence[str] = ()) -> str | None:
    """Return why this process must not be forked, in words; None if it may be.

    Arguments:
        own: the socket by which the worker asks.
        more: modules that do not survive a fork.
    """
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        return f"importing the project starts a thread ({_names(threads)})"
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:") and int(name) != own.fileno():
                return f"importing the project opens a socket ({_peer(int(name))})"
            if target.startswith(DEVICES):
                return f"importing the project opens the device {target}"
            if "io_uring" in target:
                return "importing the project opens an io_uring"
    for module in (*NOT_FORKABLE, *more):
        if module in sys.modules:
            return f"importing the project loads {module}, which does not survive a fork"
    return None


def _names(threads: Sequence[str]) -> str:
    import threading

    known = [each.name for each in threading.enumerate() if each is not threading.main_thread()]
    return ", ".join(known) or f"{len(threads) - 1} that Python does not know"


def _peer(descriptor: int) -> str:
    copy = socket.socket(fileno=os.dup(descriptor))
    try:
        return f"to {copy.getpeername()}"
    except OSError:
        return "not connected"
    finally:
        copy.close()


def serve_forks(orders: socket.socket, replies: int, why_not: str | None) -> Birth:
    """Say that this process is ready, and fork for each order. Return in each forked child; in the
    template itself, never.

    Arguments:
        orders: where the worker asks.
        replies: the descriptor for replies.
        why_not: why this process must not be forked; None if it may be.
    """
    if why_not is not None:
        _say(replies, status="unfit", reason=why_not)
        os._exit(0)
    # The zombies of children stay until the worker has them reaped.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.collect()
    # What is there now is for good. Without this, the collector would write to all of it, and each
    # child would get its own copy.
    gc.freeze()
    _say(replies, status="ready", pid=os.getpid())
    while True:
        data, descriptors, _, _ = socket.recv_fds(orders, LONGEST, MOST_DESCRIPTORS)
        if not data:
            os._exit(0)
        order = json.loads(data)
        if "reap" in order:
            for pid in order["reap"]:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            continue
        birth = _fork(order, descriptors, orders, replies)
        if birth is not None:
            return birth


def _fork(
    order: dict[str, object], descriptors: list[int], orders: socket.socket, replies: int
) -> Birth | None:
    """Fork, and tell the worker. Return None in the template."""
    begun, begins = os.pipe()
    try:
        pid = os.fork()
    except OSError as exc:
        _say(replies, status="failed", child=order["child"], reason=str(exc))
        pid = -1
    if pid == 0:
        os.setsid()
        # This tells the template that the session is there: signals to its group arrive.
        os.close(begins)
        os.close(begun)
        orders.close()
        os.close(replies)
        return _born(order, descriptors)
    os.close(begins)
    os.read(begun, 1)
    os.close(begun)
    for descriptor in descriptors:
        os.close(descriptor)
    if pid > 0:
        _say(replies, status="forked", child=order["child"], pid=pid)
    return None


def _born(order: dict[str, object], descriptors: list[int]) -> Birth:
    requests, replies, stderr, *more = descriptors
    os.dup2(stderr, 2)
    os.dup2(2, 1)
    os.close(stderr)
    for descriptor in (requests, replies, *more):
        os.set_inheritable(descriptor, False)
    names = order["handed_over"]
    assert isinstance(names, list)
    handed_over = dict(zip(names, more, strict=True))
    slot = order["slot"]
    assert isinstance(slot, int)
    return Birth(slot, requests, replies, handed_over.get(STDOUT), handed_over.get(STDERR))


def _say(descriptor: int, **fields: object) -> None:
    try:
        write_all(descriptor, json.dumps(fields).encode() + b"\n")
    except BrokenPipeError:
        # The worker is gone.
        os._exit(0)
