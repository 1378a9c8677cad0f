"""What the log is told of children that come and go.

Layer: above `live` and `records`. Must not import Celery.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .live import ChildFacts
from .records import Child, Group, Job, Recycled, Report

__all__ = ("healed", "recycled", "replaced", "some_of")

logger = logging.getLogger("celery_subproc_pool")

#: How many jobs or tasks one line of the log names.
MOST_NAMED = 10


def some_of(names: Sequence[str]) -> str:
    """Return the first of `names`, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


def replaced(report: Report, facts: ChildFacts | None) -> None:
    """Log that a child is replaced after a fault.

    Arguments:
        report: what happened.
        facts: what else is known of the child; None if it never ran.
    """
    child = report.child
    old = child.slot.child
    serves_on = old is not None and old is not child and old.worn and old.serves
    tail = " | ".join(facts.stderr) if facts is not None else ""
    logger.warning(
        "Child %s is replaced: %s%s%s%s%s",
        _name(child),
        report.reason,
        _jobs(report.jobs),
        f"; pid {old.pid}, which it was to follow, serves on" if old and serves_on else "",
        f"; the next one starts in {report.delay:.1f} s; {_strength(child.group)}"
        if report.delay
        else "",
        f"; its last stderr lines: {tail}" if tail else "",
    )


def recycled(event: Recycled) -> None:
    """Log that a child has had its time."""
    logger.info(
        "Child %s is recycled: %s; its successor (pid %s) has taken its place",
        _name(event.child),
        event.child.worn,
        event.successor.pid,
    )


def healed(group: Group) -> None:
    """Log that a group is at full strength again, where it was logged that it is not."""
    logger.warning("The group %s is whole again: %s", group.name, _strength(group))


def _name(child: Child) -> str:
    return f"{child.group.name}#{child.slot.number} (pid {child.pid})"


def _jobs(jobs: tuple[Job, ...]) -> str:
    if not jobs:
        return ""
    titles = some_of([job.title for job in jobs])
    return f"; its job was {titles}" if len(jobs) == 1 else f"; its jobs were {titles}"


def _strength(group: Group) -> str:
    return f"{group.in_service} of its {len(group.slots)} children are in service"
