"""The `celery` command, as users type it: the pool's names, bad settings, stopping, dying."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import psutil
import pytest

from tests.support.basics import (
    DEADLINE,
    guardians,
    pool_processes,
    python_child,
    sh_child,
    wait_for,
)
from tests.support.worker import Project

CHILDREN = {"children": {"obeys": {"argv": python_child("obeys"), "tasks": ["do.it"]}}}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path, conf={"subproc_pool": CHILDREN})


def do(project: Project, *steps: list[Any], **options: Any) -> Any:
    args = [list(steps)] if steps else []
    return project.app.send_task("do.it", args, **options)


def get(result: Any) -> Any:
    return result.get(timeout=DEADLINE, interval=0.02)


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        (["-P", "celery_subproc_pool:Pool"], {}),
        (["-P", "subproc"], {}),
        (["-P", "custom"], {"CELERY_CUSTOM_WORKER_POOL": "celery_subproc_pool:Pool"}),
    ],
    ids=["path", "short", "custom"],
)
def test_the_pools_names(project: Project, words: list[str], environ: dict[str, str]) -> None:
    with project.worker("-c", "2", *words, **environ) as worker:
        assert get(do(project)) == []
        assert len(worker.children()) == 2
        assert "concurrency: 2 (celery_subproc_pool)" in worker.log
        assert worker.stop() == 0


def test_the_guardian_says_whose_it_is(project: Project) -> None:
    with project.worker("-P", "subproc", "-c", "1"):
        titles = [guardian.cmdline()[-1] for guardian in guardians()]
        assert f"[celeryd: {project.node}:guardian]" in titles


def test_the_setting_worker_pool(tmp_path: Path) -> None:
    conf = {"subproc_pool": CHILDREN, "worker_pool": "celery_subproc_pool:Pool"}
    project = Project(tmp_path, conf=conf)
    with project.worker("-c", "1") as worker:
        assert get(do(project)) == []
        assert worker.stats()["implementation"] == "celery_subproc_pool:Pool"


def test_the_settings_as_json_in_the_environment(tmp_path: Path) -> None:
    project = Project(tmp_path, conf={"subproc_pool": {"argv": ["no-such-program"]}})
    setting = json.dumps({"argv": python_child("obeys"), "tasks": ["do.it"]})
    with project.worker("-P", "subproc", "-c", "1", CELERY_SUBPROC_POOL=setting):
        assert get(do(project)) == []


def test_django_style_settings(tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text(f"CELERY_SUBPROC_POOL = {CHILDREN!r}\n")
    code = "app.config_from_object('settings', namespace='CELERY')\n"
    done = Project(tmp_path, code=code).run("subproc", "check")
    assert done.returncode == 0
    assert "obeys: " in done.stdout


def test_prefork_goes_on_working_beside_it(tmp_path: Path) -> None:
    code = "@app.task(name='add')\ndef add(x, y): return x + y\n"
    project = Project(tmp_path, code=code)
    with project.worker("-c", "1"):
        assert get(project.app.send_task("add", (1, 2))) == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"children": {"rails": {"argv": ["sh"], "timeout": "long"}}},
            "Error: subproc_pool.children.rails.timeout: expected `float | null`, got `str`,"
            " in 'long'",
        ),
        (
            {"argv": ["no-such-program"]},
            "Error: subproc_pool.argv: the program 'no-such-program' was not found on the PATH",
        ),
        (
            {"argv": ["sh"], "cwd": "/no/such/place"},
            "Error: subproc_pool.cwd: expected a directory, got '/no/such/place'",
        ),
        ({"argv": []}, "Error: subproc_pool.argv: expected a program and its arguments, got ()"),
    ],
)
def test_a_bad_setting_stops_the_worker_with_one_line(
    tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    project = Project(tmp_path, conf={"subproc_pool": setting})
    done = project.run("worker", "-P", "celery_subproc_pool:Pool", "-c", "1")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if "subproc_pool." in line]
    assert len(lines) == 1
    assert lines[0].startswith(message)
    assert "Traceback" not in done.stdout


def test_a_task_that_names_an_unknown_child_stops_the_worker(tmp_path: Path) -> None:
    code = """
