"""The features that children announce, as users of Celery see them: real workers, both brokers."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import celery
import psutil
import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery.exceptions import TaskRevokedError

from celery_subproc_pool.errors import PoisonousTaskError, ProtocolFault
from tests.support.basics import CHILDREN, DEADLINE, wait_for
from tests.support.worker import Worker
from tests.support.workplace import Workplace, get

pytestmark = pytest.mark.usefixtures("no_garbage_collection")

POOL = ("-P", "celery_subproc_pool:Pool")
ALL = ["progress", "log", "cancel", "multiplex"]
SAYS = {"name": "many 1.0", "tasks": ["many.it", "many.ignored"], "features": ALL}
#: These groups have only the tasks that they announce; the project has no stubs of those.
ANNOUNCES = {"tasks": [], "handshake": True, "size": 1}
GROUPS = {
    "many": {
        "argv": [sys.executable, "-I", "-S", str(CHILDREN / "many.py"), json.dumps(SAYS)],
        "max_in_flight": 200,
        "cancel_grace": 2.0,
        **ANNOUNCES,
    },
    "node": {"argv": ["node", str(CHILDREN / "many.js")], "max_in_flight": 200, **ANNOUNCES},
    "perl": {"argv": ["perl", str(CHILDREN / "follow.pl")], **ANNOUNCES},
}
CODE = """
@app.task(base=SubprocTask, name="many.again", child="many", bind=True, max_retries=1,
          autoretry_for=(Exception,), default_retry_delay=0.2)
def again(*args): ...
@app.task(base=SubprocTask, name="many.late", child="many", acks_late=True)
def late(*args): ...
@app.task(base=SubprocTask, name="many.requeued", child="many", acks_late=True,
          reject_on_worker_lost=True)
