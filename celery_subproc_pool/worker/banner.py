"""What the worker's banner and `celery subproc check` say about the groups of children."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import click

from ..core.model import Group
from ..settings import ASYNCIO, PYTHON, TRACERS, ChildSettings, PoolSettings

__all__ = ("describe", "external_tasks", "show")

#: What the groups take that no setting lists.
_OF_OUR_OWN = {
    PYTHON: "all others",
    ASYNCIO: "async def",
    TRACERS: "hooks, signals and results of the external ones",
}


def show(
    command: click.Context | None,
    settings: PoolSettings,
    taken: Mapping[str, str],
    groups: Mapping[str, Group],
    limit: int,
) -> None:
    """Print the `groups` below Celery's banner, if `celery worker` runs and is not quiet.

    Celery prints its banner to the stdout that the process began with; so does this.

    Arguments:
        command: the `celery worker` command; None if another program embeds the worker.
        settings: the pool's settings.
        taken: by the names of tasks with an external group, that group.
        groups: the worker's groups of children, by name.
        limit: the worker's concurrency.
    """
    if command is None or command.obj.quiet:
        return
    texts = (_describe_group(group, settings, taken, limit) for group in groups.values())
    lines = [f"  . {text}".replace("\n", "\n  ") for text in texts]
    print("[children]", *lines, "", sep="\n", file=sys.__stdout__, flush=True)


def _describe_group(
    group: Group, settings: PoolSettings, taken: Mapping[str, str], limit: int
) -> str:
    tasks: Iterable[str]
    if group.name in settings.children:
        tasks = external_tasks(group.name, group.settings, taken)
    else:
        tasks = [_OF_OUR_OWN[group.name]]
    size = f"{len(group.slots)}"
    if group.settings.max_in_flight != 1:
        size += f", {min(group.settings.max_in_flight, limit)} jobs each"
    return describe(group.name, group.settings.command, size, tasks)


def describe(name: str, command: Sequence[str], size: str, tasks: Iterable[str]) -> str:
    """Return two lines about one group.

    Arguments:
        name: the group's.
        command: the program and its arguments.
        size: the number of its children, in words.
        tasks: the names or patterns of the tasks that the group takes.
    """
    return f"{name}: {shlex.join(command)}\n    size: {size}; tasks: {', '.join(tasks)}"


def external_tasks(name: str, child: ChildSettings, taken: Mapping[str, str]) -> Iterator[str]:
    """Yield the tasks that the external group `name` takes: its patterns, and tasks that name it.

    Arguments:
        name: the group's.
        child: its settings.
        taken: by the names of tasks with an external group, that group.
    """
    yield from child.tasks
    for task, group in sorted(taken.items()):
        if group == name and not child.takes(task):
            yield task
    if child.handshake and not child.tasks:
        yield "what they announce"
