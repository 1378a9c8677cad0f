"""Tracers: what is called around the tasks of external children, and in which process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError

from celery_subproc_pool import ChildTaskError
from tests.support.basics import wait_for
from tests.support.projects import POOL
from tests.support.traced import WATCHED, TracedProject, get
from tests.support.worker import Project, Worker

OK = ["reply", {"result": "done"}]
ERROR = ["reply", {"status": "error", "message": "boom"}]


def pids(processes: list[Any]) -> set[str]:
    return {str(process.pid) for process in processes}


# -- where, and in which context

SIGNALS = """
@signals.worker_process_init.connect(weak=False)
def on_init(**_):
    note("init", os.getpid())
@signals.task_success.connect(weak=False)
def on_success(sender, **_):
    note("success", sender.request.id, os.getpid())
"""


def test_signals_of_tasks_come_where_worker_process_init_came(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, WATCHED + SIGNALS)
    with project.worker(*POOL, "-c", "2") as worker:
        result = project.send("do.it", OK)
        assert get(result) == "done"
        [tracer] = pids(worker.tracers())
        wait_for(lambda: project.noted("postrun"), "the last signal")
        failed = project.send("do.it", ERROR)
        with pytest.raises(ChildTaskError):
            get(failed)
        wait_for(lambda: len(project.noted("postrun")) == 2, "the last signal")
    assert project.noted("init") == [[tracer]]
    for name in ("prerun", "success", "postrun"):
        assert project.noted(name, result.id) == [[tracer]]
    assert project.noted("success", failed.id) == []
    assert project.noted("failed", failed.id) == [[tracer]]


CONTEXTS = """
import contextvars
from celery import Task
mine = contextvars.ContextVar("mine", default="nobody's")
everyones = contextvars.ContextVar("everyones", default="not set")
@signals.worker_process_init.connect(weak=False)
def on_init(**_):
    everyones.set("set")
def look(where, task, own):
    found = current_task.request.id, task.request.id, mine.get(), everyones.get()
    if found != (own, own, own, "set"):
        note("wrong", where, own, *found)
@signals.task_prerun.connect(weak=False)
def on_prerun(task, kwargs, **_):
    if mine.get() != "nobody's":
        note("wrong", "prerun", kwargs["own"], mine.get())
    mine.set(kwargs["own"])
    look("prerun", task, kwargs["own"])
@signals.task_postrun.connect(weak=False)
def on_postrun(task, kwargs, **_):
    look("postrun", task, kwargs["own"])
    note("over", kwargs["own"])
class Looking(SubprocTask):
    abstract = True
    def before_start(self, task_id, args, kwargs):
        look("before_start", self, kwargs["own"])
    def __call__(self, *args, **kwargs):
        look("before the exchange", self, kwargs["own"])
        try:
            return super().__call__(*args, **kwargs)
        finally:
            look("after the exchange", self, kwargs["own"])
    def on_success(self, retval, task_id, args, kwargs):
        look("on_success", self, kwargs["own"])
    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        look("after_return", self, kwargs["own"])
@app.task(base=Looking, name="many.it", child="many", shared=False)
def many(*args, own): ...
"""

#: How many jobs are in a tracer at a time.
AT_ONCE = 60


def test_each_of_many_traces_sees_its_own_request_and_context(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, CONTEXTS)
    gate = tmp_path / "gate"
    with project.worker(*POOL, "-c", str(AT_ONCE)) as worker:
        ids = [f"own-{number}" for number in range(AT_ONCE)]
        results = [
            project.app.send_task(
                "many.it", ["answer_when", str(gate)], {"own": task_id}, task_id=task_id
            )
            for task_id in ids
        ]
        wait_for(lambda: project.rows("many")[0]["in_flight"] == AT_ONCE, "all jobs in the child")
        assert project.rows("tracers")[0]["in_flight"] == AT_ONCE
        gate.touch()
        assert [get(result) for result in results] == ["waited"] * AT_ONCE
        wait_for(lambda: len(project.noted("over")) == AT_ONCE, "all ends")
        assert len(worker.tracers()) == 1
    assert project.noted("wrong") == []
    assert sorted(project.noted("over")) == sorted([task_id] for task_id in ids)


# -- what a child is told

HEADERS = """
from celery_subproc_pool.signals import child_request
@child_request.connect(weak=False)
def on_request(sender, task_id, headers, **_):
    request = current_task.request
    assert (sender.name, request.id) == (current_task.name, task_id)
    headers[f"attempt-{request.retries + headers.get('subproc_throttles', 0)}"] = task_id
"""


@pytest.mark.parametrize("how", ["throttled", "retry"])
def test_a_header_that_a_receiver_adds_is_for_the_child_alone(tmp_path: Path, how: str) -> None:
    project = TracedProject(tmp_path, HEADERS, task_default_retry_delay=0)
    seen = tmp_path / "seen"
    end = ["throttle", 1, 0] if how == "throttled" else ["reply", {"status": how, "countdown": 0}]
    with project.worker(*POOL, "-c", "1"):
        result = project.send("do.it", ["note", str(seen)], end, headers={"tenant": "acme"})
        wait_for(lambda: seen.exists() and seen.read_text().count("\n") >= 2, "the second attempt")
        wait_for(result.ready, "the end")
    first, second = (json.loads(line)["headers"] for line in seen.read_text().splitlines()[:2])
    assert first == {"tenant": "acme", "attempt-0": result.id}
    assert {"tenant": "acme", "attempt-1": result.id}.items() <= second.items()
    assert "attempt-0" not in second


# -- hooks

EXITS = """
class Exits(SubprocTask):
    abstract = True
    def before_start(self, task_id, args, kwargs):
        if kwargs.get("exits") == "before":
            raise SystemExit(3)
    def on_success(self, retval, task_id, args, kwargs):
        if kwargs.get("exits") == "after":
            raise SystemExit(3)
