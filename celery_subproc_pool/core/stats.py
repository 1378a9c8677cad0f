"""What an operator can ask about the pool: the numbers of a group, and a row for each child.

All that is returned is plain, for JSON.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .model import Child, Exit, Group, Job, JobState, Slot

__all__ = ("group_facts", "rows", "writes")

#: The percentiles of waiting and running times that are shown.
PERCENTILES = (50, 95, 99)


def group_facts(group: Group) -> dict[str, Any]:
    """Return what `inspect stats` says of `group`.

    Returns:
        Counts; ``wait`` and ``run``, seconds of the latest `counters.TIMES_REMEMBERED` jobs by the
        name of the percentile (``p50``), empty before the first job; and its children.
    """
    children = list(group.children.values())
    return {
        "size": len(group.slots),
        "in_service": group.in_service,
        "cooling": group.backing_off,
        "states": dict(Counter(child.state.value for child in children)),
        "jobs": group.counters.jobs_done,
        "throttled": group.counters.throttled,
        "waiting": len(group.waiting),
        "wait": _percentiles(group.counters.waits),
        "run": _percentiles(group.counters.runs),
        "unkillable": sum(child.unkillable for child in children),
        "replaced": {cause.value: count for cause, count in group.counters.replaced.items()},
        "children": [
            {"pid": child.pid, "state": child.state.value, "jobs": child.jobs_done}
            for child in children
        ],
    }


def writes(groups: Iterable[Group], active: int) -> dict[str, Any]:
    """Return how many requests were written, in the form of prefork's ``writes``
    (celery/concurrency/asynpool.py: `human_write_stats`, 5.3 to 5.7).

    Arguments:
        groups: all of them.
        active: how many children have not read the rest of a request yet.

    Returns:
        ``total``; for each slot, in the order of groups, the number (``raw``) and the fraction of
        the total (``all``); the mean of the fractions (``avg``); ``strategy``, always that of
        ``-O fair``; and ``inqueues``: how many children serve, and how many are ``active``.
    """
    groups = list(groups)
    children = [child for group in groups for child in list(group.children.values())]
    counts: Counter[Slot] = Counter()
    for child in children:
        counts[child.slot] += child.jobs_begun
    slots = [slot for group in groups for slot in list(group.slots)]
    numbers = [slot.jobs_begun + counts[slot] for slot in slots]
    total = sum(group.counters.jobs_begun for group in groups) + sum(counts.values())
    shares = [number / total if total else 0.0 for number in numbers]
    return {
        "total": total,
        "avg": f"{statistics.fmean(shares) if shares else 0.0:.2f}",
        "all": ", ".join(f"{share:.2f}" for share in shares),
        "raw": ", ".join(map(str, numbers)),
        "strategy": "fair",
        "inqueues": {"total": sum(child.serves for child in children), "active": active},
    }


def _percentiles(seconds: Iterable[float]) -> dict[str, float]:
    values = list(seconds)
    if not values:
        return {}
    # A single value has no quantiles.
    cuts = statistics.quantiles(values if values[1:] else values * 2, n=100, method="inclusive")
    return {f"p{percent}": round(cuts[percent - 1], 6) for percent in PERCENTILES}


def rows(
    groups: Iterable[Group], now: float, memory_of: Callable[[Child], int]
) -> list[dict[str, Any]]:
    """Return a row for each child, and for each slot that waits before it spawns again.

    Arguments:
        groups: whose children.
        now: the monotonic time, in seconds.
        memory_of: returns a child's resident memory, in bytes.

    Returns:
        In the order of groups and slots. ``age`` is in seconds, ``rss`` in bytes. ``task`` is the
        ``name``, ``id`` and ``seconds`` of its first job, or None; it has ``in_flight`` jobs.
        ``name`` is the name that the child gave itself, or None. ``stands_still`` is for how many
        seconds a tracer that the log warns of has said nothing; None for any other child.
        ``last_exit`` is the latest child that the slot lost, or None: its ``pid``, the ``reason``,
        and how many ``seconds`` ago.
    """
    return [
        _row(group, slot, child, now, memory_of)
        for group in groups
        for slot, child in _places(group)
    ]


def _places(group: Group) -> Iterator[tuple[Slot, Child | None]]:
    places = [(child.slot, child) for child in list(group.children.values())]
    # A group on demand has not begun yet.
    empty = [(s, None) for s in list(group.slots) if s.child is None and not group.on_demand]
    return iter(sorted([*places, *empty], key=lambda place: place[0].number))


def _row(
    group: Group,
    slot: Slot,
    child: Child | None,
    now: float,
    memory_of: Callable[[Child], int],
) -> dict[str, Any]:
    row: dict[str, Any] = {"group": group.name, "slot": slot.number}
    if child is None:
        row |= {"pid": None, "state": "cooling", "age": None, "jobs": 0, "rss": 0, "task": None}
        row |= {"in_flight": 0, "name": None, "stands_still": None}
    else:
        row |= {
            "pid": child.pid,
            "state": child.state.value,
            "age": round(now - child.spawned_at, 3),
            "jobs": child.jobs_done,
            "rss": memory_of(child),
            "task": _task(child, now),
            "in_flight": len(_held(child)),
            "name": child.name,
            "stands_still": _standstill(child, now),
        }
    return row | {"last_exit": _exit(slot.last_exit, now)}


def _task(child: Child, now: float) -> dict[str, Any] | None:
    job = next(iter(_held(child)), None)
    if job is None:
        return None
    # The child has not begun it while its tracer prepares the request.
    seconds = now - job.begun_at if job.state is JobState.SENT else 0.0
    return {"name": job.task_name, "id": job.task_id, "seconds": round(seconds, 3)}


def _standstill(child: Child, now: float) -> float | None:
    if not child.stands_still or child.quiet_since is None:
        return None
    return round(now - child.quiet_since, 3)


def _held(child: Child) -> list[Job]:
    """Return the jobs that `child` has, those that it has still to end included."""
    return [job for job in child.jobs.values() if child.serves or job.state is JobState.SENT]


def _exit(last: Exit | None, now: float) -> dict[str, Any] | None:
    if last is None:
        return None
    return {"pid": last.pid, "seconds": round(now - last.at, 3), "reason": last.reason}
