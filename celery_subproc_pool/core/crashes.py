"""Which jobs are suspected of having crashed a child, and how often."""

from __future__ import annotations

from collections import OrderedDict

from .model import Child, Job

__all__ = ("CRASHES_REMEMBERED", "Crashes")

#: How many jobs are remembered.
CRASHES_REMEMBERED = 10_000


class Crashes:
    """Counts crashes by job, for this worker. A retry of a job is another job with the same id."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        #: By the jobs' ids and retries, the oldest first.
        self._counts: OrderedDict[tuple[str, int], int] = OrderedDict()

    def is_suspect(self, job: Job) -> bool:
        """Return whether `job` may have crashed a child before."""
        return bool(self._counts) and (job.task_id, job.retries) in self._counts

    def clear(self, job: Job) -> None:
        """Drop the suspicion: `job` has come to its end."""
        if self._counts:
            self._counts.pop((job.task_id, job.retries), None)

    def count(self, job: Job, child: Child) -> int:
        """Count that `child` ended with `job`.

        With several jobs in flight the culprit is unknown: all are suspects, and no crash is
        counted. If they are delivered again, each runs isolated, so that a poison pill is found.

        Returns:
            How many children `job` has crashed, if `max_crashes` is reached; otherwise 0.
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
