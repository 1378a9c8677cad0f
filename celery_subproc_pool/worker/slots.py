"""The worker's concurrency: each job under way takes one slot, and more jobs wait.

With an event loop, Celery waits: its consumer hands over a job when its semaphore has room, and
the pool releases the semaphore. Without one, `apply_async` waits on a condition: Celery asks for
that (`waitforslot`), because it paces the consumer, which sends its acknowledgements between two
tasks.

The pool calls all methods but `release`, `pass_on` and `let_next_in` on the consumer's or the
autoscaler's thread. The engine's thread calls those.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any

from celery.utils.log import get_logger

from ..core.model import Job

__all__ = ("Slots", "slots_for")

logger = get_logger(__name__)


def slots_for(limit: int, semaphore: Any) -> Slots:
    """Return the slots of a worker.

    Arguments:
        limit: how many there are.
        semaphore: Celery's, in a worker with an event loop; otherwise None.
    """
    return ConditionSlots(limit) if semaphore is None else SemaphoreSlots(semaphore)


class Slots(ABC):
    """The jobs under way, from `apply_async` to the last callback."""

    def __init__(self) -> None:
        #: This set keeps the jobs alive: Celery has weak references only.
        self.jobs: set[Job] = set()

    def occupy(self, job: Job) -> None:
        """Give `job` a slot. The caller has waited."""
        self.jobs.add(job)

    def release(self, job: Job) -> None:
        """Free the slot of `job`, which is over, for the next one."""
        self.jobs.remove(job)
        self.let_next_in()

    def pass_on(self, job: Job, follower: Job) -> None:
        """Give the slot of `job`, which is over, to `follower`."""
        self.jobs.remove(job)
        self.jobs.add(follower)

    @abstractmethod
    def wait(self) -> None:
        """Wait until a slot is free, or until `close`."""

    @abstractmethod
    def resize(self, by: int) -> None:
        """Change the number of slots by `by`, which may be negative."""

    @abstractmethod
    def close(self) -> None:
        """Let no more jobs in."""

    @abstractmethod
    def let_next_in(self) -> None:
        """Give a slot that became free to a job that waits."""


class SemaphoreSlots(Slots):
    """The slots of a worker with an event loop.

    Arguments:
        semaphore: Celery's, a `kombu.asynchronous.semaphore.LaxBoundedSemaphore`.
    """

    def __init__(self, semaphore: Any) -> None:
        super().__init__()
        self._semaphore = semaphore

    def wait(self) -> None:
        """Do nothing: Celery has waited before it handed the job over."""

    def resize(self, by: int) -> None:
        """Change the number of slots by `by`, which may be negative."""
        if by > 0:
            self._semaphore.grow(by)
        elif by:
            self._semaphore.shrink(-by)

    def close(self) -> None:
        """Forget the jobs that wait for a slot: they stay with the broker."""
        self._semaphore.clear()

    def let_next_in(self) -> None:
        """Give a slot that became free to a job that waits."""
        try:
            self._semaphore.release()
        except Exception:
            # `release` runs the next job that waited, and Celery failed with that one.
            logger.exception("Celery failed to start the job that waited for a slot; the next may")
            self._semaphore.release()


class ConditionSlots(Slots):
    """The slots of a worker without an event loop.

    Arguments:
        limit: how many there are.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._closed = False
        self._changed = threading.Condition()

    def wait(self) -> None:
        """Wait until a slot is free, or until `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self.jobs) < self._limit)

    def resize(self, by: int) -> None:
        """Change the number of slots by `by`, which may be negative."""
        with self._changed:
            self._limit += by
            self._changed.notify_all()

    def close(self) -> None:
        """Let `wait` return, now and from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def let_next_in(self) -> None:
        """Give a slot that became free to a job that waits."""
        with self._changed:
            self._changed.notify()