def requeued(*args): ...
"""


class Place(NamedTuple):
    """A worker whose children announce what they can."""

    work: Workplace
    worker: Worker

    def send(self, *job: Any, name: str = "many.it", **options: Any) -> Any:
        return self.work.app.send_task(name, job, **options)

    def hold(self, path: Path, **options: Any) -> Any:
        """Send a job that goes on until `path` is there, and has begun when this returns."""
        result = self.send("follow", 1, str(path), **options)
        wait_for(lambda: result.state == "PROGRESS", "its begin")
        return result

    def pid(self, group: str = "many") -> int:
        [pid] = {row["pid"] for row in self.rows() if row["group"] == group}
        return int(pid)

    def rows(self) -> list[dict[str, Any]]:
        node = self.work.project.node
        replies = self.work.app.control.inspect([node], timeout=20)._request("subproc")
        return list(replies[node])


def place_of(directory: Path, broker: str) -> Workplace:
    setting = {"children": GROUPS, "python": {"size": 1}}
    return Workplace(directory, broker, CODE, subproc_pool=setting)


@pytest.fixture(scope="module")
def shared_worker(broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    work = place_of(tmp_path_factory.mktemp("extensions"), broker)
    with work.project.worker(*POOL, "-c", "200") as worker:
        yield Place(work, worker)
    work.close()


@pytest.mark.parametrize("task", ["many.it", "node.sleep"])
def test_two_hundred_jobs_at_a_time_in_one_child(shared_worker: Place, task: str) -> None:
    """Each takes a tenth of a second: one after the other, all would take twenty seconds."""
    place = shared_worker
    job = ("sleep", 0.1) if task == "many.it" else (0.1,)

    def all_of_them() -> set[Any]:
        results = [place.send(*job, name=task) for _ in range(200)]
        return {get(result) for result in results}

    all_of_them()
    times = []
    for _ in range(3):
        begun = time.monotonic()
        pids = all_of_them()
        times.append(time.monotonic() - begun)
        assert len(pids) == 1
    print(f"200 jobs of 0.1 s: {min(times):.2f} s")
    # At least ten at a time, including the time to send the jobs and to get their results.
    assert min(times) < 200 * 0.1 / 10


@pytest.mark.parametrize("task", ["many.it", "node.follow", "perl.follow"])
def test_a_bar_that_fills(shared_worker: Place, task: str, tmp_path: Path) -> None:
    job = ("follow", 4, str(tmp_path)) if task == "many.it" else (4, str(tmp_path))
    result = shared_worker.send(*job, name=task)
    for number in range(1, 5):
        wait_for(partial(_is_at, result, number), f"step {number}")
        assert result.info == {"done": number, "of": 4}
        (tmp_path / f"{number}").touch()
    assert get(result) == 4
    assert result.state == "SUCCESS"


def _is_at(result: Any, number: int) -> bool:
    return result.state == "PROGRESS" and result.info["done"] == number


def test_progress_of_a_task_without_results_is_not_stored(
    shared_worker: Place, tmp_path: Path
) -> None:
    ignored = shared_worker.send("tell", 3, 0.0, ignore_result=True)
    get(shared_worker.send("tell", 3, 0.0))
    assert shared_worker.work.app.backend.get_state(ignored.id) == "PENDING"


def test_a_log_record_has_the_tasks_name_and_id(shared_worker: Place) -> None:
    result = shared_worker.send("log", "warning", "the tank is empty", True)
    get(result)
    said = rf"WARNING/\w+\] \[many#0 pid \d+ many\.it\[{result.id}\]\] the tank is empty"
    wait_for(lambda: re.search(said, shared_worker.worker.log), "the record")


def test_a_soft_limit_that_the_child_answers_with_an_error(shared_worker: Place) -> None:
    place = shared_worker
    pid = place.pid()
    with pytest.raises(SoftTimeLimitExceeded):
        get(place.send("wait_and_answer", "error", soft_time_limit=0.2))
    # The child may also succeed.
    assert get(place.send("wait_and_answer", "ok", soft_time_limit=0.2)) == "soft_time_limit"
    with pytest.raises(SoftTimeLimitExceeded):
        get(place.send(name="node.until_cancelled", soft_time_limit=0.2))
    assert place.pid() == pid


def test_a_hard_limit_spares_the_child_that_ends_the_job(
    shared_worker: Place, tmp_path: Path
) -> None:
    place = shared_worker
    pid = place.pid()
    other = place.hold(tmp_path)
    limited = place.send("wait_and_answer", "ok", time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        get(limited)
    (tmp_path / "1").touch()
    assert get(other) == 1
    assert place.pid() == pid


@pytest.mark.parametrize("task", ["many.it", "many.late"])
def test_a_revoked_job_is_revoked_whatever_the_child_answers(
    shared_worker: Place, tmp_path: Path, task: str
) -> None:
    place = shared_worker
    pid = place.pid()
    other = place.hold(tmp_path)
    result = place.send("wait_and_answer", "ok", name=task)
    wait_for(lambda: _in_flight(place) == 2, "both in the child")
    place.work.app.control.revoke(result.id, terminate=True, destination=[place.work.project.node])
    with pytest.raises(TaskRevokedError):
        get(result)
    wait_for(lambda: _in_flight(place) == 1, "its answer")
    assert place.work.app.backend.get_state(result.id) == "REVOKED"
    (tmp_path / "1").touch()
    assert get(other) == 1
    assert place.pid() == pid


def _in_flight(place: Place) -> int:
    return sum(row["in_flight"] for row in place.rows() if row["group"] == "many")


def test_a_job_that_goes_on_when_it_was_cancelled_costs_the_child(
    shared_worker: Place, tmp_path: Path
) -> None:
    place = shared_worker
    pid = place.pid()
    other = place.hold(tmp_path)
    result = place.send("hang", soft_time_limit=0.2)
    with pytest.raises(SoftTimeLimitExceeded):
        get(result)
    with pytest.raises(WorkerLostError, match=rf"it went on with many\.it\[{result.id}\] for 2 s"):
        get(other)
    assert re.search(
        rf"many#0 \(pid {pid}\) is replaced: it went on with .*soft_time_limit\)", place.worker.log
    )
    assert get(place.send("ok", "next")) == "next"
    assert place.pid() != pid


def test_a_child_that_dies_loses_each_of_its_jobs(shared_worker: Place, tmp_path: Path) -> None:
    place = shared_worker
    held = [place.hold(tmp_path) for _ in range(3)]
    psutil.Process(place.pid()).kill()
    for result in held:
        with pytest.raises(WorkerLostError, match=r"signal 9 \(SIGKILL\), out of memory\?"):
            get(result)
    assert get(place.send("ok", "next")) == "next"


def test_a_message_that_kills_is_found_out_among_others(
    shared_worker: Place, tmp_path: Path
) -> None:
    """The broker delivers all of them again. Then they run alone: the others survive."""
    place = shared_worker
    path = str(tmp_path / "go")
    innocent = [place.send("answer_when", path, name="many.requeued") for _ in range(3)]
    wait_for(lambda: _in_flight(place) == 3, "all of them in the child")
    poison = place.send("leave", 3, name="many.requeued")
    wait_for(lambda: "is replaced: it exited: exitcode 3" in place.worker.log, "the first crash")
    Path(path).touch()
    with pytest.raises(PoisonousTaskError, match="crashed 3 children"):
        get(poison)
    assert [get(result) for result in innocent] == ["waited"] * 3


def test_a_desync_names_what_is_wrong_and_fails_the_childs_jobs(
    shared_worker: Place, tmp_path: Path
) -> None:
    place, says = shared_worker, "the reply's id is 'nobody'"
    other = place.hold(tmp_path)
    elsewhere = place.send(0.0, name="node.sleep")
    for result in (place.send("answer_as", ["nobody"]), other):
        with pytest.raises(ProtocolFault, match=says):
            get(result)
    assert get(elsewhere)
    assert re.search(
        rf"many#0 \(pid \d+\) is replaced: {says}.*; its jobs were many\.it\[", place.worker.log
    )


def test_what_is_asked_of_the_worker_shows_its_jobs(shared_worker: Place, tmp_path: Path) -> None:
    place = shared_worker
    held = [place.hold(tmp_path) for _ in range(2)]
    [row] = [row for row in place.rows() if row["group"] == "many"]
    assert (row["in_flight"], row["name"], row["state"]) == (2, "many 1.0", "busy")
    assert row["task"]["id"] == held[0].id
    (tmp_path / "1").touch()
    for result in held:
        get(result)
    assert "The children of many announce the tasks many.ignored, many.it" in place.worker.log


def test_a_task_that_a_new_child_announces_is_known_at_once(broker: str, tmp_path: Path) -> None:
    """For example after an upgrade of the child's program."""
    says = tmp_path / "says"
    says.write_text(json.dumps({**SAYS, "tasks": ["old"]}))
    program = f'exec "$0" -I -S {CHILDREN / "many.py"} "$(cat {says})"'
    group = {**GROUPS["many"], "argv": ["sh", "-c", program, sys.executable]}
    work = Workplace(tmp_path, broker, subproc_pool={"children": {"many": group}})
    with work.project.worker(*POOL, "-c", "2") as worker:
        assert get(work.app.send_task("old", ["ok", 1])) == 1
        says.write_text(json.dumps({**SAYS, "tasks": ["old", "new"]}))
        # Celery 5.3's own `celery control` knows only Celery's commands.
        done = work.project.run("subproc", "restart", "many", "-d", work.project.node, "-t", "20")
        assert done.returncode == 0, done.stdout
        wait_for(lambda: "announce the tasks new" in worker.log, "the announcement")
        assert get(work.app.send_task("new", ["ok", 2])) == 2
    work.close()


