"""`async def` tasks: what Celery promises for tasks is kept for coroutines."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import celery
import psutil
import pytest
from billiard.exceptions import (
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
    WorkerLostError,
)
from celery.exceptions import TaskRevokedError

from celery_subproc_pool.errors import CoroutineCancelledError
from tests.support.basics import state_of, wait_for
from tests.support.worker import Worker
from tests.support.workplace import Workplace, get

pytestmark = pytest.mark.usefixtures("no_garbage_collection")

POOL = ("-P", "celery_subproc_pool:Pool", "-c", "50")
CODE = """
app.conf.include.append("coroutine_tasks")
from coroutine_tasks import OfClass, OfPartial
app.register_task(OfClass())
app.register_task(OfPartial())
"""
ASYNCIO = {"cancel_grace": 2, "slow_callback": 0.3}
CONF = {"subproc_pool": {"asyncio": ASYNCIO, "python": {"size": 1}}}


class Running:
    """A worker that serves many tests."""

    def __init__(self, place: Workplace, worker: Worker, directory: Path) -> None:
        self.place = place
        self.worker = worker
        self._directory = directory
        self._count = 0

    def path(self, name: str) -> Path:
        self._count += 1
        return self._directory / f"{name}-{self._count}"

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        return self.place.app.send_task(name, args, **options)

    def begun(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task that notes that it has begun, and wait for that."""
        path = self.path("begun")
        result = self.send(name, str(path), *args, **options)
        wait_for(path.exists, f"{name} to begin")
        return result

    @property
    def pid(self) -> int:
        return int(get(self.send("aio.pid")))


@pytest.fixture(scope="module")
def running_worker(tmp_path_factory: pytest.TempPathFactory, broker: str) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp(f"asyncio-{broker}")
    with closing(Workplace(directory, broker, CODE, **CONF)) as place:  # noqa: SIM117
        with place.project.worker(*POOL) as worker:
            yield Running(place, worker, directory)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("decorated", "decorated"),
        ("decorated_for_coroutines", "decorated"),
        ("partial", "partial"),
        ("with_call", "called"),
        ("with_async_call", "called"),
        ("bound", None),
        ("class", None),
        ("autoretried", 2),
    ],
)
def test_a_coroutine_function_is_found_and_awaited(
    running_worker: Running, name: str, more: Any
) -> None:
    result = running_worker.send(f"aio.{name}", "word")
    assert get(result) == ["word", more or result.id]


def test_ordinary_tasks_run_in_other_processes(running_worker: Running) -> None:
    pids = {get(running_worker.send("facts"))["pid"] for _ in range(5)}
    assert running_worker.pid not in pids


def test_an_exception_has_the_traceback_of_the_task(running_worker: Running) -> None:
    result = running_worker.send("aio.raises")
    with pytest.raises(ValueError, match="boom"):
        get(result)
    assert 'raise ValueError("boom")' in result.traceback


def test_each_job_has_its_own_request_and_context(running_worker: Running) -> None:
    results = {f"token {n}": running_worker.send("aio.contexts", f"token {n}") for n in range(100)}
    for token, result in results.items():
        assert get(result) == [], token
    if sys.version_info >= (3, 11):
        for token, result in results.items():
            assert get(running_worker.send("aio.after_body", result.id)) == token


def test_tasks_that_a_coroutine_calls(running_worker: Running) -> None:
    assert get(running_worker.send("aio.calls")) == [3, 7, True]


def test_many_jobs_wait_at_a_time_in_one_child(running_worker: Running) -> None:
    gate = running_worker.path("gate")
    results = [running_worker.begun("aio.wait", str(gate)) for _ in range(40)]
    gate.touch()
    assert [get(result) for result in results] == ["done"] * 40


# -- limits


@pytest.mark.parametrize(
    "where", ["sleep", "async with", "timeout", "gather", "shield", "group", "thread"]
)
def test_a_soft_limit_is_raised_where_the_coroutine_waits(
    running_worker: Running, where: str
) -> None:
    pid = running_worker.pid
    result = running_worker.send("aio.soft", where, soft_time_limit=0.3)
    assert get(result) == "caught"
    assert running_worker.pid == pid


def test_a_soft_limit_that_a_task_group_wraps_is_celerys(running_worker: Running) -> None:
    result = running_worker.send("aio.soft_in_body_of_group", soft_time_limit=0.3)
    with pytest.raises(SoftTimeLimitExceeded):
        get(result)


def test_a_job_may_go_on_after_its_soft_limit(running_worker: Running) -> None:
    """For longer than `cancel_grace`: that is for jobs that have to end."""
    pid = running_worker.pid
    result = running_worker.begun("aio.ignores_soft_limit", 3.0, soft_time_limit=0.2)
    assert get(result) == "done"
    assert running_worker.pid == pid


