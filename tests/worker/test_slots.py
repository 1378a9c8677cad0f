"""The worker's concurrency: who waits for a slot, and who is let in when."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import trace_task_ret
from kombu.asynchronous.semaphore import LaxBoundedSemaphore

from celery_subproc_pool import Pool
from celery_subproc_pool.core.model import Job
from celery_subproc_pool.worker.slots import ConditionSlots, SemaphoreSlots
from tests.support.basics import DEADLINE, python_child, wait_for


def job(task_id: str = "x") -> Job:
    return Job(task_id, "some.task", "default")


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


#: Seconds in which a caller that need not wait would have returned.
MOMENT = 0.2


def waits(thread: threading.Thread) -> bool:
    """Return whether `thread` goes on waiting: it had time to return."""
    thread.join(MOMENT)
    return thread.is_alive()


# -- without an event loop


@pytest.mark.parametrize(
    "let_in",
    [
        lambda slots, taken: slots.release(taken),
        lambda slots, taken: slots.resize(1),
        lambda slots, taken: slots.close(),
    ],
    ids=["release", "resize", "close"],
)
def test_a_caller_waits_until_a_slot_is_free(
    let_in: Callable[[ConditionSlots, Job], None],
) -> None:
    slots = ConditionSlots(1)
    slots.wait()
    taken = job()
    slots.occupy(taken)
    waiter = in_thread(slots.wait)
    assert waits(waiter)
    let_in(slots, taken)
    waiter.join(DEADLINE)
    assert not waiter.is_alive()


def test_fewer_slots_let_nobody_in_until_enough_are_free() -> None:
    slots = ConditionSlots(2)
    first, second = job("1"), job("2")
    slots.occupy(first)
    slots.occupy(second)
    slots.resize(-1)
    waiter = in_thread(slots.wait)
    slots.release(first)
    assert waits(waiter)
    slots.release(second)
    waiter.join(DEADLINE)
    assert not waiter.is_alive()


def jobs_let_in(pool: Pool) -> list[Any]:
    """Start `pool`, which has one slot; give it two jobs without an end; return those that it has
    let in before it was closed, and what the other got then."""
    let_in: list[Any] = []

    def consume() -> None:
        for task_id in ("first", "second"):
            body = [[[["wait", "/nowhere"]]], {}, {}]
            headers = {"id": task_id, "task": "do.it"}
            arguments = ("do.it", task_id, headers, body, None, None)
            let_in.append(pool.apply_async(trace_task_ret, arguments))

    pool.start()
    try:
        consumer = in_thread(consume)
        wait_for(lambda: let_in, "the first job")
        # The engine's thread answers each: time enough to let in the second job by mistake.
        for _ in range(20):
            pool.child_rows()
        first = list(let_in)
        pool.close()
        consumer.join(DEADLINE)
    finally:
        pool.terminate()
    return [len(first), let_in[1]]


def test_a_pool_that_is_started_again_has_its_slots_again() -> None:
    app = Celery("slots", broker="memory://", backend="cache+memory://", set_as_current=False)
    child = {"argv": python_child("obeys"), "tasks": ["do.it"], "size": 1}
    app.conf.subproc_pool = {"children": {"obeys": child}}
    pool = Pool(1, app=app, threads=True, putlocks=True)
    assert jobs_let_in(pool) == [1, None]
    assert jobs_let_in(pool) == [1, None]


# -- with an event loop


def test_a_slot_that_is_free_again_lets_in_what_celery_holds() -> None:
    semaphore = LaxBoundedSemaphore(1)
    slots = SemaphoreSlots(semaphore)
    log: list[str] = []
    taken = job()
    semaphore.acquire(slots.occupy, taken)
    semaphore.acquire(log.append, "next")
    assert log == []
    slots.release(taken)
    assert log == ["next"]


def test_a_job_that_celery_fails_to_start_gives_its_slot_to_the_next() -> None:
    semaphore = LaxBoundedSemaphore(1)
    slots = SemaphoreSlots(semaphore)
    log: list[str] = []

    def fails() -> None:
        raise RuntimeError("injected")

    taken = job()
    semaphore.acquire(slots.occupy, taken)
    semaphore.acquire(fails)
    semaphore.acquire(log.append, "next")
    slots.release(taken)
    assert log == ["next"]


def test_what_celery_holds_is_forgotten_once_the_pool_is_closed() -> None:
    semaphore = LaxBoundedSemaphore(1)
    slots = SemaphoreSlots(semaphore)
    log: list[str] = []
    taken = job()
    semaphore.acquire(slots.occupy, taken)
    semaphore.acquire(log.append, "next")
    slots.close()
    slots.release(taken)
    assert log == []
