"""What versions of Celery need done differently in a Python child, or have no public name for."""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType, FrameType
from typing import Any

from celery import Celery, _state
from celery.app import trace

__all__ = (
    "block_joins",
    "body_lines",
    "install_fixups",
    "is_at_body",
    "is_trace",
    "live_receivers",
)

#: The names by which Celery's tracer calls the task's own code (5.3 to 5.7: celery/app/trace.py,
#: `build_tracer`): the body, and the hook before it. An exception of the hook counts as the body's.
_BODY = frozenset(("fun", "task_before_start"))


def is_trace(code: CodeType) -> bool:
    """Return whether `code` is that of Celery's function that traces a job."""
    # Don't ask `build_tracer` for its file: agents replace it by functions of their own.
    return "fun" in code.co_freevars and code.co_filename == trace.__file__


def is_at_body(tracer: FrameType) -> bool:
    """Return whether `tracer`, the frame of a tracer, is at a call of the task's own code."""
    return tracer.f_lineno in body_lines(tracer.f_code)


@cache
def body_lines(tracer: CodeType) -> frozenset[int]:
    """Return the numbers of the lines in a tracer that call the task's own code."""
    found = set()
    starts = dict(dis.findlinestarts(tracer))
    line = None
    for instruction in dis.get_instructions(tracer):
        line = starts.get(instruction.offset, line)
        if instruction.argval in _BODY and line is not None:
            found.add(line)
    return frozenset(found)


def live_receivers(signal: Any, sender: Any) -> list[Any]:
    """Return the receivers that are called when `sender` sends `signal`.

    Celery 5.3 to 5.7 have no public name for this (celery/utils/dispatch/signal.py).
    """
    found: list[Any] = signal._live_receivers(sender)
    return found


def block_joins() -> None:
    """Let `result.get()` inside a task raise. It would wait for a slot that the task holds.

    Celery has no public name for this. `concurrency.prefork.process_initializer` calls the same.
    """
    _state._set_task_join_will_block(True)


def install_fixups(app: Celery) -> None:
    """Connect what Celery's Django fixup does around each task and when a process starts.

    In a worker the signal `worker_init` connects it, and forked processes inherit that. The signal
    is not sent here by default: users connect to it what must happen once for a worker. Celery 5.3
    to 5.7 keep fixups in `_fixups`, and the part for workers in `worker_fixup`.
    """
    for fixup in app._fixups or ():
        worker_fixup = getattr(fixup, "worker_fixup", None)
        if worker_fixup is not None:
            worker_fixup.install()
