"""The pipe that wakes the engine, with many threads that do, while it closes."""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress

from celery_subproc_pool.engine.wakeup import Wakeup


def readable(wakeup: Wakeup) -> bool:
    return bool(select.select([wakeup], [], [], 0)[0])


def test_it_is_readable_until_it_is_cleared() -> None:
    wakeup = Wakeup()
    assert not readable(wakeup)
    for _ in range(3):
        wakeup.wake()
    assert readable(wakeup)
    wakeup.clear()
    assert not readable(wakeup)
    wakeup.wake()
    assert readable(wakeup)
    wakeup.close()
    wakeup.wake()


def test_who_wakes_it_while_it_closes_need_not_know() -> None:
    failures: list[BaseException] = []

    def go_on_waking(wakeup: Wakeup, closed: threading.Event) -> None:
        try:
            while not closed.is_set():
                # As if it had been cleared, so that each writes; never more than the pipe takes.
                with suppress(BlockingIOError):
                    wakeup.wake()
                wakeup._pending = False
        except OSError as exc:
            failures.append(exc)

    for _ in range(200):
        wakeup, closed = Wakeup(), threading.Event()
        assert wakeup._writer is not None
        os.set_blocking(wakeup._writer, False)
        threads = [threading.Thread(target=go_on_waking, args=(wakeup, closed)) for _ in range(4)]
        for thread in threads:
            thread.start()
        wakeup.close()
        closed.set()
        for thread in threads:
            thread.join()
    assert failures == []
