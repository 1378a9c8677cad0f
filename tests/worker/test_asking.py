"""Other threads ask the engine for facts: they never see what it is just changing."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from celery_subproc_pool.core import stats
from celery_subproc_pool.worker.drivers import ThreadDriver
from tests.support.basics import DEADLINE, python_child, wait_for
from tests.support.engine import OBEYS, Engine

#: Seconds: longer than any of these tests waits.
LONG = DEADLINE


def who() -> str:
    return threading.current_thread().name


@contextmanager
def turned_by_a_thread(engine: Engine) -> Iterator[Engine]:
    with engine:
        driver = ThreadDriver(engine.supervisor)
        driver.start()
        try:
            yield engine
        finally:
            driver.halt()


def test_the_thread_that_turns_the_engine_answers() -> None:
    with turned_by_a_thread(Engine(OBEYS)) as engine:
        assert engine.supervisor.ask(who, LONG) == "subproc-engine"


def test_what_asking_raises_is_raised() -> None:
    with turned_by_a_thread(Engine(OBEYS)) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.supervisor.ask(lambda: 1 / 0, LONG)
        assert engine.supervisor.ask(who, LONG) == "subproc-engine"


def test_on_the_engines_own_thread_the_answer_is_there_at_once() -> None:
    with Engine(OBEYS) as engine:
        assert engine.supervisor.ask(who, LONG) == who()
    assert engine.supervisor.ask(who, LONG) == who()


def test_a_signal_handler_in_the_midst_of_a_turn_gets_its_answer() -> None:
    answers: list[tuple[bool, str]] = []

    def ask(*_: Any) -> None:
        turning = engine.supervisor.turning
        answers.append((turning, engine.supervisor.ask(who, LONG)))

    with Engine(OBEYS) as engine:
        before = signal.signal(signal.SIGUSR1, ask)
        try:
            # A callback runs during a turn.
            engine.supervisor.call(partial(signal.raise_signal, signal.SIGUSR1))
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert answers == [(True, who())]


def test_an_engine_that_hangs_is_not_waited_for() -> None:
    hangs, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        go_on.wait(LONG)

    asked: list[str] = []

    def question() -> int:
        asked.append(who())
        return len(asked)

    with turned_by_a_thread(Engine(OBEYS)) as engine:
        engine.supervisor.call(hang)
        hangs.wait(LONG)
        assert engine.supervisor.ask(question, 0.1) == 1
        go_on.set()
        assert engine.supervisor.ask(who, LONG) == "subproc-engine"
    # The late answer is dropped.
    assert asked == [who()]


def test_an_engine_that_has_failed_is_not_waited_for() -> None:
    with turned_by_a_thread(Engine(OBEYS)) as engine:
        assert engine.supervisor.ask(who, LONG) == "subproc-engine"
        engine.supervisor.failed = True
        assert engine.supervisor.ask(who, LONG) == who()


def test_an_engine_whose_thread_has_ended_is_not_waited_for() -> None:
    with turned_by_a_thread(Engine(OBEYS)) as engine:
        assert engine.supervisor.ask(who, LONG) == "subproc-engine"
    assert engine.supervisor.ask(who, LONG) == who()


def test_facts_are_told_while_jobs_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `ask`, a table of jobs would change while another thread iterates over it."""
    child = [*python_child("many"), '{"features": ["multiplex"]}']
    engine = Engine(child, limit=64, handshake=True, max_in_flight=64, tasks=[])
    supervisor = engine.supervisor
    done = 0

    def resolved(job: Any, *_: Any) -> None:
        nonlocal done
        done += 1
        if done < 2000:
            engine.begin("ok", 1, task_id=f"next-{done}")

    def rows() -> list[dict[str, Any]]:
        groups = supervisor.scheduler.groups.values()
        return supervisor.ask(lambda: stats.rows(groups, 0.0, lambda child: 0), LONG)

    monkeypatch.setattr(engine, "resolved", resolved)
    switch = sys.getswitchinterval()
    with turned_by_a_thread(engine):
        sys.setswitchinterval(1e-6)
        try:
            for number in range(64):
                engine.begin("ok", 1, task_id=str(number))
            wait_for(lambda: len(rows()) == 1 and done >= 2000, "2000 jobs")
        finally:
            sys.setswitchinterval(switch)


def test_a_worker_asks_its_engine_for_facts(
    session_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for name in ("rows", "group_facts"):
        tell = getattr(stats, name)
        monkeypatch.setattr(stats, name, lambda *args, tell=tell: told.append(who()) or tell(*args))
    pool = session_worker.pool
    assert {row["group"] for row in pool.child_rows()} >= {"obeys", "single"}
    assert set(pool.info["groups"]) >= {"obeys", "single"}
    assert pool.info["processes"]
    assert set(told) == {"subproc-engine"}
