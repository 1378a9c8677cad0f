"""Recycling of children: real workers, real processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.basics import DEADLINE, python_child, wait_for
from tests.support.projects import POOL, ask, obeying
from tests.support.worker import Project, Worker

CODE = """
import os
@app.task(name="eat")
def eat(megabytes):
    global kept
    kept = b"x" * (megabytes * 2**20)
    return os.getpid()
"""


def pythons(directory: Path, **python: Any) -> Project:
    """A project of Python children."""
    return Project(
        directory,
        conf={"subproc_pool": {"python": python}},
        code="app.conf.include = ['ordinary_tasks']\n" + CODE,
    )


def pid_of(project: Project, **reply: Any) -> Any:
    """The pid of the external child that does the next job; its reply has `reply` in it too."""
    [pid] = ask(project, "do.it", [["own", "pid", reply]])
    return pid


def replaced(worker: Worker, group: str) -> Any:
    return worker.stats()["groups"][group]["replaced"]


@pytest.mark.parametrize("jobs", [1, 3])
def test_max_tasks_per_child(tmp_path: Path, jobs: int) -> None:
    project = pythons(tmp_path, recycle_jitter=0.0)
    with project.worker(*POOL, "-c", "1", "--max-tasks-per-child", str(jobs)) as worker:
        pids = [ask(project, "eat", 0) for _ in range(3 * jobs)]
        # None does one job too many; and no job is lost while they change.
        assert len(set(pids)) == 3
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [jobs] * 3
        wait_for(lambda: worker.log.count(" is recycled: ") == 3, "the third one's end")
        assert re.search(
            rf"INFO/MainProcess\] Child python#0 \(pid {pids[0]}\) is recycled: it has had {jobs}"
            rf" jobs \(max_jobs\); its successor \(pid {pids[-1] if jobs < 0 else pids[jobs]}\) has"
            r" taken its place",
            worker.log,
        )
        assert replaced(worker, "python") == {"recycled": 3}
        wait_for(lambda: len(worker.children()) == 1, "the end of the old ones")


def test_max_memory_per_child(tmp_path: Path) -> None:
    project = pythons(tmp_path)
    with project.worker(*POOL, "-c", "1", "--max-memory-per-child", str(200 * 1024)) as worker:
        first = ask(project, "eat", 0)
        assert ask(project, "eat", 1) == first
        assert ask(project, "eat", 300) == first
        wait_for(lambda: "of memory (max_memory); its successor" in worker.log, "the next one")
        assert ask(project, "eat", 1) != first
        assert replaced(worker, "python") == {"recycled": 1}


def test_what_a_child_started_counts_too(tmp_path: Path) -> None:
    project = obeying(tmp_path, max_memory=100 * 2**20, size=1)
    with project.worker(*POOL, "-c", "1") as worker:
        first = pid_of(project)
        ask(project, "do.it", [["start", 200], ["reply", {}]])
        wait_for(lambda: pid_of(project) != first, "the next one")
        wait_for(lambda: not psutil.pid_exists(first), "the end of the old one")
        [child] = worker.children()
        assert not child.children()


def test_a_groups_own_limit_goes_before_the_workers(tmp_path: Path) -> None:
    project = obeying(tmp_path, max_jobs=4, recycle_jitter=0.0)
    with project.worker(*POOL, "-c", "1", "--max-tasks-per-child", "1"):
        pids = [pid_of(project) for _ in range(5)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [4, 1]


def test_an_external_child_retires_when_it_asks_to(tmp_path: Path) -> None:
    project = obeying(tmp_path, size=1)
    with project.worker(*POOL, "-c", "1") as worker:
        first = pid_of(project)
        assert pid_of(project, retire=True) == first
        wait_for(lambda: pid_of(project) != first, "the next one")
        assert "is recycled: it asked for it (retire)" in worker.log


def test_max_age_while_jobs_flow(tmp_path: Path) -> None:
    project = obeying(tmp_path, size=2, max_age=1.0)
    with project.worker(*POOL, "-c", "2") as worker:
        pids = set()

        def several() -> bool:
            pids.add(pid_of(project))
            return len(pids) >= 6

        wait_for(several, "three generations")
        assert re.search(r"is recycled: it is \d+ s old \(max_age\)", worker.log)
        assert worker.log.count("is replaced") == 0
        wait_for(lambda: len(worker.children()) <= 3, "the end of the old ones")


def test_a_child_with_no_time_left_ends_its_job(tmp_path: Path) -> None:
    project = obeying(tmp_path, size=1, max_age=0.1)
    go = tmp_path / "go"
    with project.worker(*POOL, "-c", "1") as worker:
        result = project.app.send_task("do.it", [[["wait", str(go)], ["own", "pid", {}]]])
        wait_for(lambda: " has taken its place" in worker.log, "a successor")
        go.touch()
        [pid] = result.get(timeout=DEADLINE, interval=0.02)
        wait_for(lambda: not psutil.pid_exists(pid), "its end")


def test_a_successor_that_cannot_start_leaves_the_old_child_at_work(tmp_path: Path) -> None:
    """An upgrade breaks the program: the old child goes on, and is replaced after a repair."""
    program = tmp_path / "child"
    well = "#!/bin/sh\nexec " + " ".join(python_child("obeys")) + "\n"
    program.write_text(well)
    program.chmod(0o755)
    project = Project(
        tmp_path,
        conf={
            "subproc_pool": {
                "children": {"obeys": {"argv": [str(program)], "tasks": ["do.it"], "size": 1}}
            }
        },
    )
    with project.worker(*POOL, "-c", "1") as worker:
        first = pid_of(project)
        program.write_text("#!/bin/sh\necho 'no such library' >&2\nexit 1\n")
        assert pid_of(project, retire=True) == first
        wait_for(lambda: worker.log.count("its last stderr lines: no such library") > 1, "failures")
        assert pid_of(project) == first
        program.write_text(well)
        wait_for(lambda: pid_of(project) != first, "the next one")
        wait_for(lambda: "The group obeys is whole again: 1 of its 1 " in worker.log, "its word")
