"""Log messages about children that come and go."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import psutil

from ..core.actions import GoesOn, Recycled, Report, StandsStill, Stranded, Unkillable
from ..core.model import Child, Group, Job
from ..core.outcomes import ChildFacts

__all__ = (
    "cleared",
    "goes_on",
    "healed",
    "left_behind",
    "left_over",
    "recycled",
    "replaced",
    "some_of",
    "stands_still",
    "stranded",
    "unkillable",
    "why_not_ours",
)

logger = logging.getLogger("celery_subproc_pool")

#: How many jobs or programs one line of the log names at most.
MOST_NAMED = 10


def some_of(names: Sequence[str]) -> str:
    """Return the first of `names`, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


def replaced(report: Report, facts: ChildFacts | None, programs: Sequence[str]) -> None:
    """Log that a child is replaced after a fault.

    Arguments:
        report: what happened.
        facts: what else is known of the child; None if it never ran.
        programs: what else runs in its process group, and is ended with it.
    """
    child = report.child
    old = child.slot.child
    goes_on = old is not None and old is not child and old.recycle_reason and old.serves
    tail = " | ".join(facts.stderr) if facts is not None else ""
    logger.warning(
        "Child %s is replaced: %s%s%s%s%s%s%s",
        _name(child),
        report.reason,
        _jobs(report.jobs),
        "; it may still finish the jobs that it has begun" if child.draining else "",
        f"; pid {old.pid}, which it was to replace, goes on serving" if old and goes_on else "",
        f"; the next one starts in {report.delay:.1f} s; {_strength(child.group)}"
        if report.delay
        else "",
        f"; programs that it has started are ended: {some_of(programs)}" if programs else "",
        f"; its last stderr lines: {tail}" if tail else "",
    )


def recycled(event: Recycled) -> None:
    """Log that a child was recycled, as planned."""
    logger.info(
        "Child %s is recycled: %s; its successor (pid %s) has taken its place",
        _name(event.child),
        event.child.recycle_reason,
        event.successor.pid,
    )


def cleared(child: Child, programs: Sequence[str], stopping: bool) -> None:
    """Log that programs are ended because a child, which was to exit, has left them running.

    Arguments:
        child: the child, which is gone.
        programs: the programs.
        stopping: whether the child has exited because the worker stops.
    """
    logger.warning(
        "Child %s is gone; programs that it has left running are ended: %s (%s)",
        _name(child),
        some_of(programs),
        "the worker stops" if stopping else f"leftovers is {child.group.settings.leftovers!r}",
    )


def left_over(programs: Sequence[str]) -> None:
    """Log that `programs`, which children have left running, are ended with the worker."""
    logger.warning(
        "The worker stops; programs that its children have left running are ended: %s",
        some_of(programs),
    )


def healed(group: Group) -> None:
    """Log that a group is at full strength again, after the log has said that it is not."""
    logger.warning("The group %s is whole again: %s", group.name, _strength(group))


def why_not_ours(pid: int) -> str:
    """Return, in words, why the worker can't signal the process `pid`."""
    try:
        owner = psutil.Process(pid).username()
    except psutil.Error:
        owner = "another user"
    return f"it runs as {owner} (by sudo, or setuid?), so the worker may not signal it"


def unkillable(event: Unkillable) -> None:
    """Log that a child goes on although it was to be killed."""
    logger.error(
        "Child %s can't be killed: %s%s. It is no longer part of the pool, and stays until it"
        " exits by itself: end it by hand. A child that runs as another user must exit when its"
        " stdin is closed, whatever it is doing",
        _name(event.child),
        event.reason,
        _jobs(event.jobs),
    )


def stranded(event: Stranded) -> None:
    """Log that jobs are given up because the worker stops and no child can start."""
    logger.error(
        "The worker stops, and %s. These jobs were waiting for one: %s. They fail, except those"
        " whose messages are not acknowledged yet (acks_late): the broker keeps them",
        event.reason,
        some_of([job.title for job in event.jobs]),
    )


def stands_still(event: StandsStill) -> None:
    """Log that a tracer says nothing."""
    logger.warning(
        "Child %s stands still: it has said nothing for %.0f s, and these jobs wait for it: %s."
        " What it calls hangs: the result backend, a hook, or a receiver of a signal. The worker"
        " and other tracers go on. Its stderr shows next which code it runs",
        _name(event.child),
        event.seconds,
        some_of([job.title for job in event.jobs]),
    )


def goes_on(event: GoesOn) -> None:
    """Log that a tracer that has stood still goes on."""
    logger.warning("Child %s goes on, after %.0f s", _name(event.child), event.seconds)


def left_behind(pids: Sequence[int]) -> None:
    """Log that the worker ends before children that can't be killed."""
    logger.error(
        "The worker ends and leaves children behind that it can't kill: pid %s. End them by hand",
        ", ".join(map(str, pids)),
    )


def _name(child: Child) -> str:
    return f"{child.group.name}#{child.slot.number} (pid {child.pid})"


def _jobs(jobs: tuple[Job, ...]) -> str:
    if not jobs:
        return ""
    titles = some_of([job.title for job in jobs])
    return f"; its job was {titles}" if len(jobs) == 1 else f"; its jobs were {titles}"


def _strength(group: Group) -> str:
    return f"{group.in_service} of its {len(group.slots)} children are in service"