#: Stores states before the last one only when the test allows it.
SLOW_BACKEND = """
import os, pathlib, time
from celery.backends.redis import RedisBackend
here = pathlib.Path(os.environ["GATE"])
class Slow(RedisBackend):
    def store_result(self, task_id, result, state, *args, **kwargs):
        if state in ("STARTED", "PROGRESS"):
            (here / "storing").touch()
            while not (here / "go").exists():
                time.sleep(0.01)
        return super().store_result(task_id, result, state, *args, **kwargs)
app.conf.result_backend = "proj:Slow+" + app.conf.result_backend
"""


@pytest.mark.parametrize("track_started", [True, False], ids=["started", "progress"])
def test_no_state_comes_after_the_last_one(
    broker: str, tmp_path: Path, track_started: bool
) -> None:
    """A job is revoked while an earlier state of it is being stored."""
    group = {**GROUPS["many"], "max_in_flight": 1}
    work = Workplace(
        tmp_path,
        broker,
        SLOW_BACKEND,
        subproc_pool={"children": {"many": group}},
        task_track_started=track_started,
    )
    with work.project.worker(*POOL, "-c", "1", GATE=str(tmp_path)) as worker:
        place = Place(work, worker)
        result = place.send("tell", 1, 600.0)
        wait_for((tmp_path / "storing").exists, "that a state is stored")
        work.app.control.revoke(result.id, terminate=True, destination=[work.project.node])
        # The worker answers in order: when it answers this, the revoke is done.
        work.app.control.ping([work.project.node], timeout=20)
        (tmp_path / "go").touch()
        with pytest.raises(TaskRevokedError):
            get(result)
        # It gets the slot of the first job, whose end Celery knows.
        assert get(place.send("ok", "next")) == "next"
        assert work.app.backend.get_state(result.id) == "REVOKED"
    work.close()


