"""What the versions of Celery need done differently in a Python child."""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType, FrameType
from typing import Any

from celery import Celery, _state
from celery.app import trace

__all__ = (
    "block_joins",
    "install_fixups",
    "is_at_body",
    "is_trace",
    "live_receivers",
)


#: What Celery's tracer calls the task's own code by: its body, and its hook before it, whose
#: exceptions are the body's (5.3 to 5.7: celery/app/trace.py, `build_tracer`).
_BODY = frozenset(("fun", "task_before_start"))


def is_trace(code: CodeType) -> bool:
    """Return whether `code` is that of the function which traces a job."""
    # Not the file of `build_tracer`, in whose place agents put functions of their own.
    return "fun" in code.co_freevars and code.co_filename == trace.__file__


def is_at_body(tracer: FrameType) -> bool:
    """Return whether the frame of a tracer is where it calls the task's own code."""
    return tracer.f_lineno in _lines_of_body(tracer.f_code)


@cache
def _lines_of_body(tracer: CodeType) -> frozenset[int]:
    found = set()
    starts = dict(dis.findlinestarts(tracer))
    line = None
    for instruction in dis.get_instructions(tracer):
        line = starts.get(instruction.offset, line)
        if instruction.argval in _BODY and line is not None:
            found.add(line)
    return frozenset(found)


def live_receivers(signal: Any, sender: Any) -> list[Any]:
    """Return who is called when `sender` sends `signal`.

    Celery 5.3 to 5.7 have no public name for it (celery/utils/dispatch/signal.py).
    """
    found: list[Any] = signal._live_receivers(sender)
    return found


def block_joins() -> None:
    """Let `result.get()` inside of a task raise: it would wait for a slot that it holds.

    Celery has no public name for it; this is what `concurrency.prefork.process_initializer` calls.
    """
    _state._set_task_join_will_block(True)


def install_fixups(app: Celery) -> None:
    """Connect what Celery's Django fixup does around each task and at a process' start.

    In a worker, the signal `worker_init` does so, and forked processes inherit it. It is not sent
    here: users connect to it what is to happen once for a worker. Celery 5.3 to 5.7 keep fixups in
    `_fixups`, and the part that is for workers in `worker_fixup`.
    """
    for fixup in app._fixups or ():
        worker_fixup = getattr(fixup, "worker_fixup", None)
        if worker_fixup is not None:
            worker_fixup.install()
