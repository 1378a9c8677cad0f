"""Which jobs a child has, and whether it can have another one."""

from __future__ import annotations

from .model import Child, ChildState, Job

__all__ = ("clear", "enter", "leave", "release", "set_aside", "suspend", "take", "take_away")


def enter(child: Child) -> None:
    """Put a STARTING child into service."""
    child.move(ChildState.IDLE)
    # Children that have served before go first: this one may still be booting.
    _offer(child, last=False)


def leave(child: Child, state: ChildState) -> None:
    """Take `child` out of service: it gets no more jobs. No timer of its service counts now."""
    set_aside(child)
    child.boot_deadline = child.startup_grace_until = child.max_age_at = None
    if state is not child.state:
        child.move(state)


def set_aside(child: Child) -> None:
    """Give `child` no more jobs."""
    child.group.available.pop(child, None)


def take(child: Child, job: Job) -> None:
    """Let `child`, which is available, have `job`, which is RESERVED."""
    if child.state is ChildState.IDLE:
        child.move(ChildState.BUSY)
    child.jobs[job.task_id] = job
    if child.has_room:
        # The next job goes to a child with fewer jobs, if there is one.
        _offer(child, last=False)
    else:
        del child.group.available[child]


def suspend(child: Child) -> None:
    """Give `child` no new job until it has ended one that it was told to end."""
    child.pending_cancels += 1
    set_aside(child)


def release(child: Child, job: Job) -> bool:
    """Let a busy child, whose `job` is over, have another one.

    Returns:
        Whether it is to be stopped instead: it serves no slot, and this was its last job.
    """
    del child.jobs[job.task_id]
    child.recent_ids.append(job.task_id)
    child.pending_cancels -= job.kill_at is not None
    serves_slot = child.slot.child is child
    if not child.jobs:
        if not serves_slot:
            return True
        child.move(ChildState.RETIRING if child.max_jobs_reached else ChildState.IDLE)
    if serves_slot and child.has_room:
        # Last in, first out: the warmest child serves next.
        _offer(child, last=not child.jobs)
    return False


def take_away(child: Child, job: Job) -> None:
    """Take `job` from `child`, which has not begun it."""
    del child.jobs[job.task_id]
    child.pending_cancels -= job.kill_at is not None


def clear(child: Child) -> None:
    """Take all jobs from `child`: it is gone, or given up."""
    child.jobs.clear()


def _offer(child: Child, last: bool) -> None:
    """Make `child` available. The `last` one gets the next job."""
    available = child.group.available
    available[child] = None
    available.move_to_end(child, last)