def test_a_hard_limit_cancels_the_coroutine_and_nothing_else(running_worker: Running) -> None:
    pid, gate, ended = running_worker.pid, running_worker.path("gate"), running_worker.path("end")
    neighbour = running_worker.begun("aio.wait", str(gate))
    result = running_worker.begun("aio.notes_end", str(ended), time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        get(result)
    wait_for(ended.exists, "the coroutine to be cancelled")
    assert ended.read_text() == "CancelledError"
    gate.touch()
    assert get(neighbour) == "done"
    assert state_of(result) == "FAILURE"
    assert running_worker.pid == pid


def test_a_revoke_cancels_the_coroutine_and_nothing_else(running_worker: Running) -> None:
    pid, gate, ended = running_worker.pid, running_worker.path("gate"), running_worker.path("end")
    neighbour = running_worker.begun("aio.wait", str(gate))
    result = running_worker.begun("aio.notes_end", str(ended))
    running_worker.place.app.control.revoke(result.id, terminate=True)
    with pytest.raises(TaskRevokedError):
        get(result)
    wait_for(ended.exists, "the coroutine to be cancelled")
    gate.touch()
    assert get(neighbour) == "done"
    assert state_of(result) == "REVOKED"
    assert running_worker.pid == pid


@pytest.mark.parametrize("kind", ["aio", "plain"])
def test_hooks_that_are_coroutine_functions_are_awaited(running_worker: Running, kind: str) -> None:
    notes = running_worker.path("notes")
    good = running_worker.send(f"{kind}.with_hooks", str(notes), False)
    get(good)
    bad = running_worker.send(f"{kind}.with_hooks", str(notes), True)
    with pytest.raises(ValueError, match="boom"):
        get(bad)
    wait_for(lambda: "on_failure" in notes.read_text(), "the last hook")
    assert notes.read_text().splitlines() == [
        f"before_start {good.id}",
        f"on_success {good.id}",
        f"before_start {bad.id}",
        f"on_failure {bad.id} ValueError",
    ]


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="Celery calls no hook then")
def test_hooks_that_celery_calls_in_the_worker_are_awaited(running_worker: Running) -> None:
    notes = running_worker.path("notes")
    result = running_worker.send("aio.hooks_and_limit", str(notes), time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        get(result)
    last = f"on_failure {result.id} TimeLimitExceeded"
    wait_for(lambda: last in notes.read_text(), "the hook")


# -- what costs the child


def test_a_coroutine_that_swallows_its_cancellation_costs_the_child(
    running_worker: Running,
) -> None:
    pid, gate = running_worker.pid, running_worker.path("gate")
    neighbour = running_worker.begun("aio.wait", str(gate))
    result = running_worker.begun("aio.swallows", time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        get(result)
    with pytest.raises(WorkerLostError):
        get(neighbour)
    wait_for(lambda: not psutil.pid_exists(pid), "the child to be gone")
    assert running_worker.pid != pid
    assert re.search(
        rf"pid {pid}.*it went on with aio\.swallows\[{result.id}\] for 2 s after it was told to"
        r" cancel it \(time_limit\)",
        running_worker.worker.log,
    )


def test_a_coroutine_that_blocks_the_loop_is_named(running_worker: Running) -> None:
    pid, gate = running_worker.pid, running_worker.path("gate")
    result = running_worker.begun("aio.blocks", str(gate))
    name = rf"aio\.blocks\[{result.id}\] holds up the event loop for \d"
    wait_for(lambda: re.search(name, running_worker.worker.log), "the warning")
    gate.touch()
    assert get(result) == "done"
    log = running_worker.worker.log
    assert "wait_for_gate(begun, gate)" in log[log.index(f"aio.blocks[{result.id}] holds") :]
    wait_for(lambda: "The event loop goes on." in running_worker.worker.log, "the end of it")
    assert running_worker.pid == pid


def test_a_coroutine_that_blocks_for_good_costs_the_child(running_worker: Running) -> None:
    pid, gate = running_worker.pid, running_worker.path("gate")
    neighbour = running_worker.begun("aio.wait", str(gate))
    result = running_worker.begun("aio.blocks", str(gate), time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        get(result)
    with pytest.raises(WorkerLostError):
        get(neighbour)
    assert running_worker.pid != pid


def test_a_coroutine_that_ends_the_process_costs_its_neighbours(running_worker: Running) -> None:
    pid, gate = running_worker.pid, running_worker.path("gate")
    neighbour = running_worker.begun("aio.wait", str(gate))
    result = running_worker.begun("aio.exits")
    for lost in (result, neighbour):
        with pytest.raises(WorkerLostError, match="exit"):
            get(lost)
    assert running_worker.pid != pid


def test_sys_exit_and_a_cancellation_of_its_own_cost_one_job(running_worker: Running) -> None:
    pid, gate = running_worker.pid, running_worker.path("gate")
    neighbour = running_worker.begun("aio.wait", str(gate))
    with pytest.raises(WorkerLostError, match="SystemExit"):
        get(running_worker.send("aio.sys_exit"))
    with pytest.raises(CoroutineCancelledError, match="not by a time limit"):
        get(running_worker.send("aio.cancels_itself"))
    gate.touch()
    assert get(neighbour) == "done"
    assert running_worker.pid == pid


def test_what_a_job_leaves_behind_goes_on_in_its_own_context(running_worker: Running) -> None:
    tokens = {f"token {n}" for n in range(10)}
    for token in tokens:
        get(running_worker.send("aio.leaves", token))

    def all_left() -> Any:
        found = get(running_worker.send("aio.left"))
        return found if len(found) == len(tokens) else None

    assert set(wait_for(all_left, "what was left")) == {f"{token} {token}" for token in tokens}
