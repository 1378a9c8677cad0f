"""Prints what `celery inspect subproc` replies as tables.

It needs rich, which the extra `cli` installs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ("show",)

HEADS = ("group", "slot", "pid", "state", "age", "jobs", "RSS", "task in flight", "last exit")


def show(replies: Mapping[str, Any]) -> None:
    """Print a table for each worker.

    Arguments:
        replies: the workers' replies, by their names: rows of `core.stats.rows`, or an error.
    """
    console = Console()
    for node, reply in sorted(replies.items()):
        if isinstance(reply, list):
            console.print(_table(node, reply))
        else:
            console.print(f"{node}: {reply.get('error', reply)}", markup=False)


def _table(node: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*HEADS, title=Text(node), title_justify="left")
    for row in rows:
        # As `Text`, so that brackets in a cell are not markup.
        table.add_row(*(Text(cell) for cell in _cells(row)))
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    task, last = row["task"], row["last_exit"]
    return (
        row["group"],
        f"{row['slot']}",
        f"{row['pid'] or '-'}",
        _state(row),
        "-" if row["age"] is None else _seconds(row["age"]),
        f"{row['jobs']}",
        f"{row['rss'] / 2**20:.0f} MiB",
        _task(task, row["in_flight"]) if task else "-",
        f"{_seconds(last['seconds'])} ago: {last['reason']}" if last else "-",
    )


def _state(row: dict[str, Any]) -> str:
    still = row.get("stands_still")
    return row["state"] if still is None else f"stands still for {_seconds(still)}"


def _task(task: dict[str, Any], in_flight: int) -> str:
    more = f" and {in_flight - 1} more" if in_flight > 1 else ""
    return f"{task['name']}[{task['id']}] for {_seconds(task['seconds'])}{more}"


def _seconds(seconds: float) -> str:
    return f"{timedelta(seconds=round(seconds))}" if seconds >= 60 else f"{seconds:.1f} s"
