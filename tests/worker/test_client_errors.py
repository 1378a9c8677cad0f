"""What a client sees of an error: the same, whether it has ever imported this package or not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from celery import Celery

from tests.support.basics import DEADLINE, python_child, wait_for
from tests.support.worker import Project, Worker

CODE = """
from celery import signals
from celery_subproc_pool import SubprocTask
app.conf.task_default_retry_delay = 0
app.conf.worker_send_task_events = True
def told(name, task_id, exc):
    with open({path!r}, "a") as file:
        file.write(f"{{task_id}} {{name}} {{exc.type}} | {{exc.message}} | {{exc.traceback}}\\n")
@signals.task_failure.connect
def failed(sender=None, task_id=None, exception=None, **_):
    if hasattr(exception, "message"):
        told("failed", task_id, exception)
@app.task(base=SubprocTask, name="do.capped", child="capped")
def capped(*args): ...
"""

#: Prints what a client has of results, by their ids.
CLIENT = """
import json, sys
from celery import Celery
if sys.argv[1] == "imported":
    import celery_subproc_pool.errors
app = Celery(backend=sys.argv[2])
for task_id in sys.argv[3:]:
    result = app.AsyncResult(task_id)
    error = result.result
    print(json.dumps([type(error).__name__, str(error), repr(error), result.traceback]))
assert ("celery_subproc_pool" in sys.modules) == (sys.argv[1] == "imported")
"""


class Place(NamedTuple):
    """A worker, and what its receiver of a signal was told."""

    project: Project
    worker: Worker
    told: Path

    def fail(self, *steps: list[Any], name: str = "do.it", **options: Any) -> str:
        result = self.project.app.send_task(name, [list(steps)], **options)
        wait_for(result.ready, "the end")
        assert result.state == "FAILURE"
        return str(result.id)

    def seen(self, how: str, *task_ids: str) -> list[list[Any]]:
        """Return the name, text, `repr` and traceback that a client has."""
        backend = self.project.app.conf.result_backend.replace("tests.support.", "")
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, how, backend, *task_ids],
            env=self.project.environment(),
            cwd=self.project.directory,
            stdout=subprocess.PIPE,
            timeout=DEADLINE,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def shared_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    path = tmp_path_factory.mktemp("errors")
    told = path / "told"
    children = {
        "obeys": {
            "argv": python_child("obeys"),
            "tasks": ["do.*", "do.it"],
        },
        "capped": {"argv": python_child("obeys"), "tasks": [], "throttle_max_retries": 1},
    }
    conf = {"subproc_pool": {"children": children}}
    project = Project(path, conf=conf, code=CODE.format(path=str(told)))
    with project.worker("-P", "subproc", "-c", "1") as worker:
        yield Place(project, worker, told)


ERROR = {"status": "error", "message": "bad"}

#: How jobs fail: what their child does, the options of the message, the name of the error, and its
#: text.
ENDS = {
    "message": ([["reply", ERROR]], {}, "ChildTaskError", "bad"),
    "type": (
        [["reply", {**ERROR, "type": "Perl::Err", "traceback": "at line 3"}]],
        {},
        "ChildTaskError",
        "Perl::Err: bad",
    ),
    "nothing": ([["reply", {"status": "error"}]], {}, "ChildTaskError", "worker reported error"),
    "retry": (
        [["reply", {"status": "retry", "message": "again", "countdown": 0}]],
        {"retries": 3},
        "ChildTaskError",
        "again",
    ),
    "throttled": (
        [["throttle", 9, 0]],
        {"name": "do.capped"},
        "MaxRetriesExceededError",
        r"do\.capped\[.*\] was throttled 2 times; throttle_max_retries is 1",
    ),
    "fault": ([["write", "no JSON"]], {}, "ProtocolFault", r"child obeys pid \d+ broke .*"),
    "lost": ([["exit", 3]], {}, "WorkerLostError", r"Worker exited prematurely: exitcode 3 .*"),
    "limit": ([["wait", "/nowhere"]], {"time_limit": 0.2}, "TimeLimitExceeded", r".*\(0\.2,\)"),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_error_reads_the_same_with_and_without_the_import(
    shared_worker: Place, end: str
) -> None:
    steps, options, name, text = ENDS[end]
    task_id = shared_worker.fail(*steps, **options)
    [imported] = shared_worker.seen("imported", task_id)
    [alone] = shared_worker.seen("isolated", task_id)
    assert imported == alone
    assert alone[0] == name
    assert re.fullmatch(text, alone[1])


def test_the_childs_traceback_stands_in_the_results(shared_worker: Place) -> None:
    task_id = shared_worker.fail(*ENDS["type"][0])
    [[_, _, shown, traceback]] = shared_worker.seen("isolated", task_id)
    assert shown == "ChildTaskError('Perl::Err: bad')"
    assert "\nat line 3\n" in traceback
    assert traceback.rstrip().endswith("ChildTaskError: Perl::Err: bad")
    # In the worker, everything is told apart.
    told = f"{task_id} failed Perl::Err | bad | at line 3"
    wait_for(lambda: told in shared_worker.told.read_text().splitlines(), "the signal")
    log = f"[{task_id}] raised unexpected: ChildTaskError('Perl::Err: bad')"
    wait_for(lambda: log in shared_worker.worker.log, "the log")
    assert "\nat line 3\n" in shared_worker.worker.log.partition(log)[2]


def test_events_have_the_same_words(shared_worker: Place) -> None:
    app: Celery = shared_worker.project.app
    seen: dict[str, Any] = {}
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, {"task-failed": seen.update})
        with receiver.consumer_context():
            task_id = shared_worker.fail(*ENDS["type"][0])
            while seen.get("uuid") != task_id:
                receiver.consume(timeout=DEADLINE, limit=1).__next__()
    assert seen["exception"] == "ChildTaskError('Perl::Err: bad')"
    assert "\nat line 3\n" in seen["traceback"]
