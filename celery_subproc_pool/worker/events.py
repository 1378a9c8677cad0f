"""Sends Celery events of children, for what Celery has no words for.

Layer: above `records`; imports Celery. Like the events of tasks, they are sent with ``-E``, or once
`enable_events` was asked for.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from celery.events import Event

from ..core.actions import Change, Recycled, Report
from ..core.model import Child

__all__ = ("ChildEvents",)

#: How many events wait for the worker's consumer, which starts after the pool.
MOST_EARLY = 1000


class ChildEvents:
    """Sends ``subproc-child-started``, ``-replaced`` and ``-recycled``.

    Each has the ``group``, ``slot`` and ``pid`` of the child, and the ``worker_pid``; the last two
    have the ``reason``, ``-replaced`` also the ``uuids`` of the jobs that it had
    and the first one as ``uuid`` (or None), and ``-recycled`` the ``successor``, a pid.
    """

    def __init__(self) -> None:
        self._consumer: Any = None
        self._early: deque[tuple[str, dict[str, Any]]] = deque(maxlen=MOST_EARLY)

    def attach(self, consumer: Any) -> None:
        """Send through the dispatcher of `consumer`, which has another after a lost connection."""
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
        # None named is all; without -E there is "worker", and `enable_events` adds "task".
        if groups and "task" not in groups:
            return
        if groups:
            groups.add("subproc")
        dispatcher.send(kind, Event=_of_child, **fields)


def _of_child(type: str, *, pid: int, child: int | None, **fields: Any) -> Any:
    """Make an event, of whose `pid` Celery thinks that it is always the worker's."""
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
