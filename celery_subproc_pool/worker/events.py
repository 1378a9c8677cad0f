"""What the worker tells about its children: Celery events, and in the log what is odd about them.

Like events of tasks, these are sent with ``-E``, or after the remote control command
`enable_events`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from celery import Celery
from celery.events import Event
from celery.utils.log import get_logger

from ..core.actions import Change, Recycled, Report, Started
from ..core.model import Child
from ..engine.reports import some_of
from ..settings import ROOT
from ..wire.messages import Feature
from ..wire.text import printable
from .intake import guard_consumer
from .routes import Routes

__all__ = ("ChildEvents", "ChildNews", "complaints")

logger = get_logger(__name__)

#: How many events wait for the worker's consumer, which starts after the pool.
MOST_EARLY = 1000


class ChildNews:
    """Acts on what becomes of children, on the engine's thread.

    Arguments:
        app: the worker's app.
        routes: gets the tasks that children announce.
        pool: the worker's pool.
    """

    def __init__(self, app: Celery, routes: Routes, pool: Any) -> None:
        self._app = app
        self._routes = routes
        self._pool = pool
        self._events = ChildEvents()
        #: Celery's, once the worker is ready.
        self._consumer: Any = None
        #: Groups that have greeted: complaints about them are in the log.
        self._greeted: set[str] = set()
        #: Groups that the log has a warning about soft limits for.
        self._untold: set[str] = set()

    def on_worker_ready(self, sender: Any, **_: Any) -> None:
        """Note the consumer `sender`, if it is this pool's. A receiver of `worker_ready`."""
        if sender.pool is self._pool:
            self._consumer = sender
            self._events.attach(sender)

    def changed(self, change: Change) -> None:
        """Act on a child that came into service, or was replaced by another."""
        group = change.child.group
        if isinstance(change, Started) and group.settings.handshake and not group.boot:
            self._greet(change.child)
        self._events.send(change)

    def untold_of_soft_limit(self, group: str) -> None:
        """Warn that the children of `group` can't be told that a soft time limit is over."""
        if group in self._untold:
            return
        self._untold.add(group)
        logger.warning(
            "The children of the group %s can't be told of soft time limits, and go on: set"
            " %s.children.%s.soft_timeout_signal if they know what to do with a signal, or let"
            " them announce 'cancel' in a handshake. This is said once",
            group,
            ROOT,
            group,
        )

    def _greet(self, child: Child) -> None:
        """Act on the handshake of `child`."""
        name = child.group.name
        new = self._routes.announce(name, child.tasks) if child.tasks else []
        if new:
            logger.info("The children of %s announce the tasks %s", name, some_of(new))
            guard_consumer(self._app)
            if self._consumer is not None:
                self._consumer.update_strategies()
        if name in self._greeted:
            return
        self._greeted.add(name)
        for complaint in complaints(child, self._routes.takes_tasks(name)):
            logger.warning("The children of the group %s %s. This is said once", name, complaint)


class ChildEvents:
    """Sends ``subproc-child-started``, ``-replaced`` and ``-recycled``.

    Each event has the ``group``, ``slot`` and ``pid`` of the child, and the ``worker_pid``.
    ``-replaced`` and ``-recycled`` also have the ``reason``. ``-replaced`` has the ``uuids`` of the
    jobs that the child had, and the first of them as ``uuid`` (or None). ``-recycled`` has the
    ``successor``, a pid.
    """

    def __init__(self) -> None:
        self._consumer: Any = None
        self._early: deque[tuple[str, dict[str, Any]]] = deque(maxlen=MOST_EARLY)

    def attach(self, consumer: Any) -> None:
        """Send through the dispatcher of `consumer`, which makes another after a lost
        connection."""
        self._consumer = consumer
        while self._early:
            self._send(*self._early.popleft())

    def send(self, change: Change) -> None:
        """Send the event for `change`."""
        kind, fields = _event(change)
        if self._consumer is None:
            self._early.append((kind, fields))
        else:
            self._send(kind, fields)

    def _send(self, kind: str, fields: dict[str, Any]) -> None:
        dispatcher = self._consumer.event_dispatcher
        if dispatcher is None:
            return
        groups = dispatcher.groups
        # No groups means all. Without -E there is "worker", and `enable_events` adds "task".
        if groups and "task" not in groups:
            return
        if groups:
            groups.add("subproc")
        dispatcher.send(kind, Event=_of_child, **fields)


def _of_child(type: str, *, pid: int, child: int | None, **fields: Any) -> Any:
    """Make an event whose ``pid`` is the child's: Celery always passes the worker's."""
    return Event(type, pid=child, worker_pid=pid, **fields)


def _event(change: Change) -> tuple[str, dict[str, Any]]:
    fields = _place(change.child)
    if isinstance(change, Recycled):
        more = {"reason": change.child.recycle_reason, "successor": change.successor.pid}
        return "subproc-child-recycled", fields | more
    if isinstance(change, Report):
        uuids = [job.task_id for job in change.jobs]
        uuid = uuids[0] if uuids else None
        about = {"reason": change.reason, "uuid": uuid, "uuids": uuids}
        return "subproc-child-replaced", fields | about
    return "subproc-child-started", fields


def _place(child: Child) -> dict[str, Any]:
    return {"group": child.group.name, "slot": child.slot.number, "child": child.pid}


def complaints(child: Child, takes_tasks: bool) -> Iterator[str]:
    """Yield what is odd about the handshake of `child`. The log puts "The children of the group"
    and its name before each.

    Arguments:
        child: a child that is ready.
        takes_tasks: whether there is a task that its group takes.
    """
    group = child.group
    path = f"{ROOT}.children.{group.name}"
    if child.unknown_features:
        known = ", ".join(feature.value for feature in Feature)
        words = ", ".join(printable(word) for word in child.unknown_features)
        yield f"announce features that this pool does not know: {words}; it knows {known}"
    most = group.settings.max_in_flight
    if child.capacity < most:
        features = ", ".join(sorted(each.value for each in child.features)) or "none"
        yield (
            f"take one job at a time, though {path}.max_in_flight is {most}: they do not announce"
            f" 'multiplex' (their features: {features})"
            if Feature.MULTIPLEX not in child.features
            else f"announce that they take {child.capacity} jobs at a time, though"
            f" {path}.max_in_flight is {most}, and the number of children follows from that: set"
            f" it to {child.capacity}, or set a size"
        )
    if not takes_tasks:
        yield (
            f"have no tasks: {path}.tasks is empty, they announce none, and no task names the"
            f" group as its child"
        )
