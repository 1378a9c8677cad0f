"""The program of a tracer. Run as ``python -m celery_subproc_pool.tracer.main``.

As in `python_child.main`, the top of this module must not import the project, Celery or msgspec.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

from ..python_child.main import Server, boot_and_serve

__all__ = ("main",)


def main() -> NoReturn:
    """Boot, then trace jobs until stdin ends."""
    # With this, Celery keeps its stacks of current tasks by thread, and not by greenlet
    # (celery/utils/threads.py, 5.3 to 5.7).
    os.environ.pop("USE_FAST_LOCALS", None)
    boot_and_serve("SubprocTracer", _tracer)


def _tracer(*arguments: Any) -> Server:
    from .serving import Tracer

    return Tracer(*arguments)


if __name__ == "__main__":
    main()
