"""A pool that does nothing. What it takes is what Celery's consumer costs on any pool.

Use: ``-P custom`` with ``CELERY_CUSTOM_WORKER_POOL=benchmarks.floor:Pool``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from celery.concurrency.base import BasePool

__all__ = ("Pool",)


class Pool(BasePool):  # type: ignore[misc]
    """Reports each task as accepted and done."""

    def on_apply(
        self,
        target: Any,
        args: Any,
        kwargs: Any,
        callback: Callable[[Any], None],
        accept_callback: Callable[[int, float], None],
        **_: Any,
    ) -> None:
        """Call the callbacks of a task at once."""
        accept_callback(os.getpid(), time.monotonic())
        callback((0, None, 0.0))
