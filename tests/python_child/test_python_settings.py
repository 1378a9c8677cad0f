"""The settings of Python children, and how they start. Real workers, real interpreters."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery.exceptions import TaskRevokedError

import celery_subproc_pool
from tests.support.basics import DEADLINE, python_child, wait_for
from tests.support.projects import another_venv
from tests.support.worker import Project

POOL = ("-P", "celery_subproc_pool:Pool")
INCLUDE = "app.conf.include = ['ordinary_tasks']\n"

#: An interpreter of another version, with Celery and this package.
OTHER_PYTHON = "CSP_OTHER_PYTHON"

#: Code for the app that only a worker's children run when they load it.
IN_CHILD = "import os, sys, time\nif 'CELERY_SUBPROC_POOL_SLOT' in os.environ:\n"


def project_with(directory: Path, code: str = "", **python: Any) -> Project:
    return Project(directory, conf={"subproc_pool": {"python": python}}, code=INCLUDE + code)


def ask(project: Project, name: str, *args: Any, **options: Any) -> Any:
    return project.app.send_task(name, args, **options).get(timeout=DEADLINE, interval=0.02)


# -- executable


def test_children_in_another_virtual_environment(tmp_path: Path) -> None:
    python = another_venv(tmp_path / "venv", equipped=True)
    project = project_with(tmp_path, executable=python)
    with project.worker(*POOL, "-c", "2"):
        assert ask(project, "facts")["executable"] == python


def test_a_worker_with_children_on_another_version_of_python(tmp_path: Path) -> None:
    python = os.environ.get(OTHER_PYTHON)
    if not python:
        pytest.skip(f"{OTHER_PYTHON} does not name another interpreter with Celery and this pool")
    code = "print(sys.version_info[:2])"
    version = eval(subprocess.check_output([python, "-c", f"import sys; {code}"], timeout=60))
    assert version != sys.version_info[:2]
    project = project_with(tmp_path, executable=python)
    with project.worker(*POOL, "-c", "2"):
        facts = ask(project, "facts")
        assert facts["version"] == list(version)
        assert facts["executable"] == python
        assert ask(project, "retrying", 2) == 2
        with pytest.raises(ValueError, match="no such"):
            ask(project, "fail", "value")
        with pytest.raises(SoftTimeLimitExceeded):
            ask(project, "wait", "/dev/null", "/nowhere", soft_time_limit=0.3)
        inner = project.app.AsyncResult(ask(project, "calls", "add", 2, 3))
        assert inner.get(timeout=DEADLINE, interval=0.02) == 5


def test_an_interpreter_that_lacks_packages(tmp_path: Path) -> None:
    python = another_venv(tmp_path / "venv", equipped=False)
    log = failed_start(project_with(tmp_path, executable=python))
    assert f"subproc_pool.python.executable: {python!r} lacks celery, msgspec," in log
    assert "install celery and celery-subproc-pool for that interpreter too" in log


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("__version__ = '0.0.9'\n", "has 0.0.9"),
        ("", "has an unknown one"),
        # An early state of the same release, which lacks modules.
        ("__version__ = '{release}'\n", "has an unknown one"),
    ],
)
def test_an_interpreter_with_another_release_of_this_package(
    tmp_path: Path, text: str, found: str
) -> None:
    python = another_venv(tmp_path / "venv", equipped=True)
    [library] = (tmp_path / "venv").glob("lib/python*/site-packages")
    # This stands on the path before the installed one.
    package = library / "celery_subproc_pool"
    package.mkdir()
    release = importlib.metadata.version("celery-subproc-pool")
    (package / "__init__.py").write_text(text.format(release=release))
    project = project_with(tmp_path, executable=python)
    log = failed_start(project)
    expected = (
        f"subproc_pool.python.executable: expected the release {release} of celery-subproc-pool,"
        f" which the worker has, {python!r} {found}: install celery-subproc-pool=={release} for"
        " that interpreter"
    )
    assert expected in log
    assert "Traceback" not in log
    done = project.run("subproc", "check")
    assert done.returncode == 1
    assert expected in done.stdout


def test_the_release_is_written_in_one_place() -> None:
    assert importlib.metadata.version("celery-subproc-pool") == celery_subproc_pool.__version__


def test_an_executable_that_is_no_python(tmp_path: Path) -> None:
    log = failed_start(project_with(tmp_path, executable="false"))
    assert "subproc_pool.python.executable: 'false' is not a working Python" in log


def failed_start(project: Project, *words: str) -> str:
    """Return the log of a worker that does not start and leaves no process behind."""
    done = project.run("worker", *POOL, "-c", "2", *words)
    assert done.returncode != 0
    assert " ready." not in done.stdout
    return done.stdout


# -- wrapper


def test_a_wrapper_that_becomes_the_child(tmp_path: Path) -> None:
    project = project_with(tmp_path, wrapper="nice -n 7")
    with project.worker(*POOL, "-c", "1") as worker:
        facts = ask(project, "facts")
        assert facts["nice"] == os.nice(0) + 7
        assert [child.pid for child in worker.children()] == [facts["pid"]]


def test_a_wrapper_that_stays_beside_the_child(tmp_path: Path) -> None:
    """Limits and revokes reach the process that does the work. Both processes end."""
    project = project_with(tmp_path, wrapper=["sh", "-c", '"$@"; exit $?', "sh"])
    with project.worker(*POOL, "-c", "1") as worker:
        [shell] = worker.children()
        pid = ask(project, "facts")["pid"]
        assert pid != shell.pid
        assert [child["pid"] for child in worker.stats()["groups"]["python"]["children"]] == [pid]
        assert ask(project, "soft", soft_time_limit=0.3) == "cleaned up"
        assert ask(project, "facts")["pid"] == pid
        begun = tmp_path / "begun"
        result = project.app.send_task("wait", (str(begun), "/nowhere"))
        wait_for(begun.exists, "the task's begin")
        result.revoke(terminate=True)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=DEADLINE, interval=0.02)
        assert ask(project, "facts")["pid"] != pid
        wait_for(lambda: not psutil.pid_exists(pid), "the end of the process")


# -- env, cwd, size


def test_environment_directory_and_size(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    project = project_with(tmp_path, env={"TENANT": "acme"}, cwd=str(elsewhere), size=3)
    with project.worker(*POOL, "-c", "1", WORKERS_OWN="yes") as worker:
        facts = ask(project, "facts")
        assert facts["environ"]["TENANT"] == "acme"
        assert facts["environ"]["WORKERS_OWN"] == "yes"
        assert facts["cwd"] == str(elsewhere)
        assert facts["argv"][1:3] == ["-A", "proj"]
        assert len(worker.children()) == 3


@pytest.mark.parametrize("stderr", ["log", "inherit", "null"])
def test_stderr(tmp_path: Path, stderr: str) -> None:
    project = project_with(tmp_path, stderr=stderr)
    with project.worker(*POOL, "-c", "1") as worker:
        assert ask(project, "noisy") == ""
        # The child's own log goes there too: `null` is for projects that log elsewhere.
        lines = {
            "log": r"INFO/MainProcess\] \[python#0 pid \d+.*\] raw bytes$",
            "inherit": "^raw bytes$",
        }
        if stderr == "null":
            assert "raw bytes" not in worker.log
        else:
            pattern = re.compile(lines[stderr], re.MULTILINE)
            wait_for(lambda: pattern.search(worker.log), "the line")


# -- the start


def test_the_worker_is_ready_when_its_children_are_booted_in_parallel(
    tmp_path: Path,
) -> None:
    """Each child waits, while it loads the app, until all children do."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    code = (
        f"{IN_CHILD}"
        f"    open(os.path.join({str(meeting)!r}, str(os.getpid())), 'w').close()\n"
        f"    while len(os.listdir({str(meeting)!r})) < 4: time.sleep(0.005)\n"
    )
    log = tmp_path / "signals"
    project = project_with(tmp_path, code=code, start="spawn")
    with project.worker(*POOL, "-c", "4", SIGNALS_LOG=str(log)) as worker:
        ready = {int(line.split()[1]) for line in log.read_text().splitlines() if "init" in line}
        assert ready == {child.pid for child in worker.children()}


