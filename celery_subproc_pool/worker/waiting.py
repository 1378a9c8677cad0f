"""Where jobs wait whose group is busy, in a worker with several kinds of children.

A worker's concurrency bounds the jobs of all groups together. If jobs of one group wait for a
child, they must not take the slots that jobs of another group could use. So a group gets no more
jobs than its children can have, and some that wait for them. The others wait here, and their slots
are free.

The pool calls `admit` on the consumer's thread, and the others on the engine's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping

from ..core.model import Group
from ..settings import TRACERS
from .jobs import PoolJob
from .prefetch import Prefetch

__all__ = ("WaitingRoom", "room_for")

#: Jobs that wait in the engine, for each that the children of a group can have: a child that is
#: done has its next job at once.
AHEAD = 1


def room_for(
    groups: Mapping[str, Group],
    limit: int,
    is_revoked: Callable[[PoolJob], bool],
    prefetch: Prefetch,
) -> WaitingRoom:
    """Return the waiting room of a worker.

    Arguments:
        groups: the worker's groups of children, by name.
        limit: the worker's concurrency.
        is_revoked: whether a job that has waited is not to be begun any more.
        prefetch: follows the number of jobs that wait.
    """
    kinds = {name: group for name, group in groups.items() if name != TRACERS}
    if len(kinds) < 2:
        return WaitingRoom({}, is_revoked, prefetch)
    most = {name: _most_at_a_time(group) for name, group in kinds.items()}
    sizes = {name: count for name, count in most.items() if count is not None and count < limit}
    return WaitingRoom(sizes, is_revoked, prefetch)


def _most_at_a_time(group: Group) -> int | None:
    """Return how many jobs `group` can have at a time; None if that follows the concurrency."""
    settings = group.settings
    if settings.concurrency is not None or settings.size is None:
        return settings.concurrency
    return settings.size * settings.max_in_flight


class WaitingRoom:
    """The jobs that wait for others of their group.

    Arguments:
        sizes: by the names of groups: how many jobs its children can have. No limit for others.
        is_revoked: whether a job that has waited is not to be begun any more. Celery asks that
            before it hands a job over.
        prefetch: follows the number of jobs that wait.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        is_revoked: Callable[[PoolJob], bool],
        prefetch: Prefetch,
    ) -> None:
        self._most = {name: count * (1 + AHEAD) for name, count in sizes.items()}
        #: Slots for the jobs that wait in the engine: they are not to take those of other jobs.
        self.ahead = AHEAD * sum(sizes.values())
        self._is_revoked = is_revoked
        self._prefetch = prefetch
        self._under_way: dict[str, set[PoolJob]] = {name: set() for name in sizes}
        self._waiting: dict[str, deque[PoolJob]] = {name: deque() for name in sizes}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def admit(self, job: PoolJob) -> bool:
        """Return whether `job` may begin. If not, it waits here."""
        most = self._most.get(job.group)
        if most is None:
            return True
        with self._lock:
            if len(self._under_way[job.group]) >= most:
                self._waiting[job.group].append(job)
                self._prefetch.follow(len(self))
                return False
            self._under_way[job.group].add(job)
            return True

    def leave(self, job: PoolJob) -> PoolJob | None:
        """Note that `job` is over; return the one that takes its place, or None."""
        under_way = self._under_way.get(job.group, ())
        if job not in under_way:
            return None
        while follower := self._replace(job):
            # It acknowledges messages: not while the lock is held.
            if not self._is_revoked(follower):
                return follower
            job = follower
        return None

    def _replace(self, job: PoolJob) -> PoolJob | None:
        """Let the next job take the place of `job`."""
        under_way, waiting = self._under_way[job.group], self._waiting[job.group]
        with self._lock:
            under_way.remove(job)
            if not waiting:
                return None
            follower = waiting.popleft()
            under_way.add(follower)
            self._prefetch.follow(len(self))
            return follower

    def clear(self) -> None:
        """Forget the jobs that wait: they stay with the broker."""
        with self._lock:
            for waiting in self._waiting.values():
                waiting.clear()
            self._prefetch.forget()
