"""A Python child runs exit handlers when it ends, but only for `exit_grace` seconds."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from billiard.exceptions import WorkerLostError

from tests.support.basics import DEADLINE, wait_for
from tests.support.projects import POOL, ask
from tests.support.worker import Project

CODE = """
import atexit, logging, logging.handlers, os, signal, sys, threading
def note(path, word):
    with open(path, "a") as file:
        file.write(word + "\\n")
@app.task(name="register")
def register(path):
    atexit.register(note, path, "ran")
    # Like an agent that queues records and sends them at the exit.
    target = logging.FileHandler(path)
    handler = logging.handlers.MemoryHandler(1000, target=target)
    logging.getLogger("queueing").addHandler(handler)
    logging.getLogger("queueing").warning("flushed")
    return os.getpid()
@app.task(name="register_fault")
def register_fault(path):
    atexit.register(note, path, "ran")
    def fail():
        raise OSError("the sink is gone")
    atexit.register(fail)
@app.task(name="register_hang")
def register_hang(path):
    atexit.register(note, path, "ran")
    atexit.register(threading.Event().wait)
@app.task(name="register_and_end")
def register_and_end(path, how):
    atexit.register(note, path, "ran")
    if how == "exit":
        sys.exit(3)
    os.kill(os.getpid(), getattr(signal, how))
"""


def project(directory: Path, **python: Any) -> Project:
    return Project(directory, conf={"subproc_pool": {"python": python}}, code=CODE)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_each_recycled_child_runs_its_exit_handlers(tmp_path: Path) -> None:
    proj, path = project(tmp_path), tmp_path / "ends"
    with proj.worker(*POOL, "-c", "1", "--max-tasks-per-child", "1") as worker:
        pids = [ask(proj, "register", str(path)) for _ in range(3)]
        assert len({*pids}) == 3
        wait_for(lambda: len(lines(path)) == 6, "the last one's end")
        assert worker.stop() == 0
    assert sorted(lines(path)) == ["flushed"] * 3 + ["ran"] * 3


def test_a_warm_stop_runs_exit_handlers(tmp_path: Path) -> None:
    proj, path = project(tmp_path), tmp_path / "ends"
    with proj.worker(*POOL, "-c", "2") as worker:
        ask(proj, "register", str(path))
        assert worker.stop() == 0
    assert sorted(lines(path)) == ["flushed", "ran"]


def test_a_task_that_exits_runs_exit_handlers(tmp_path: Path) -> None:
    proj, path = project(tmp_path), tmp_path / "ends"
    with proj.worker(*POOL, "-c", "1"):
        with pytest.raises(WorkerLostError, match="exitcode 3"):
            ask(proj, "register_and_end", str(path), "exit")
        assert lines(path) == ["ran"]


def test_a_killed_child_runs_no_exit_handler(tmp_path: Path) -> None:
    proj, path = project(tmp_path), tmp_path / "ends"
    with proj.worker(*POOL, "-c", "1") as worker:
        with pytest.raises(WorkerLostError, match="SIGKILL"):
            ask(proj, "register_and_end", str(path), signal.SIGKILL.name)
        assert worker.stop() == 0
    assert lines(path) == []


def test_an_exit_handler_that_fails_is_logged_and_the_others_run(tmp_path: Path) -> None:
    proj, path = project(tmp_path), tmp_path / "ends"
    with proj.worker(*POOL, "-c", "1") as worker:
        ask(proj, "register_fault", str(path))
        assert worker.stop() == 0
        assert "the sink is gone" in worker.log
    assert lines(path) == ["ran"]


def test_a_child_leaves_an_exit_handler_that_hangs_after_exit_grace(tmp_path: Path) -> None:
    # `stop_timeout` is longer than the test may take, so only `exit_grace` can end the child.
    proj, path = project(tmp_path, exit_grace=0.3, stop_timeout=10 * DEADLINE), tmp_path / "ends"
    with proj.worker(*POOL, "-c", "1") as worker:
        ask(proj, "register_hang", str(path))
        assert worker.stop() == 0
        assert "is not done after 0.3 s (subproc_pool.python.exit_grace)" in worker.log
    assert lines(path) == []


def test_the_warning_about_a_hanging_exit_handler_is_in_the_workers_log(tmp_path: Path) -> None:
    proj = project(tmp_path, exit_grace=0.3, stop_timeout=10 * DEADLINE)
    words = re.compile(
        r"WARNING/SubprocPoolWorker-1\] Child with pid \d+: .* not done after 0\.3 s"
    )
    with proj.worker(*POOL, "-c", "1") as worker:
        ask(proj, "register_hang", str(tmp_path / "ends"))
        worker.stop()
        assert words.search(worker.log)


# -- processes and threads that a task's module keeps for the next task

KEPT = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from ordinary_tasks import wait_for_file
kept = {}
def pids_of(executor, count):
    return [executor.submit(os.getpid).result() for _ in range(count)]
@app.task(name="keep_executor")
def keep_executor(method, busy):
    kept["it"] = ProcessPoolExecutor(1, multiprocessing.get_context(method))
    found = pids_of(kept["it"], 1)
    if busy:
        kept["it"].submit(wait_for_file, "/nowhere")
    return os.getpid(), found
@app.task(name="keep_pool")
def keep_pool(method, busy):
    kept["it"] = multiprocessing.get_context(method).Pool(1)
    found = [kept["it"].apply(os.getpid)]
    if busy:
        kept["it"].apply_async(wait_for_file, ("/nowhere",))
    return os.getpid(), found
@app.task(name="keep_threads")
def keep_threads(path):
    from celery.signals import worker_process_shutdown
    going = threading.Event()
    worker_process_shutdown.connect(lambda **_: going.set(), weak=False)
    kept["it"] = ThreadPoolExecutor(1)
    kept["it"].submit(going.wait)
    kept["it"].submit(time.sleep, 0.2)
    kept["it"].submit(note, path, "sent")
"""


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["keep_executor", "keep_pool"])
def test_processes_of_executors_end_when_their_child_is_recycled(
    tmp_path: Path, kind: str, method: str, busy: bool
) -> None:
    """They are useless without the child, unlike programs that a task has started."""
    conf = {"subproc_pool": {"python": {"exit_grace": 0.5 if busy else 2 * DEADLINE}}}
    proj = Project(tmp_path, conf=conf, code=CODE + KEPT)
    with proj.worker(*POOL, "-c", "1", "--max-tasks-per-child", "1") as worker:
        child, pids = ask(proj, kind, method, busy)
        wait_for(lambda: not psutil.pid_exists(child), "the child's end")
        wait_for(lambda: not any(map(psutil.pid_exists, pids)), "the end of its processes")
        late = "is not done after" in worker.log
        assert late == (busy and kind == "keep_executor")


def test_threads_of_an_executor_finish_what_they_have_begun(tmp_path: Path) -> None:
    proj, path = Project(tmp_path, code=CODE + KEPT), tmp_path / "ends"
    with proj.worker(*POOL, "-c", "1") as worker:
        ask(proj, "keep_threads", str(path))
        assert worker.stop() == 0
    assert lines(path) == ["sent"]