def test_an_app_that_the_children_cannot_load(tmp_path: Path) -> None:
    log = failed_start(project_with(tmp_path, code=f"{IN_CHILD}    import nothing_there\n"))
    assert "The pool can't start: no child of the group python came up: " in log
    assert "can't load the app: ModuleNotFoundError: No module named 'nothing_there'" in log
    # The traceback is there once, and not in the lines about each child.
    assert log.count("Traceback (most recent call last)") == 1
    assert "in <module>\n    import nothing_there" in log


@pytest.mark.parametrize(
    ("death", "reason"),
    [("os._exit(7)", "it exited: exitcode 7"), ("sys.exit('no way')", "it exited: exitcode 1")],
)
def test_children_that_end_while_they_load_the_app(tmp_path: Path, death: str, reason: str) -> None:
    code = f"{IN_CHILD}    print('last words', file=sys.stderr); {death}\n"
    log = failed_start(project_with(tmp_path, code=code))
    assert f"no child of the group python came up: {reason}" in log
    assert f"is replaced: {reason}" in log
    assert "its last stderr lines: last words" in log


def test_a_boot_that_takes_too_long_is_logged_with_the_last_lines(tmp_path: Path) -> None:
    code = f"{IN_CHILD}    print('waiting for the moon', file=sys.stderr)\n    time.sleep(1000)\n"
    log = failed_start(project_with(tmp_path, code=code, start_timeout=2))
    assert "no child of the group python came up: it was not ready within 2 s" in log
    assert "Child python#0 (pid " in log
    assert "its last stderr lines: waiting for the moon" in log


