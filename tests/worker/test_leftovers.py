"""What a child leaves behind when it goes: programs, and shared memory, which others clean up."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError

from celery_subproc_pool.engine import guardian
from tests.support.basics import DEADLINE, runs, wait_for
from tests.support.projects import POOL, ask, obeying
from tests.support.worker import Project, Worker

CODE = """
import multiprocessing, os, signal, subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
from ordinary_tasks import wait_for_file
kept = []
def start(*argv, **options):
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, **options).pid
@app.task(name="share")
def share(token, path, end=None):
    context = multiprocessing.get_context("spawn")
    for number in range(20):
        kept.append(SharedMemory(f"{token}-{os.getpid()}-{number}", create=True, size=1024))
    for _ in range(2):
        kept.append(context.Semaphore())
    with open(path, "a") as file:
        for each in kept:
            file.write(getattr(each, "name", None) or each._semlock.name)
            file.write("\\n")
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "wait":
        wait_for_file("/nowhere")
@app.task(name="leave")
def leave(gate, done):
    script = 'while ! [ -e "$0" ]; do sleep 0.02; done; touch "$1"'
    return os.getpid(), start("sh", "-c", script, gate, done)
@app.task(name="leave_stubborn")
def leave_stubborn(begun, **options):
    code = "import signal; signal.signal(15, signal.SIG_IGN); open(%r, 'w'); signal.pause()" % begun
    pid = start(sys.executable, "-S", "-c", code, **options)
    wait_for_file(begun)
    return pid
@app.task(name="leave_and_wait")
def leave_and_wait(path):
    pid = start("sleep", "600")
    with open(path + ".part", "w") as file:
        file.write(str(pid))
    os.rename(path + ".part", path)
    wait_for_file("/nowhere")
@app.task(name="leave_big")
def leave_big(path):
    code = "x = bytearray(200 << 20); open(%r, 'w'); import time; time.sleep(600)" % path
    start(sys.executable, "-S", "-c", code)
    wait_for_file(path)
    return os.getpid()
@app.task(name="pid")
def pid():
    return os.getpid()
"""


def project(directory: Path, **python: Any) -> Project:
    return Project(directory, conf={"subproc_pool": {"python": python}}, code=CODE)


# -- shared memory


@pytest.fixture
def token() -> Iterator[str]:
    """Return how the names of a test's segments begin; what is left of them is removed."""
    name = f"csp-{uuid.uuid4().hex[:12]}"
    yield name
    for path in Path("/dev/shm").glob(f"{name}*"):
        path.unlink()


def left_in(names: Path) -> list[str]:
    """Return what the system still has of the segments and semaphores in a list of names."""
    found = os.listdir("/dev/shm")
    titles = [name.strip("/") for name in names.read_text().split()]
    return [name for name in titles if name in found or f"sem.{name}" in found]


def by_sigkill(proj: Project, worker: Worker, *args: str) -> None:
    with pytest.raises(WorkerLostError):
        ask(proj, "share", *args, "kill")


def by_limit(proj: Project, worker: Worker, *args: str) -> None:
    result = proj.app.send_task("share", (*args, "wait"), time_limit=2)
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=DEADLINE, interval=0.02)


def by_revoke(proj: Project, worker: Worker, *args: str) -> None:
    result = proj.app.send_task("share", (*args, "wait"))
    path = Path(args[1])
    wait_for(lambda: path.exists() and len(path.read_text().split()) == 22, "the segments")
    proj.app.control.revoke(result.id, terminate=True, signal="SIGKILL")
    wait_for(lambda: " is replaced: " in worker.log, "the end of the child")


def by_recycling(proj: Project, worker: Worker, *args: str) -> None:
    ask(proj, "share", *args)
    ask(proj, "pid")
    wait_for(lambda: " is recycled: " in worker.log, "a successor")


def by_warm_stop(proj: Project, worker: Worker, *args: str) -> None:
    ask(proj, "share", *args)
    assert worker.stop() == 0


