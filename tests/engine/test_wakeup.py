"""The pipe that wakes the engine: it is readable when it should be, and closing it is safe."""

from __future__ import annotations

import select
import threading

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


def test_closing_while_other_threads_wake_raises_nothing() -> None:
    failures: list[BaseException] = []

    def go_on_waking(wakeup: Wakeup, closed: threading.Event) -> None:
        try:
            while not closed.is_set():
                wakeup.wake()
        except OSError as exc:
            failures.append(exc)

    for _ in range(200):
        wakeup, closed = Wakeup(), threading.Event()
        threads = [threading.Thread(target=go_on_waking, args=(wakeup, closed)) for _ in range(4)]
        for thread in threads:
            thread.start()
        select.select([wakeup], [], [])
        # From now on, one of them writes again.
        wakeup.clear()
        wakeup.close()
        closed.set()
        for thread in threads:
            thread.join()
    assert failures == []
