"""A soft limit is raised in the task's own code and nowhere else. Real workers, real children.

With `CSP_TEST_POOL=prefork` the tests that are not this pool's own show what users are used to.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery
from celery.app.trace import build_tracer

from celery_subproc_pool.python_child.compat import body_lines, is_at_body, is_trace
from celery_subproc_pool.python_child.soft_limits import SoftLimits
from tests.support.basics import DEADLINE, wait_for
from tests.support.worker import Project

pytestmark = pytest.mark.usefixtures("no_garbage_collection")

POOL = ("-P", os.environ.get("CSP_TEST_POOL", "celery_subproc_pool:Pool"), "-c", "1")
ours = pytest.mark.skipif("prefork" in POOL, reason="a property of this pool's")
LIMIT = 0.3

CODE = """
import functools, os, pathlib, sys
from celery import Task
from celery.exceptions import SoftTimeLimitExceeded
app.conf.include = ["ordinary_tasks"]

@app.task(name="quick", track_started=True)
def quick():
    return "done"

@app.task(name="long", track_started=True)
def long():
    from ordinary_tasks import wait_for_file
    try:
        wait_for_file("/nowhere")
    except SoftTimeLimitExceeded:
        return "cleaned up"

@app.task(name="imports")
def imports():
    try:
        import half_made
    except SoftTimeLimitExceeded:
        return "half_made" in sys.modules

def wrapped(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)
    return inner

class Called(Task):
    def __call__(self, *args):
        return super().__call__(*args)

@app.task(name="wrapped", base=Called, autoretry_for=(KeyError,))
@wrapped
def wrapped_task():
    return long.run()

class Before(Task):
    def before_start(self, *args):
        long.run()

@app.task(name="before", base=Before)
def before():
    return "begun"

class Fails(Task):
    def on_failure(self, *args):
        import half_made
        pathlib.Path(os.environ["BEGUN"] + ".end").touch()

@app.task(name="fails", base=Fails)
def fails():
    raise ValueError("its own")

@app.task(name="loaded")
def loaded():
    names = {"folder_broker", "slow_backend", "celery.app.amqp", "celery.canvas"}
    return sorted(names & {*sys.modules})

@app.task(name="sockets")
def sockets():
    import psutil
    return len(psutil.Process().net_connections())
"""

#: A backend that imports a module when it stores a state.
BACKEND = """
import os
from folder_broker import Backend as Folder

class Backend(Folder):
    def _store_result(self, task_id, result, state, *args, **kwargs):
        if state == os.environ.get("IMPORTS_AT"):
            import half_made
            assert half_made.made
        return super()._store_result(task_id, result, state, *args, **kwargs)
"""

#: A module whose import waits for the test.
MODULE = """
import os, pathlib, time
pathlib.Path(os.environ["BEGUN"]).touch()
while not pathlib.Path(os.environ["GATE"]).exists():
    time.sleep(0.005)
made = True
"""


class Slow(Project):
    """A project with a module whose import takes as long as the test wants."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, code=CODE)
        path = directory / "proj.py"
        text = path.read_text().replace("folder_broker:Backend+", "slow_backend:Backend+")
        path.write_text(text)
        (directory / "slow_backend.py").write_text(BACKEND)
        (directory / "half_made.py").write_text(MODULE)
        self.begun, self.gate = directory / "begun", directory / "gate"

    def environment(self, **extra: str) -> dict[str, str]:
        return super().environment(BEGUN=str(self.begun), GATE=str(self.gate), **extra)

    def send(self, name: str, **options: Any) -> Any:
        return self.app.send_task(name, soft_time_limit=LIMIT, **options)

    def hold(self, worker: Any, name: str) -> Any:
        """Send a job, let its limit pass during the import, then let the import go on."""
        result = self.send(name)
        wait_for(self.begun.exists, "the import")
        said = f"Soft time limit ({LIMIT}s) exceeded for {name}[{result.id}]"
        wait_for(lambda: said in worker.log, "the limit")
        self.gate.touch()
        return get(result)


def get(result: Any) -> Any:
    return result.get(timeout=DEADLINE, interval=0.02)


@ours
@pytest.mark.parametrize(
    ("state", "name", "value"),
    [("SUCCESS", "quick", "done"), ("STARTED", "long", "cleaned up")],
    ids=["after the task has ended: no effect", "before the task begins: raised in the task"],
)
def test_a_limit_while_a_state_is_stored(tmp_path: Path, state: str, name: str, value: str) -> None:
    project = Slow(tmp_path)
    with project.worker(*POOL, IMPORTS_AT=state) as worker:
        assert project.hold(worker, name) == value
        # The next job is not affected.
        assert get(project.send("quick")) == "done"
        assert "Traceback" not in worker.log