def by_cold_stop(proj: Project, worker: Worker, *args: str) -> None:
    ask(proj, "share", *args)
    worker.process.send_signal(signal.SIGQUIT)
    worker.process.wait(DEADLINE)


def by_the_workers_death(proj: Project, worker: Worker, *args: str) -> None:
    ask(proj, "share", *args)
    worker.process.kill()
    worker.process.wait(DEADLINE)


@pytest.mark.parametrize(
    "end",
    [
        by_sigkill,
        by_limit,
        by_revoke,
        by_recycling,
        by_warm_stop,
        by_cold_stop,
        by_the_workers_death,
    ],
)
def test_shared_memory_is_cleaned_up_after_a_child(
    tmp_path: Path, token: str, end: Callable[..., None]
) -> None:
    proj, names = project(tmp_path), tmp_path / "names"
    words = ("--max-tasks-per-child", "1") if end is by_recycling else ()
    with proj.worker(*POOL, "-c", "1", *words) as worker:
        end(proj, worker, token, str(names))
        assert len(names.read_text().split()) == 22
        wait_for(lambda: not left_in(names), "the end of all segments")
        # What cleans up after a child is no program of a task's.
        assert "are ended: " not in worker.log


# -- programs


def leave(proj: Project, directory: Path) -> tuple[int, int]:
    """Have a task leave a program running; return the child's pid and the program's."""
    child, program = ask(proj, "leave", str(directory / "gate"), str(directory / "done"))
    return child, program


def test_a_program_outlives_a_child_that_is_recycled(tmp_path: Path) -> None:
    proj = project(tmp_path)
    with proj.worker(*POOL, "-c", "1", "--max-tasks-per-child", "1") as worker:
        child, program = leave(proj, tmp_path)
        assert ask(proj, "pid") != child
        wait_for(lambda: not psutil.pid_exists(child), "the child's end")
        assert runs(program)
        (tmp_path / "gate").touch()
        wait_for((tmp_path / "done").exists, "the program's own end")
        assert "are ended: " not in worker.log


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL])
@pytest.mark.parametrize("recycled", [True, False])
def test_no_program_outlives_the_worker(
    tmp_path: Path, recycled: bool, signum: signal.Signals
) -> None:
    proj = project(tmp_path)
    words = ("--max-tasks-per-child", "1") if recycled else ()
    with proj.worker(*POOL, "-c", "1", *words) as worker:
        child, program = leave(proj, tmp_path)
        if recycled:
            wait_for(lambda: not psutil.pid_exists(child), "the child's end")
        assert runs(program)
        worker.process.send_signal(signum)
        worker.process.wait(DEADLINE)
        wait_for(lambda: not runs(program), "its end")
        told = re.search(rf"WARNING/MainProcess\] .* are ended: {program} \(sh\)", worker.log)
        assert bool(told) == (signum != signal.SIGKILL)


def test_a_child_that_is_killed_takes_its_programs_along(tmp_path: Path) -> None:
    proj, path = project(tmp_path), tmp_path / "pid"
    with proj.worker(*POOL, "-c", "1") as worker:
        result = proj.app.send_task("leave_and_wait", (str(path),), time_limit=2)
        with pytest.raises(TimeLimitExceeded):
            result.get(timeout=DEADLINE, interval=0.02)
        program = int(path.read_text())
        wait_for(lambda: not runs(program), "its end")
        assert re.search(
            rf"is replaced: .*; programs that it has started are ended: {program} \(sleep\)",
            worker.log,
        )
        wait_for(lambda: len(worker.children()) == 1, "the next child, alone")


@pytest.mark.parametrize("worker_too", [True, False])
def test_what_ignores_sigterm_ends_too(tmp_path: Path, worker_too: bool) -> None:
    proj, begun = project(tmp_path), str(tmp_path / "begun")
    with proj.worker(*POOL, "-c", "1") as worker:
        program = ask(proj, "leave_stubborn", begun)
        if worker_too:
            worker.process.kill()
            worker.process.wait(DEADLINE)
        else:
            [child] = worker.children()
            child.kill()
        wait_for(lambda: not runs(program), "its end")


