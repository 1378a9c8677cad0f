"""What a project opens in an asyncio child before the first job, and closes at last."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from celery import Celery
from celery.utils.imports import symbol_by_name

__all__ = ("no_lifespan", "open_lifespan")


def open_lifespan(name: str, app: Celery) -> contextlib.AbstractAsyncContextManager[Any]:
    """Return the asynchronous context manager that the project has for an asyncio child.

    Arguments:
        name: where the function is that makes it: ``module:name``.
        app: the argument of that function.

    Raises:
        LookupError: there is no such function, or it makes something else.
    """
    try:
        make = symbol_by_name(name)
    except (ImportError, AttributeError) as exc:
        raise LookupError(
            f"subproc_pool.asyncio.lifespan: {name!r} can't be imported: {exc}"
        ) from exc
    manager = make(app)
    if not hasattr(manager, "__aenter__"):
        raise LookupError(
            f"subproc_pool.asyncio.lifespan: expected that {name!r} returns an asynchronous context"
            f" manager (contextlib.asynccontextmanager makes one), got {manager!r}"
        )
    entered: contextlib.AbstractAsyncContextManager[Any] = manager
    return entered


@contextlib.asynccontextmanager
async def no_lifespan() -> AsyncIterator[None]:
    """Open nothing."""
    yield
