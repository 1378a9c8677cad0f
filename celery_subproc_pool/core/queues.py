"""The jobs that wait, in order of arrival, and which child can have which."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from ..settings import TRACERS
from .model import Child, Group, Job

__all__ = ("Queues",)


class Queues:
    """The queues of the groups.

    Arguments:
        groups: the groups by name.
    """

    __slots__ = ("_groups", "_tracers", "waiting")

    def __init__(self, groups: dict[str, Group]) -> None:
        self._groups = groups
        #: Looked at for each job: None if there are no tracers.
        self._tracers = groups.get(TRACERS)
        #: How many jobs wait.
        self.waiting = 0

    def __bool__(self) -> bool:
        """Whether any job waits."""
        return bool(self.waiting)

    def _all(self) -> Iterator[deque[Job]]:
        return (group.waiting for group in self._groups.values())

    def _of(self, job: Job) -> deque[Job]:
        return self._groups[job.group].waiting

    def add(self, job: Job) -> None:
        """Add a new job."""
        self._of(job).append(job)
        self.waiting += 1

    def put_back(self, job: Job) -> None:
        """Put `job`, which has lost its child, back to its place in the order of arrival."""
        queue = self._of(job)
        self.waiting += 1
        queue.insert(sum(other.number < job.number for other in queue), job)

    def remove(self, job: Job) -> None:
        """Take `job` out of its queue."""
        queue = self._of(job)
        self.waiting -= 1
        if queue[0] is job:
            # The common case.
            queue.popleft()
        else:
            queue.remove(job)

    def drop(self) -> list[Job]:
        """Take out and return the jobs that were not accepted yet."""
        dropped: list[Job] = []
        for queue in self._all():
            dropped += [job for job in queue if not job.accepted]
            kept = [job for job in queue if job.accepted]
            queue.clear()
            queue.extend(kept)
        self.waiting -= len(dropped)
        return dropped

    def accepted(self) -> list[Job]:
        """Return the jobs that wait again because they have lost their children."""
        return [job for queue in self._all() for job in queue if job.accepted]

    def next_pair(self) -> tuple[Job, Child] | None:
        """Return the job to begin next and its child: of the jobs that a child can have, the first
        that arrived."""
        best: tuple[Job, Child] | None = None
        for group in self._groups.values():
            if group.waiting and group.available and not _is_full(group):
                pair = _pair(group, group.waiting)
                if pair is not None and (best is None or pair[0].number < best[0].number):
                    best = pair
        return best

    def next_trace(self) -> tuple[Job, Child] | None:
        """Return the first trace that a tracer can have, and the tracer."""
        group = self._tracers
        if group is None or not group.waiting or not group.available:
            return None
        return _pair(group, (job for job in group.waiting if job.traces is not None))


def _is_full(group: Group) -> bool:
    """Return whether `group` has as many jobs as its `concurrency` allows."""
    most = group.settings.concurrency
    return most is not None and sum(len(child.jobs) for child in group.children.values()) >= most


def _pair(group: Group, jobs: Iterable[Job]) -> tuple[Job, Child] | None:
    """Return the first of `jobs` of `group` that a child can have, and the child.

    A child never has two jobs of one id: their replies would look the same. (A message may be
    delivered again while its job runs.) An isolated job blocks the queue until a child is empty:
    otherwise no child might ever be.
    """
    for job in jobs:
        for child in _candidates(group):
            if _can_have(child, job):
                return job, child
        if job.isolated:
            break
    return None


def _candidates(group: Group) -> Iterable[Child]:
    """Return the children of `group` with room, the best first. Among those that do many jobs at a
    time, it is the one with the fewest: one that stands still gets no more."""
    latest_first = reversed(group.available)
    if group.settings.max_in_flight == 1:
        return latest_first
    return sorted(latest_first, key=lambda child: len(child.jobs))


def _can_have(child: Child, job: Job) -> bool:
    if job.task_id in child.jobs or (job.isolated and child.jobs):
        return False
    return not child.group.announces or _knows(child, job.task_name)


def _knows(child: Child, task_name: str) -> bool:
    """Return whether `child` does the task. If only other children of the group have announced it,
    they may run a newer program, and the task is theirs. If no child has, each one does it."""
    return task_name in child.tasks or not any(
        task_name in other.tasks for other in child.group.children.values()
    )
