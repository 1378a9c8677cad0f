"""Which jobs have cost children their lives, and how many.

Layer: above `records`. Pure.
"""

from __future__ import annotations

from collections import OrderedDict

from .model import Child, Job

__all__ = ("CRASHES_REMEMBERED", "Crashes")

#: Of how many jobs it is remembered that they have cost a child.
CRASHES_REMEMBERED = 10_000


class Crashes:
    """Remembers them for this worker. A retry of a job is another job, of the same id."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        #: By the jobs' ids and retries: the oldest first.
        self._counts: OrderedDict[tuple[str, int], int] = OrderedDict()

    def suspects(self, job: Job) -> bool:
        """Return whether `job` may have cost a child its life."""
        return bool(self._counts) and (job.task_id, job.retries) in self._counts

    def clear(self, job: Job) -> None:
        """`job` is not to blame: a child has answered it."""
        if self._counts:
            self._counts.pop((job.task_id, job.retries), None)

    def count(self, job: Job, child: Child) -> int:
        """Count that `job` has cost `child`.

        Of several, nobody knows which one it was: they are suspected, and if they come again, each
        has a child for itself, so that a message which kills is found out.

        Returns:
            How many it has cost, if that is as many as it may; otherwise 0.
        """
        most = child.group.settings.max_crashes
        if most is None:
            return 0
        key = (job.task_id, job.retries)
        crashes = self._counts.pop(key, 0) + (len(child.jobs) == 1)
        if crashes >= most:
            return crashes
        self._counts[key] = crashes
        if len(self._counts) > CRASHES_REMEMBERED:
            self._counts.popitem(last=False)
        return 0
