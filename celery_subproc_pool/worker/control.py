"""Remote control commands of the pool: `celery control subproc_restart`, `celery inspect subproc`.

`register` must have run both where a command is sent and where it arrives: the `celery` command
(`cli`) and the pool call it.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from celery.worker.control import control_command, inspect_command

from ..errors import ConfigError

__all__ = ("Controlled", "register")


@runtime_checkable
class Controlled(Protocol):
    """A pool that knows these commands."""

    def restart_group(self, name: str | None) -> list[str]:
        """Replace the children of the group `name`, or of all; return the groups' names.

        Raises:
            ConfigError: it can't be done. The sender of the command gets the message.
        """

    def child_rows(self) -> list[dict[str, Any]]:
        """Return a row for each child."""


def register() -> None:
    """Make the commands known to Celery, which shows the first lines of their docstrings."""
    control_command(args=[("group", str)], signature="[group]")(subproc_restart)
    inspect_command()(subproc)


def subproc_restart(state: Any, group: str | None = None, **_: Any) -> dict[str, Any]:
    """Replace the subproc pool's children, of one group or all, while jobs go on."""
    pool = state.consumer.pool
    if not isinstance(pool, Controlled):
        return _no_such_pool(pool)
    try:
        return {"ok": f"restarting {', '.join(pool.restart_group(group))}"}
    except ConfigError as exc:
        return {"error": f"{exc}"}


def subproc(state: Any, **_: Any) -> Any:
    """Show the subproc pool's children: state, age, jobs, RSS, task in flight, last exit."""
    pool = state.consumer.pool
    return pool.child_rows() if isinstance(pool, Controlled) else _no_such_pool(pool)


def _no_such_pool(pool: Any) -> dict[str, Any]:
    return {
        "error": f"this worker's pool is {type(pool).__module__}, which has no such children:"
        " start it with -P celery_subproc_pool:Pool"
    }
