"""Signals of this package, in the form of Celery's own."""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = ("child_request",)

#: Sent in a tracer just before it asks for the exchange with an external child, in the context of
#: the task: the current task and spans are the task's own. The sender is the task. Keywords:
#: ``task_id``, and ``headers``, a dict that becomes ``payload.headers`` of the request: what a
#: receiver adds to it, the child gets.
child_request = Signal(name="child_request", providing_args={"task_id", "headers"})