@pytest.mark.parametrize(("setting", "kept"), [(None, False), ("keep", True), ("kill", False)])
def test_external_children_leave_what_the_setting_says(
    tmp_path: Path, setting: str | None, kept: bool
) -> None:
    settings = {} if setting is None else {"leftovers": setting}
    proj = obeying(tmp_path, size=1, max_jobs=1, **settings)
    with proj.worker(*POOL, "-c", "1") as worker:
        first = worker.children()[0]
        ask(proj, "do.it", [["start", 1], ["reply", {}]])
        ask(proj, "do.it", [["reply", {}]])
        wait_for(lambda: not first.is_running(), "the child's end")
        found = re.search(
            r"WARNING/MainProcess\] Child obeys#0 \(pid \d+\) is gone; programs that it has left"
            r" running are ended: (\d+) \(python[^ ]*\) \(leftovers is 'kill'\)",
            worker.log,
        )
        assert (found is None) == kept
        if found is not None:
            wait_for(lambda: not runs(int(found[1])), "the program's end")


def test_a_program_that_is_kept_is_not_counted_as_the_next_childs_memory(tmp_path: Path) -> None:
    proj = project(tmp_path, max_memory=150 * 2**20)
    with proj.worker(*POOL, "-c", "1") as worker:
        first = ask(proj, "leave_big", str(tmp_path / "begun"))
        wait_for(lambda: ask(proj, "pid") != first, "a successor")
        wait_for(lambda: not psutil.pid_exists(first), "the first one's end")
        assert len({ask(proj, "pid") for _ in range(5)}) == 1
        assert worker.log.count(" is recycled: ") == 1


# -- recognised


def test_nothing_outlives_the_worker_that_has_another_environment(tmp_path: Path) -> None:
    code = """
@app.task(name="leave_bare")
def leave_bare(begun):
    return leave_stubborn(begun, env={}, start_new_session=True)
"""
    proj = Project(tmp_path, code=CODE + code)
    with proj.worker(*POOL, "-c", "1") as worker:
        program = ask(proj, "leave_bare", str(tmp_path / "begun"))
        worker.process.kill()
        worker.process.wait(DEADLINE)
        wait_for(lambda: not runs(program), "its end")


@pytest.mark.parametrize("permitted", [True, False])
def test_descendants_are_known_by_a_limit_that_is_inherited(
    monkeypatch: pytest.MonkeyPatch, permitted: bool
) -> None:
    """Also descendants that have changed their user: their limits are read in another way."""
    with closing(guardian.Guardian()) as pool, closing(guardian.Guardian()) as other:
        # It overwrites nothing: it was started without the mark in the environment.
        program = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
        pool.watch(program.pid)
        if not permitted:
            monkeypatch.setattr(resource, "prlimit", forbid)
        assert (pool.descendants(), other.descendants()) == ([program.pid], [])
        monkeypatch.undo()
    assert program.wait(DEADLINE) in (-signal.SIGKILL, -signal.SIGTERM)
    assert program.stdin is not None
    program.stdin.close()


def forbid(*args: Any) -> Any:
    raise PermissionError("it is another's")


def test_a_program_can_be_let_go_on_purpose(tmp_path: Path) -> None:
    code = """
@app.task(name="let_go")
def let_go():
    import shutil
    mark = "CELERY_SUBPROC_POOL_WORKER"
    argv = ["env", "-u", mark, "prlimit", "--rttime=unlimited", "sleep", "600"]
    return start(*argv, start_new_session=True)
"""
    proj = Project(tmp_path, code=CODE + code)
    with proj.worker(*POOL, "-c", "1") as worker:
        process = psutil.Process(ask(proj, "let_go"))
        wait_for(lambda: process.name() == "sleep", "the program")
        assert worker.stop() == 0
        assert process.is_running()
        process.kill()
        assert "are ended: " not in worker.log
