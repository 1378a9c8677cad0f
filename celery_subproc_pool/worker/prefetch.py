"""How many messages the worker may have: more, by those that wait for a busy group.

Celery fetches a multiple of the concurrency. Messages that wait for a busy group would use that up,
and no message of another group would come. Celery does the same for tasks with an ETA.
"""

from __future__ import annotations

from typing import Any

__all__ = ("Prefetch",)

#: The limit changes by this: on AMQP, each change is a request to the broker.
STEP = 50

#: More waiting messages than this are not made up for: each takes memory, here and at the broker.
MOST = 10_000


class Prefetch:
    """Follows the number of jobs that wait.

    Called on the thread of Celery's consumer, or on the engine's: `increment_eventually` takes a
    lock (kombu/common.py: `QoS`).
    """

    def __init__(self) -> None:
        #: Celery's worker, once it is known.
        self.worker: Any = None
        self._extra = 0

    def follow(self, waiting: int) -> None:
        """Note that `waiting` jobs wait."""
        wanted = min(-(-waiting // STEP) * STEP, MOST)
        # It goes down later than up: otherwise it might change with each job.
        if self._extra - 2 * STEP < wanted <= self._extra:
            return
        qos = getattr(getattr(self.worker, "consumer", None), "qos", None)
        if qos is None:
            return
        change, self._extra = wanted - self._extra, wanted
        if change > 0:
            qos.increment_eventually(change)
        else:
            qos.decrement_eventually(-change)

    def forget(self) -> None:
        """Begin anew: the connection was lost, and Celery begins with the default."""
        self._extra = 0