@app.task(base=Exits, name="do.exits")
def exits(*args, **kwargs): ...
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_exit_in_a_hook_costs_its_own_job_alone(tmp_path: Path, when: str) -> None:
    project = TracedProject(tmp_path, WATCHED + EXITS, size=2)
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with project.worker(*POOL, "-c", "2") as worker:
        [tracer] = pids(worker.tracers())
        other = project.send("do.it", ["touch", str(begun)], ["wait", str(gate)], OK)
        wait_for(begun.exists, "the other job")
        result = project.app.send_task("do.exits", [[OK]], {"exits": when})
        lost = "WorkerLostError('Worker exited prematurely: SystemExit(3)')"
        wait_for(lambda: lost in worker.log, "its end")
        if when == "before":
            with pytest.raises(WorkerLostError):
                get(result)
        # It has given its place free.
        assert get(project.app.send_task("do.exits", [[OK]])) == "done"
        gate.touch()
        assert get(other) == "done"
        assert pids(worker.tracers()) == {tracer}
        assert worker.log.count(lost) == 1
    assert project.noted("prerun", other.id) == project.noted("postrun", other.id) == [[tracer]]


IN_A_FUNCTION = """
class Told(SubprocTask):
    abstract = True
    def on_success(self, retval, task_id, args, kwargs):
        note("told", self.name, os.getpid())
def make():
    def own(*args): ...
    options = {"max_retries": 1, "default_retry_delay": 0, "serializer": "json"}
    app.task(base=Told, name="do.own", autoretry_for=(Exception,), **options)(own)
if "CELERY_SUBPROC_POOL_SLOT" not in os.environ:
    make()
"""


def test_a_task_that_only_the_worker_declares_keeps_its_options(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, IN_A_FUNCTION)
    runs = tmp_path / "runs"
    with project.worker(*POOL, "-c", "1") as worker:
        assert get(project.send("do.own", OK)) == "done"
        assert wait_for(lambda: project.noted("told"), "its hook") == [
            ["do.own", *pids(worker.tracers())]
        ]
        with pytest.raises(ChildTaskError, match="boom"):
            get(project.send("do.own", ["append", str(runs)], ERROR))
    assert runs.read_text() == "run\n" * 2, "max_retries is 1"
    assert "its options and hooks do not count" not in worker.log


HIDDEN = """
def make():
    class Hidden(SubprocTask):
        abstract = True
        def on_success(self, retval, task_id, args, kwargs):
            note("told", self.name, os.getpid())
    def hidden(*args): ...
    app.task(base=Hidden, name="do.hidden")(hidden)
if "CELERY_SUBPROC_POOL_SLOT" not in os.environ:
    make()
"""


def test_the_log_says_if_a_task_loses_its_options(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, HIDDEN)
    with project.worker(*POOL, "-c", "1") as worker:
        assert get(project.send("do.hidden", OK)) == "done"
    assert project.noted("told") == []
    said = r"The tracers lack the task do\.hidden of the module proj, and its options and hooks do"
    assert re.search(said, worker.log)


# -- when there are any


def groups(worker: Worker) -> set[str]:
    return set(worker.stats()["groups"])


def test_without_external_children_there_is_no_tracer(tmp_path: Path) -> None:
    project = Project(tmp_path, code="@app.task(name='add')\ndef add(x, y): return x + y\n")
    with project.worker(*POOL, "-c", "1") as worker:
        assert get(project.app.send_task("add", [1, 2])) == 3
        assert groups(worker) == {"python"}
        assert worker.tracers() == []


def test_tracers_start_with_the_worker_if_results_are_stored(tmp_path: Path) -> None:
    with TracedProject(tmp_path).worker(*POOL, "-c", "1") as worker:
        assert len(worker.tracers()) == 1
        assert "tracers: " in worker.log
        assert "tasks: hooks, signals and results of the external ones" in worker.log


def test_without_need_the_first_job_that_fails_starts_a_tracer(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, task_ignore_result=True)
    with project.worker(*POOL, "-c", "1") as worker:
        for _ in range(3):
            last = project.send("do.it", OK, ignore_result=True)
            wait_for(lambda: f"[{last.id}] succeeded" in worker.log, "its end")  # noqa: B023
        assert worker.tracers() == []
        assert worker.stats()["groups"]["tracers"]["states"] == {}
        failed = project.send("do.it", ERROR, ignore_result=True)
        wait_for(lambda: project.noted("failed", failed.id), "its end")
        [tracer] = pids(worker.tracers())
        assert project.noted("failed", failed.id) == [[tracer]]
        end = f"[{failed.id}] raised unexpected: ChildTaskError('boom')"
        wait_for(lambda: end in worker.log, "the tracer's log")


CELERYS_OWN = "app.conf.include = ['celery.contrib.testing.tasks']\n"


def test_celerys_own_tasks_run_in_a_tracer(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, WATCHED + CELERYS_OWN)
    with project.worker(*POOL, "-c", "1") as worker:
        assert groups(worker) == {"obeys", "many", "tracers"}
        ping = project.app.send_task("celery.ping")
        assert get(ping) == "pong"
        assert get(project.app.send_task("celery.accumulate", [1, 2])) == [1, 2]
        cleanup = project.app.send_task("celery.backend_cleanup")
        wait_for(lambda: f"backend_cleanup[{cleanup.id}] succeeded" in worker.log, "the cleanup")
        [tracer] = pids(worker.tracers())
    assert project.noted("prerun", ping.id) == [[tracer]]
