"""What the worker's banner and `celery subproc check` say of the groups of children.

Layer: above `config`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..settings import ChildSettings

__all__ = ("describe", "external_tasks", "show", "size_of")


def describe(name: str, command: Sequence[str], size: str, tasks: Iterable[str]) -> str:
    """Return two lines on one group.

    Arguments:
        name: the group's.
        command: the program and its arguments.
        size: how many children it has, in words.
        tasks: the names or patterns of the tasks that it takes.
    """
    return f"{name}: {shlex.join(command)}\n    size: {size}; tasks: {', '.join(tasks)}"


def external_tasks(name: str, child: ChildSettings, taken: Mapping[str, str]) -> Iterator[str]:
    """Yield what the external group `name` takes: its patterns, and the tasks that name it.

    Arguments:
        name: the group's.
        child: its settings.
        taken: the group of each task that has an external one.
    """
    yield from child.tasks
    for task, group in sorted(taken.items()):
        if group == name and not child.takes(task):
            yield task
    if child.handshake and not child.tasks:
        yield "what they announce"


def size_of(child: ChildSettings, count: int) -> str:
    """Return in words that a group has `count` children, with settings `child`."""
    return f"{count}" if child.max_in_flight == 1 else f"{count}, {child.max_in_flight} jobs each"


def show(descriptions: Iterable[str]) -> None:
    """Print `descriptions` below Celery's banner, where Celery prints that: to the stdout that the
    process began with."""
    lines = [f"  . {description}".replace("\n", "\n  ") for description in descriptions]
    print("[children]", *lines, "", sep="\n", file=sys.__stdout__, flush=True)