def test_a_cold_shutdown_tells_the_child(broker: str, tmp_path: Path) -> None:
    """The child ends at the end of its stdin; it is not killed while it cleans up."""
    work = place_of(tmp_path, broker)
    with work.project.worker(*POOL, "-c", "4") as worker:
        place = Place(work, worker)
        held = [place.send("wait_and_answer", "ok") for _ in range(2)]
        wait_for(lambda: _in_flight(place) == 2, "both in the child")
        [child] = [each for each in worker.children() if "many.py" in " ".join(each.cmdline())]
        # The jobs are not revoked: the child is told the reason of each cancel.
        worker.process.send_signal(signal.SIGQUIT)
        worker.process.wait(DEADLINE)
        wait_for(lambda: not child.is_running(), "the end of the child")
        assert "Traceback" not in worker.log
        if celery.VERSION >= (5, 5):
            # Before, Celery cancels no jobs. It kills the pool.
            assert worker.log.count("told to end: shutdown") == 2
        for result in held:
            # No final state is stored: the broker may deliver the job again.
            assert result.state == ("RETRY" if celery.VERSION >= (5, 5) else "PENDING")
    work.close()


def test_a_cold_shutdown_begins_nothing_that_waits(broker: str, tmp_path: Path) -> None:
    """Celery cancels the jobs that run before it drops those that wait for a slot."""
    runs = tmp_path / "runs"
    work = place_of(tmp_path, broker)
    with work.project.worker(*POOL, "-c", "2") as worker:
        place = Place(work, worker)
        held = [place.send("wait_and_answer", "error", name="many.late") for _ in range(2)]
        wait_for(lambda: _in_flight(place) == 2, "both in the child")
        waiting = [place.send("append", str(runs), name="many.late") for _ in range(4)]
        wait_for(lambda: all(job.id in worker.log for job in waiting), "that they were received")
        worker.process.send_signal(signal.SIGQUIT)
        worker.process.wait(DEADLINE)
        assert not runs.exists()
    with work.project.worker(*POOL, "-c", "6"):
        for job in waiting:
            get(job)
        assert runs.read_text() == "run\n" * 4
        for job in held:
            work.app.control.revoke(job.id, terminate=True, destination=[work.project.node])
            # If the worker stopped before it knows of the revoke, it would wait for the job.
            with pytest.raises(TaskRevokedError):
                get(job)
    work.close()
