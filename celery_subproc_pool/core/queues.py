"""The jobs that wait, in order of arrival, and which child may have which.

Layer: above `records`. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from .model import Child, Group, Job

__all__ = ("Queues",)


class Queues:
    """Jobs that wait for a child, by their groups, and those for the worker itself.

    Arguments:
        groups: the groups by name.
    """

    __slots__ = ("_groups", "_local")

    def __init__(self, groups: dict[str, Group]) -> None:
        self._groups = groups
        #: Jobs for the worker itself, which have no children to wait for.
        self._local: deque[Job] = deque()

    def __bool__(self) -> bool:
        """Whether any job waits."""
        return any(self._all())

    def _all(self) -> Iterator[deque[Job]]:
        yield self._local
        for group in self._groups.values():
            yield group.waiting

    def _of(self, job: Job) -> deque[Job]:
        return self._local if job.group is None else self._groups[job.group].waiting

    def add(self, job: Job) -> None:
        """Put in `job`, which came last."""
        self._of(job).append(job)

    def put_back(self, job: Job) -> None:
        """Put in `job`, which has waited before: in order of arrival, also among others that lost
        their children."""
        queue = self._of(job)
        queue.insert(sum(other.number < job.number for other in queue), job)

    def remove(self, job: Job) -> None:
        """Take out `job`, which waits."""
        queue = self._of(job)
        if queue[0] is job:
            # Most often.
            queue.popleft()
        else:
            queue.remove(job)

    def drop(self) -> list[Job]:
        """Take out the jobs that were not accepted yet, and return them."""
        dropped: list[Job] = []
        for queue in self._all():
            dropped += [job for job in queue if not job.accepted]
            kept = [job for job in queue if job.accepted]
            queue.clear()
            queue.extend(kept)
        return dropped

    def accepted(self) -> list[Job]:
        """Return the jobs that wait again: they have lost their children."""
        return [job for queue in self._all() for job in queue if job.accepted]

    def next_pair(self) -> tuple[Job, Child | None] | None:
        """Return the job that has waited longest, of those that a child can have, and the child;
        None for a job of the worker itself."""
        best: tuple[Job, Child | None] | None = (self._local[0], None) if self._local else None
        for group in self._groups.values():
            if group.waiting and group.available:
                pair = _pair(group)
                if pair is not None and (best is None or pair[0].number < best[0].number):
                    best = pair
        return best


def _pair(group: Group) -> tuple[Job, Child] | None:
    """Return the first job that waits in `group` and the child that is to have it.

    No child has two jobs of one id at a time (a message may be delivered again while its job goes
    on): nobody could tell their replies apart. One that is to be alone has a child without another
    job, or those behind it wait too: there would never be such a child.
    """
    for job in group.waiting:
        for child in reversed(group.available):
            if _may_have(child, job):
                return job, child
        if job.isolated:
            break
    return None


def _may_have(child: Child, job: Job) -> bool:
    if job.task_id in child.jobs or (job.isolated and child.jobs):
        return False
    return _knows(child, job.task_name)


def _knows(child: Child, task_name: str) -> bool:
    """Return whether `child` does the task as well as others of its group: a task that only others
    have announced, which may be of a newer program, is theirs."""
    return (
        not child.group.announces
        or task_name in child.tasks
        or not any(task_name in other.tasks for other in child.group.children.values())
    )
