"""Django's connections in the thread in which its asynchronous ORM works.

Celery's fixup for Django closes connections that do not work any more, around each task and in the
task's own thread. The asynchronous ORM and `sync_to_async` work in another thread, in which many
jobs share a connection. Once the server has closed that, it would stay broken for good.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from celery import Celery

__all__ = ("care_for_databases",)


def care_for_databases(app: Celery) -> Callable[[], Awaitable[None]] | None:
    """Return what is to be awaited after a coroutine has failed; None for other projects.

    Arguments:
        app: the project's app.
    """
    if not any(hasattr(fixup, "worker_fixup") for fixup in app._fixups or ()):
        return None
    try:
        from asgiref.sync import sync_to_async
    except ImportError:
        return None

    async def close() -> None:
        await sync_to_async(_close_broken)()

    return close


def _close_broken() -> None:
    """Close connections that have had errors and do not work. Other jobs may use the others."""
    from django.db import connections

    for connection in connections.all(initialized_only=True):
        if connection.errors_occurred and not connection.in_atomic_block:
            if connection.is_usable():
                connection.errors_occurred = False
            else:
                connection.close()
