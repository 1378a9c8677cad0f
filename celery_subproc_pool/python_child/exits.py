"""How a Python child ends: what an interpreter runs at its end, within a time."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import threading
import traceback
from typing import NoReturn

from celery import signals

from ..serve import flush_prints

__all__ = ("leave", "run_exit_handlers")

#: Seconds that the log record about an overdue exit may take.
LAST_WORDS = 0.5


def leave(hostname: str, pid: int, grace: float, status: int) -> NoReturn:
    """End as a process of prefork does, without waiting for threads that tasks left.

    Unlike prefork, run exit handlers first: agents send then what they have queued.

    Arguments:
        hostname: the worker's node name.
        pid: this process.
        grace: seconds that the exit handlers may take.
        status: the exit status.
    """
    try:
        signals.worker_process_shutdown.send(sender=hostname, pid=pid, exitcode=status)
        run_exit_handlers(grace, status)
        flush_prints()
    finally:
        os._exit(status)


def run_exit_handlers(grace: float, status: int) -> None:
    """Run what an interpreter runs when it ends, in its order.

    First executors end: `multiprocessing` would wait for their processes. Then the functions
    registered with `atexit` run, among them those of agents that send what they have queued.
    `logging.shutdown` comes last because it was registered first.

    Arguments:
        grace: seconds. If the handlers are not done then, the process exits without them.
        status: the exit status in that case.
    """
    timer = threading.Timer(grace, _give_up, (grace, status))
    timer.daemon = True
    timer.start()
    # `threading._shutdown` would run these too, but it also waits for threads, which may never end.
    for end in reversed(getattr(threading, "_threading_atexits", ())):
        try:
            end()
        except Exception:
            traceback.print_exc()
    atexit._run_exitfuncs()
    timer.cancel()


def _give_up(grace: float, status: int) -> None:
    try:
        # In a thread: logging may be what hangs.
        teller = threading.Thread(target=_tell_overdue, args=(grace,), daemon=True)
        teller.start()
        teller.join(LAST_WORDS)
        # These processes work for this one, unlike programs that it has started.
        for process in multiprocessing.active_children():
            process.terminate()
    finally:
        os._exit(status)


def _tell_overdue(grace: float) -> None:
    logging.getLogger("celery_subproc_pool").warning(
        "Child with pid %d: what is registered with atexit is not done after %g s"
        " (subproc_pool.python.exit_grace); the child ends without it",
        os.getpid(),
        grace,
    )
