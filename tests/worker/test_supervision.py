"""What a worker does when children fail, as its operator sees it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import pytest
from billiard.exceptions import WorkerLostError

from tests.support.basics import DEADLINE, python_child, wait_for
from tests.support.projects import POOL, ask, obeying
from tests.support.worker import Project

SECRET = "s3cret%2Fword"


# -- start


def test_a_group_that_never_starts_fails_the_workers_start(tmp_path: Path) -> None:
    """Without a handshake too: a child that exits at once can't do a job."""
    script = "echo 'no such gem: sidekiq' >&2; exit 4"
    children = {"rails": {"argv": ["sh", "-c", script], "tasks": ["do.it"], "size": 2}}
    project = Project(tmp_path, conf={"subproc_pool": {"children": children}})
    done = project.run("worker", *POOL, "-c", "2")
    assert done.returncode != 0
    assert " ready." not in done.stdout
    [line] = [line for line in done.stdout.splitlines() if "The pool can't start" in line]
    assert re.search(r"no child of the group rails came up: .*it exited: exitcode 4", line)
    assert "Its last stderr lines: no such gem: sidekiq" in done.stdout.splitlines()


def test_later_a_group_degrades_and_heals_without_a_restart(tmp_path: Path) -> None:
    """Its jobs wait meanwhile, and those of the other group go on."""
    broken = tmp_path / "broken"
    script = 'if [ -e "$BROKEN" ]; then echo "no licence" >&2; exit 1; fi; exec "$@"'
    frail = {
        "argv": ["sh", "-c", script, "sh", *python_child("obeys")],
        "env": {"BROKEN": str(broken)},
        "tasks": ["frail.*"],
        "size": 2,
    }
    sound = {"argv": python_child("obeys"), "tasks": ["do.it"], "size": 1}
    project = Project(
        tmp_path,
        conf={"subproc_pool": {"children": {"frail": frail, "sound": sound}}},
        code="@app.task(name='frail.it')\ndef it(): ...\n",
    )
    with project.worker(*POOL, "-c", "4") as worker:
        broken.touch()
        for child in worker.children():
            child.kill()
        pattern = r"Child frail#\d \(pid \d+\) is replaced: .*no licence"
        wait_for(lambda: len(re.findall(pattern, worker.log)) >= 6, "failures of both slots")
        assert re.search(r"is replaced: .*; 0 of its 2 children are in service", worker.log)
        group = worker.stats()["groups"]["frail"]
        assert (group["size"], group["replaced"]["exited"] >= 6) == (2, True)
        # Not for long: a child without a handshake gets it, and three may fail with it.
        waiting = project.app.send_task("frail.it", [1])
        assert ask(project, "do.it", 2) == [2]
        assert not waiting.ready()
        broken.unlink()
        assert waiting.get(timeout=DEADLINE, interval=0.02) == [1]
        wait_for(lambda: "The group frail is whole again: 2 of its 2 " in worker.log, "its word")


# -- lost


def test_a_sigkill_from_elsewhere_is_asked_about(tmp_path: Path) -> None:
    project = obeying(tmp_path, size=1)
    with project.worker(*POOL, "-c", "1"):
        with pytest.raises(WorkerLostError) as lost:
            ask(project, "do.it", [["stderr", "eating"], ["signal", 9]])
        assert re.fullmatch(
            r"Worker exited prematurely: signal 9 \(SIGKILL\), out of memory\? \(child obeys pid"
            r" \d+.*\)\. Last stderr lines: eating",
            str(lost.value),
        )
        with pytest.raises(WorkerLostError, match=r"signal 15 \(SIGTERM\) \(child"):
            ask(project, "do.it", [["signal", 15]])


# -- stop


def test_a_warm_stop_leaves_no_process_that_left_its_childs_session(tmp_path: Path) -> None:
    project = obeying(tmp_path, size=1)
    with project.worker(*POOL, "-c", "1") as worker:
        pid = ask(project, "do.it", [["escape"]])
        assert psutil.pid_exists(pid)
        assert worker.stop() == 0
        wait_for(lambda: not psutil.pid_exists(pid), "the end of it")


# -- secrets


def environment_of(
    directory: Path, environ: dict[str, str], **settings: Any
) -> tuple[dict[str, str], str]:
    """Return what an external child gets, and the worker's log."""
    child = {"argv": python_child("obeys"), "tasks": ["do.it"], "size": 1, **settings}
    conf = {
        "subproc_pool": {"children": {"obeys": child}},
        # Of no use to a folder, but for its password.
        "broker_write_url": f"filesystem://worker:{SECRET}@",
    }
    project = Project(directory, conf=conf)
    with project.worker(*POOL, "-c", "1", **environ) as worker:
        return ask(project, "do.it", [["facts"]])["env"], worker.log


def test_external_children_do_not_learn_how_to_enter_the_broker(tmp_path: Path) -> None:
    environ = {
        # The one that the project has anyway.
        "CELERY_RESULT_BACKEND": f"folder_broker:Backend+file://{tmp_path / 'results'}",
        "QUEUE_URL": f"amqp://worker:{SECRET}@elsewhere/host",
        "QUEUE_PASSWORD": "s3cret/word",
        "TENANT": "acme",
        "DATABASE_URL": "postgres://rails:another@elsewhere/db",
    }
    env, log = environment_of(tmp_path, environ)
    assert env["TENANT"] == "acme"
    assert env["DATABASE_URL"] == environ["DATABASE_URL"]
    assert set(env) & set(environ) == {"TENANT", "DATABASE_URL"}
    assert (
        "External children do not get these environment variables, which hold what the worker"
        " needs to reach its broker: CELERY_RESULT_BACKEND, QUEUE_PASSWORD, QUEUE_URL. One that"
        " they need can be given in subproc_pool.children.<name>.env" in log
    )
    assert "s3cret" not in log


def test_what_is_given_is_given(tmp_path: Path) -> None:
    given = f"amqp://worker:{SECRET}@elsewhere/host"
    env, _ = environment_of(tmp_path, {"QUEUE_URL": given}, env={"QUEUE_URL": given})
    assert env["QUEUE_URL"] == given