@ours
def test_a_limit_while_a_failure_is_stored_changes_nothing(tmp_path: Path) -> None:
    project = Slow(tmp_path)
    with project.worker(*POOL) as worker:
        with pytest.raises(ValueError, match="its own"):
            project.hold(worker, "fails")
        wait_for(Path(f"{project.begun}.end").exists, "the end of the hook")
        assert get(project.send("quick")) == "done"
        assert "SoftTimeLimitExceeded" not in worker.log


def test_a_limit_in_an_import_by_the_task_is_raised_there(tmp_path: Path) -> None:
    project = Slow(tmp_path)
    with project.worker(*POOL):
        assert get(project.send("imports")) is False


@pytest.mark.parametrize("name", ["long", "wrapped"])
def test_a_limit_reaches_a_body_that_is_wrapped(tmp_path: Path, name: str) -> None:
    project = Slow(tmp_path)
    with project.worker(*POOL):
        for _ in range(2):
            assert get(project.send(name)) == "cleaned up"
        assert get(project.send("before")) == "begun"
        with pytest.raises(SoftTimeLimitExceeded):
            get(project.app.send_task("wait", ("/dev/null", "/nowhere"), soft_time_limit=LIMIT))


@ours
def test_modules_that_every_job_needs_are_imported_before_the_first(tmp_path: Path) -> None:
    project = Slow(tmp_path)
    with project.worker(*POOL):
        needed = ["celery.app.amqp", "celery.canvas", "folder_broker", "slow_backend"]
        assert get(project.send("loaded")) == needed


@pytest.mark.redis
@ours
def test_a_child_without_jobs_has_no_connection(tmp_path: Path) -> None:
    from tests.support.workplace import BACKEND as REDIS
    from tests.support.workplace import BROKERS

    conf = {"task_default_queue": f"csp-test-{os.getpid()}"}
    project = Project(tmp_path, BROKERS["redis"], REDIS, conf, CODE)
    with project.worker(*POOL):
        assert project.app.send_task("sockets").get(timeout=DEADLINE) == 0
    project.app.close()


# -- where Celery's tracer is


def test_the_tracers_body_is_found_in_this_version_of_celery() -> None:
    app = Celery("proj", set_as_current=False)
    lines: list[int] = []

    @app.task(name="body")
    def body() -> None:
        tracer = sys._getframe().f_back
        assert tracer is not None
        assert is_trace(tracer.f_code)
        assert is_at_body(tracer)
        lines.append(tracer.f_lineno)

    tracer = build_tracer(body.name, body, eager=True, propagate=True, app=app)
    tracer("id", (), {})
    assert lines
    assert not is_trace(build_tracer.__code__)
    calls = body_lines(tracer.__code__)
    assert {*lines} <= calls
    # Only the lines of the hook before the body and of the body. Those are close together.
    assert max(calls) - min(calls) < 6


def run_to(where: FrameType | None, limits: SoftLimits) -> bool:
    """Return whether a limit that interrupts the frame `where` is raised at once."""
    try:
        limits.reached(where)
    except SoftTimeLimitExceeded:
        return True
    return False


def before_the_tracer(limits: SoftLimits) -> bool:
    return run_to(sys._getframe(), limits)


@pytest.fixture
def signals_seen() -> Iterator[list[int]]:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: seen.append(signum))
    yield seen
    signal.signal(signal.SIGUSR1, before)


def test_a_job_without_a_tracer_is_interrupted_at_once(signals_seen: list[int]) -> None:
    limits = SoftLimits(before_the_tracer)
    limits.begin()
    assert run_to(sys._getframe(), limits)
    assert run_to(None, limits)


def test_code_before_the_tracer_is_not_interrupted_and_the_limit_comes_again(
    signals_seen: list[int],
) -> None:
    limits = SoftLimits(before_the_tracer)
    limits.begin()
    assert not before_the_tracer(limits)
    wait_for(lambda: signals_seen, "the next try")
    assert run_to(sys._getframe(), limits)


def test_a_deferred_limit_never_hits_the_next_job(signals_seen: list[int]) -> None:
    limits = SoftLimits(before_the_tracer)
    limits.begin()
    assert not before_the_tracer(limits)
    wait_for(lambda: signals_seen, "the next try")
    # The deferred signal comes after the job has ended.
    limits.begin()
    assert not run_to(sys._getframe(), limits)
    # A limit of the next job itself.
    assert run_to(sys._getframe(), limits)
