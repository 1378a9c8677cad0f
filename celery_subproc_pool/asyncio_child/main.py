"""The program of an asyncio child. Run as ``python -m celery_subproc_pool.asyncio_child.main``.

As in `python_child.main`, the top of this module must not import the project, Celery or msgspec.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

from ..python_child.main import Server, boot_and_serve

__all__ = ("main",)


def main() -> NoReturn:
    """Boot, then run jobs until stdin ends."""
    # With this, Celery keeps its stacks of current tasks in objects whose class can't be changed
    # (celery/utils/threads.py, 5.3 to 5.7).
    os.environ.pop("USE_FAST_LOCALS", None)
    boot_and_serve("SubprocAsyncio", _child, prepare=_prepare)


def _prepare(app: Any) -> None:
    from ..python_child.coroutines import await_tasks
    from ..python_child.stacks import keep_stacks_in_context
    from .traces import await_in_trace

    keep_stacks_in_context(app)
    await_tasks(app, await_in_trace)


def _child(*arguments: Any) -> Server:
    from .serving import AsyncioChild

    child = AsyncioChild(*arguments)
    child.start()
    return child


if __name__ == "__main__":
    main()