from celery_subproc_pool import SubprocTask
@app.task(base=SubprocTask, name="billing.charge", child="rails")
def charge(): ...
"""
    project = Project(tmp_path, conf={"subproc_pool": CHILDREN}, code=code)
    done = project.run("worker", "-P", "subproc")
    assert done.returncode == 1
    assert "the task billing.charge names the child 'rails', which is not configured" in done.stdout


def test_a_program_that_cannot_be_executed_stops_the_worker(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere/at/all\n")
    broken.chmod(0o755)
    project = Project(tmp_path, conf={"subproc_pool": {"argv": [str(broken)]}})
    done = project.run("worker", "-P", "subproc", "-c", "1")
    assert done.returncode == 1
    assert f"The pool can't start: can't start '{broken}'" in done.stdout
    assert "Traceback" not in done.stdout


def test_subproc_check_shows_the_groups(project: Project) -> None:
    done = project.run("subproc", "check")
    assert done.returncode == 0
    assert "obeys: " in done.stdout
    assert "tasks: do.it" in done.stdout


def test_subproc_check_shows_the_tasks_of_python_children(tmp_path: Path) -> None:
    code = "@app.task(name='a.b')\ndef b(): ...\n"
    done = Project(tmp_path, conf={"subproc_pool": CHILDREN}, code=code).run("subproc", "check")
    assert done.returncode == 0, done.stdout
    python = done.stdout[done.stdout.index("python: ") :]
    assert "-m celery_subproc_pool.python_child.main\n" in python
    assert "size: as many as -c says; tasks: a.b" in python


def test_subproc_check_refuses_bad_settings(tmp_path: Path) -> None:
    project = Project(tmp_path, conf={"subproc_pool": {"argv": 3}})
    done = project.run("subproc", "check")
    assert done.returncode == 1
    assert "subproc_pool.argv" in done.stdout


def test_a_warm_stop_lets_the_job_end_and_stores_its_result(
    project: Project, tmp_path: Path
) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with project.worker("-P", "subproc", "-c", "1") as worker:
        result = do(project, ["touch", str(begun)], ["wait", str(gate)], ["reply", {"result": 7}])
        wait_for(begun.exists, "the job's begin")
        worker.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Warm shutdown" in worker.log, "the shutdown")
        gate.touch()
        assert worker.process.wait(DEADLINE) == 0
    assert get(result) == 7


def test_a_cold_stop_leaves_nobody(project: Project, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with project.worker("-P", "subproc", "-c", "2") as worker:
        do(project, ["touch", str(begun)], ["wait", "/nowhere"])
        wait_for(begun.exists, "the job's begin")
        children = worker.children()
        worker.process.send_signal(signal.SIGQUIT)
        worker.process.wait(DEADLINE)
        wait_for(lambda: not any(child.is_running() for child in children), "the children's death")


def test_a_killed_worker_leaves_no_child_and_no_grandchild(tmp_path: Path) -> None:
    # The grandchild has a session of its own, and ignores what can be ignored.
    script = (
        "trap '' TERM HUP INT; setsid sh -c 'trap \"\" TERM HUP INT; while :; do sleep 1; done' &"
        " while :; do sleep 1; done"
    )
    project = Project(tmp_path, conf={"subproc_pool": {"argv": sh_child(script)}})
    # The embedded worker of other tests may be there, with its children and its guardian.
    others = {process.pid for process in (*pool_processes(), *guardians())}

    def ours() -> list[psutil.Process]:
        return [process for process in pool_processes() if process.pid not in others]

    with project.worker("-P", "subproc", "-c", "2") as worker:
        wait_for(lambda: len(ours()) >= 4, "children and grandchildren")
        worker.process.kill()
        worker.process.wait()
        wait_for(lambda: not ours(), "everybody's death")
    wait_for(
        lambda: not [process for process in guardians() if process.pid not in others],
        "the guardian's end",
    )


def test_children_are_warm_before_the_worker_is_ready(project: Project) -> None:
    with project.worker("-P", "subproc", "-c", "3") as worker:
        pids = {child.pid for child in worker.children()}
        assert len(pids) == 3
        results = [do(project, ["facts"]) for _ in range(12)]
        served = {get(result)["pid"] for result in results}
        assert served <= pids


def test_pool_grow_and_shrink(project: Project) -> None:
    with project.worker("-P", "subproc", "-c", "1") as worker:
        project.control("pool_grow", "2")
        wait_for(lambda: len(worker.children()) == 3, "three children")
        assert worker.stats()["max-concurrency"] == 3
        project.control("pool_shrink", "1")
        wait_for(lambda: len(worker.children()) == 2, "two children")


def test_autoscale_without_an_event_loop(project: Project) -> None:
    with project.worker("-P", "subproc", "--autoscale", "2,0", AUTOSCALE_KEEPALIVE="1") as worker:
        # The consumer waits for a slot, of which there is none until another thread makes one.
        assert [get(each) for each in [do(project), do(project)]] == [[], []]
        wait_for(lambda: worker.children() == [], "nobody to be left")


def test_inspect_stats_shows_the_groups(project: Project) -> None:
    with project.worker("-P", "subproc", "-c", "1") as worker:
        get(do(project))
        [child] = worker.children()
        # How many there are depends on the machine.
        tracers = {tracer.pid for tracer in worker.tracers()}
        stats = worker.stats()
    first, *others = stats["processes"]
    assert (first, {*others}) == (child.pid, tracers)
    percentiles = {"p50": ANY, "p95": ANY, "p99": ANY}
    assert stats["groups"].pop("tracers")["jobs"] == 1
    assert stats["groups"] == {
        "obeys": {
            "size": 1,
            "in_service": 1,
            "cooling": 0,
            "states": {"idle": 1},
            "jobs": 1,
            "throttled": 0,
            "waiting": 0,
            "wait": percentiles,
            "run": percentiles,
            "unkillable": 0,
            "replaced": {},
            "children": [{"pid": child.pid, "state": "idle", "jobs": 1}],
            "template": None,
        }
    }