def test_a_worker_can_be_stopped_while_its_children_boot(tmp_path: Path) -> None:
    booting = tmp_path / "booting"
    code = f"{IN_CHILD}    open({str(booting)!r}, 'w').close(); time.sleep(1000)\n"
    project = project_with(tmp_path, code=code)
    process = subprocess.Popen(
        project.command("worker", *POOL, "-c", "2"),
        cwd=tmp_path,
        env=project.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(booting.exists, "the children")
    process.terminate()
    assert process.wait(DEADLINE) == 0


def test_a_child_that_fails_to_boot_is_tried_again_while_others_serve(tmp_path: Path) -> None:
    failed = tmp_path / "failed"
    code = (
        f"{IN_CHILD}    if os.environ['CELERY_SUBPROC_POOL_SLOT'] == '1'"
        f" and not os.path.exists({str(failed)!r}):\n"
        f"        open({str(failed)!r}, 'w').close(); os._exit(7)\n"
    )
    project = project_with(tmp_path, code=code, start="spawn")
    with project.worker(*POOL, "-c", "2") as worker:
        assert "Child python#1" in worker.log
        wait_for(lambda: len(worker.children()) == 2, "the second child")
        assert ask(project, "add", 1, 2) == 3


# -- signals and logs


def test_signals_are_sent_where_prefork_sends_them(tmp_path: Path) -> None:
    log = tmp_path / "signals"
    project = project_with(tmp_path)
    with project.worker(*POOL, "-c", "2", SIGNALS_LOG=str(log)) as worker:
        children = {child.pid for child in worker.children()}
        pid = ask(project, "facts")["pid"]
        assert worker.stop() == 0
        events = [line.split() for line in log.read_text().splitlines()]
    seen = Counter((event, int(number)) for event, number in events)
    expected = {("init", child): 1 for child in children}
    expected |= {("shutdown:0:True", child): 1 for child in children}
    expected |= {(event, pid): 1 for event in ("prerun", "postrun")}
    expected[("worker", worker.process.pid)] = 1
    assert seen == expected


def test_log_files_for_each_child(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    worker = project.worker(*POOL, "-c", "2", "-f", str(tmp_path / "log-%i"))
    worker.log_path = tmp_path / "log-0"
    with worker:
        ask(project, "logging_task", "this")
        logs = [(tmp_path / f"log-{number}").read_text() for number in range(3)]
        assert "heard this" in logs[1] + logs[2]
        assert "heard this" not in logs[0]


# -- external children beside them


def test_external_and_python_children_in_one_worker(tmp_path: Path) -> None:
    children = {"obeys": {"argv": python_child("obeys"), "tasks": ["do.*", "do.it"], "size": 1}}
    project = Project(
        tmp_path,
        conf={"subproc_pool": {"children": children, "python": {"size": 2}}},
        code=INCLUDE + "@app.task(name='do.body')\ndef body(): return 'the body ran'\n",
    )
    with project.worker(*POOL, "-c", "3") as worker:
        groups = worker.stats()["groups"]
        sizes = {name: group["size"] for name, group in groups.items()}
        assert (sizes["obeys"], sizes["python"]) == (1, 2)
        chain = project.app.signature("do.it", ([["reply", {"result": 4}]],))
        chain |= project.app.signature("add", (5,))
        assert chain.apply_async().get(timeout=DEADLINE, interval=0.02) == 9
        assert ask(project, "do.body") == []
        external = ask(project, "do.it", [["facts"]])["pid"]
        python = ask(project, "facts")["pid"]
        of = {name: [child["pid"] for child in group["children"]] for name, group in groups.items()}
        assert external in of["obeys"]
        assert python in of["python"]


def test_python_children_start_only_if_a_task_needs_them(tmp_path: Path) -> None:
    children = {"obeys": {"argv": python_child("obeys"), "tasks": ["do.it"], "size": 1}}
    project = Project(tmp_path, conf={"subproc_pool": {"children": children}})
    with project.worker(*POOL, "-c", "1") as worker:
        assert list(worker.stats()["groups"]) == ["obeys", "tracers"]
