"""An ordinary project's tasks on Python children: what works as on prefork, and what only here.

With `CSP_TEST_POOL=prefork`, the tests that are not about this pool itself run on prefork. That
shows what they must expect.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import psutil
import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError

from tests.support.basics import DEADLINE, wait_for
from tests.support.running import POOL, Running, get, ours
from tests.support.worker import Project

CODE = "app.conf.include = ['ordinary_tasks']\n"


@pytest.fixture(scope="module")
def shared_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A worker for all tests that don't change it."""
    directory = tmp_path_factory.mktemp("ordinary")
    conf = {"accept_content": ["json", "pickle", "yaml", "application/x-python-serialize"]}
    project = Project(directory, conf=conf, code=CODE)
    with project.worker("-P", POOL, "-c", "2") as worker:
        yield Running(project, worker)


@pytest.fixture
def it(shared_worker: Running) -> Running:
    return shared_worker


# -- results


def test_results_and_arguments(it: Running) -> None:
    assert it.get("add", 1, 2) == 3
    assert it.send("echo", 1, [2], None, "ü\n\u2028").get(timeout=DEADLINE) == [
        [1, [2], None, "ü\n\u2028"],
        {},
    ]
    assert get(it.project.app.send_task("echo", (), {"a": {"b": 1.5}})) == [[], {"a": {"b": 1.5}}]


@pytest.mark.parametrize("compression", [None, "zlib", "bzip2"])
@pytest.mark.parametrize("serializer", ["json", "yaml", "pickle"])
def test_serializers_and_compression(it: Running, serializer: str, compression: str | None) -> None:
    if serializer == "yaml":
        pytest.importorskip("yaml")
    options = {"serializer": serializer, "compression": compression}
    assert it.get("echo", {"a": [1, "ü"]}, **options) == [[{"a": [1, "ü"]}], {}]


def test_a_pickled_argument_arrives_unchanged(it: Running) -> None:
    day = datetime.date(2026, 11, 23)
    assert it.get("add", day, datetime.timedelta(1), serializer="pickle") == datetime.date(
        2026, 11, 24
    )


def test_five_megabytes_both_ways(it: Running) -> None:
    result = it.send("size", "x" * 5_000_000, 5_000_000)
    length, text = get(result)
    assert length == len(text) == 5_000_000


@pytest.mark.parametrize(
    "value",
    ["acme", {"deep": [1, None, 1.5]}, 2**70, float("inf"), datetime.datetime(2026, 11, 23)],
    ids=["text", "nested", "a large number", "infinity", "a datetime"],
)
def test_custom_headers(it: Running, value: Any) -> None:
    kind, text = it.get("header", "tenant", headers={"tenant": value})
    assert (kind, text) == (type(value).__name__, str(value))


def test_delivery_info_and_priority(it: Running) -> None:
    facts = it.get("facts", priority=5)
    assert facts["priority"] == 5
    assert facts["delivery"]["routing_key"] == "celery"
    assert facts["hostname"] == it.project.node
    assert facts["app"] == "proj"
    assert facts["current_app"]


# -- failures


def test_an_exception_keeps_its_type_arguments_and_traceback(it: Running) -> None:
    result = it.send("fail", "value")
    with pytest.raises(ValueError, match="no such") as caught:
        get(result)
    assert caught.value.args == ("no such", 5)
    assert "ordinary_tasks.py" in result.traceback
    assert "raise errors[kind]" in result.traceback
    line = f"Task fail[{result.id}] raised unexpected: ValueError('no such', 5)"
    # Celery stores the result before.
    wait_for(lambda: line in it.worker.log, "the log")


def test_an_exception_of_the_project(it: Running) -> None:
    with pytest.raises(Exception, match="try tea") as caught:
        get(it.send("fail", "project"))
    assert type(caught.value).__name__ == "ProjectError"
    assert caught.value.args == (7, "try tea")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("unpicklable", "object at"), ("unicode", r"\\ud800|\ud800"), ("long", "xxx")],
)
def test_an_exception_that_is_hard_to_send(it: Running, kind: str, message: str) -> None:
    result = it.send("fail", kind)
    with pytest.raises(Exception, match=message):
        get(result)
    assert it.get("add", 1, 2) == 3


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="older ones can't store it, on prefork too")
def test_a_base_exception_of_a_task(it: Running) -> None:
    result = it.send("fail", "base")
    with pytest.raises(Exception, match="stop"):
        get(result)
    assert result.state == "FAILURE"


def test_an_expected_exception_is_no_error_in_the_log(it: Running) -> None:
    result = it.send("throws")
    with pytest.raises(Exception, match="expected"):
        get(result)
    assert re.search(rf"INFO/\S+\] Task throws\[{result.id}\] raised expected", it.worker.log)


def test_retries(it: Running) -> None:
    assert it.get("retrying", 2) == 2
    with pytest.raises(Exception, match="again") as caught:
        get(it.send("retrying", 5))
    assert type(caught.value).__name__ == "ProjectError"
    assert it.get("autoretrying") == 2


def test_ignore_stores_nothing(it: Running) -> None:
    result = it.send("ignoring")
    wait_for(lambda: f"Task ignoring[{result.id}] ignored" in it.worker.log, "the task's end")
    assert result.state == "PENDING"


def test_reject_with_requeue_is_delivered_again(it: Running, tmp_path: Path) -> None:
    assert it.get("rejecting", str(tmp_path / "seen"), True) == "delivered again"


def test_reject_without_requeue(it: Running, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    result = it.send("rejecting", str(seen), False)
    wait_for(seen.exists, "the task's begin")
    wait_for(lambda: f"Task rejecting[{result.id}]" in it.worker.log, "the task's end")
    assert it.get("add", 1, 2) == 3


@pytest.mark.parametrize(
    "how", ["os._exit", "segfault", "SIGKILL", "SIGTERM", "exit", "exit text", "exit none"]
)
def test_a_lost_child_is_a_worker_lost_error_and_is_replaced(it: Running, how: str) -> None:
    name = "fail" if how.startswith("exit") else "die"
    with pytest.raises(WorkerLostError, match="Worker exited prematurely"):
        get(it.send(name, how))
    assert it.get("add", 1, 2) == 3


def test_a_late_acked_job_whose_child_was_lost_is_delivered_again(
    it: Running, tmp_path: Path
) -> None:
    assert it.get("die_once", str(tmp_path / "died")) == "delivered again"


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="Celery 5.7 brought it")
def test_a_lost_job_is_retried_as_often_as_celery_says(it: Running) -> None:
    # More often than `max_crashes` would let it be delivered again. Prefork waits ten seconds for
    # each result that might still come.
    deaths = 4 if "subproc" in POOL else 1
    assert it.get("retried_when_lost", deaths) == deaths


def test_a_failed_job_is_rejected_if_failures_are_not_acked(it: Running, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(Exception, match="7"):
        it.get("fail_unacked", str(runs))
    assert it.get("add", 1, 2) == 3
    assert runs.read_text() == "run\n"


# -- limits and revokes


def test_the_soft_limit_is_raised_in_the_task(it: Running) -> None:
    assert it.get("soft", soft_time_limit=0.3) == "cleaned up"
    with pytest.raises(SoftTimeLimitExceeded):
        get(it.send("wait", "/dev/null", "/nowhere", soft_time_limit=0.3))
    assert it.get("add", 1, 2) == 3


def test_the_hard_limit(it: Running) -> None:
    result = it.send("soft", True, soft_time_limit=0.2, time_limit=1)
    with pytest.raises(TimeLimitExceeded):
        get(result)
    assert f"Hard time limit (1s) exceeded for soft[{result.id}]" in it.worker.log
    assert it.get("add", 1, 2) == 3


def test_revoke_with_terminate_lets_finally_blocks_run(it: Running, tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    result = it.send("wait", str(begun), "/nowhere", str(ended))
    wait_for(begun.exists, "the task's begin")
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        get(result)
    wait_for(ended.exists, "the finally block")
    assert it.get("add", 1, 2) == 3


# -- states, canvas


def test_update_state(it: Running, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    result = it.send("progress", str(gate))
    wait_for(lambda: result.state == "PROGRESS", "the state PROGRESS")
    assert result.info == {"done": 50}
    gate.touch()
    assert get(result) == "done"


def test_started_has_the_pid_of_the_child(it: Running, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    result = it.send("started", str(gate))
    wait_for(lambda: result.state == "STARTED" and result.info, "the state STARTED")
    pid = result.info["pid"]
    gate.touch()
    assert get(result) == pid


def test_canvas(it: Running) -> None:
    app = it.project.app
    add = app.signature("add")
    total = app.signature("total")
    assert get(chain(add.clone((1, 2)), add.clone((4,)))()) == 7
    assert get(group(add.clone((n, n)) for n in range(4))()) == [0, 2, 4, 6]
    assert get(chord([add.clone((n, n)) for n in range(4)])(total)) == 12


def test_links_and_errbacks(it: Running, tmp_path: Path) -> None:
    app = it.project.app
    linked, failed = tmp_path / "linked", tmp_path / "failed"

    def touch(path: Path) -> Any:
        return app.signature("wait", args=(str(path), "/dev/null"), immutable=True)

    it.send("add", 1, 2, link=touch(linked))
    it.send("fail", "value", link_error=touch(failed))
    wait_for(linked.exists, "the callback")
    wait_for(failed.exists, "the errback")


def test_a_task_may_not_wait_for_another_task(it: Running) -> None:
    with pytest.raises(RuntimeError, match=r"Never call result.get\(\) within a task"):
        get(it.send("joining"))


def test_a_task_sends_another(it: Running) -> None:
    inner = it.project.app.AsyncResult(it.get("calls", "add", 2, 3))
    assert get(inner) == 5


# -- the wire is safe


@pytest.mark.parametrize("again", range(2))
def test_a_tasks_prints_stay_out_of_the_wire(it: Running, again: int) -> None:
    before = it.worker.log
    assert it.get("noisy") == ""
    new = it.worker.log[len(before) :]
    for words in ("a print", "a write", "raw bytes", "from a program", "to stderr"):
        assert words in new
    assert "broke the protocol" not in new


def test_a_task_that_reads_stdin_reads_nothing(it: Running) -> None:
    with pytest.raises(EOFError):
        get(it.send("asking"))


@ours
def test_a_task_that_closes_the_standard_descriptors_does_no_harm(it: Running) -> None:
    for _ in range(4):
        assert it.get("closing") is None
    assert it.get("add", 1, 2) == 3


@pytest.mark.parametrize("how", ["no flush", "raising", "none"])
def test_a_task_that_breaks_its_stdout_is_done_once(it: Running, how: str) -> None:
    pid = it.get("breaking_stdout", how)
    assert {it.get("breaking_stdout", how) for _ in range(3)} <= {
        c.pid for c in it.worker.children()
    }
    assert pid in {child.pid for child in it.worker.children()}


@ours
@pytest.mark.parametrize("acks_late", [False, True])
def test_a_task_that_runs_out_of_memory_fails_and_the_worker_goes_on(
    tmp_path: Path, acks_late: bool
) -> None:
    """On prefork, the worker ends."""
    conf = {"task_acks_late": acks_late, "worker_prefetch_multiplier": 1}
    project = Project(tmp_path, conf=conf, code=CODE)
    with project.worker("-P", POOL, "-c", "1") as worker:
        running = Running(project, worker)
        with pytest.raises(Exception, match="none left"):
            running.get("fail", "memory")
        running.send("odd_retry")
        assert running.get("add", 1, 2) == 3


@ours
def test_a_forked_copy_of_the_child_sends_no_reply(it: Running) -> None:
    for _ in range(4):
        pid = it.get("forking")
        assert pid in {child.pid for child in it.worker.children()}
    assert it.get("add", 1, 2) == 3


# -- what works only here


@ours
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_in_a_task(it: Running, method: str) -> None:
    assert it.get("processes", method) == [2, 4, 6, 8]


@ours
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_revoke_lets_multiprocessing_end_its_processes(
    it: Running, tmp_path: Path, method: str
) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    result = it.send("half_idle", method, str(begun), str(ended))
    wait_for(begun.exists, "the processes")
    # Only the child may get the signal: an idle process would die holding the queue's lock.
    result.revoke(terminate=True)
    wait_for(ended.exists, "the end of the task")


@ours
def test_a_copy_that_a_task_forks_ends_on_sigterm(it: Running) -> None:
    # `multiprocessing` waits for such a copy.
    assert it.get("end_copy", False) == -signal.SIGTERM
    assert it.get("end_copy", True) == 7


@ours
def test_a_child_inherits_no_descriptor_of_the_worker(it: Running) -> None:
    worker = psutil.Process(it.worker.process.pid)
    folder = f"/proc/{worker.pid}/fd"
    theirs = {os.readlink(f"{folder}/{number}") for number in os.listdir(folder)}
    inherited = {str(it.worker.log_path), "/dev/null"}
    for _ in range(4):
        found = set(it.get("descriptors").values())
        assert not {entry for entry in found if entry.startswith("socket:")}
        pipes = {entry for entry in found & theirs if entry.startswith("pipe:")}
        assert len(pipes) == 2, "its stdin and stdout, and no sibling's"
        # Some libraries, such as libffi on newer systems, hold their own file open in each process.
        libraries = {entry for entry in found if ".so" in Path(entry).suffixes}
        assert found & theirs <= inherited | pipes | libraries


@ours
def test_a_child_has_its_own_session(it: Running) -> None:
    facts = it.get("facts")
    assert facts["session"] == facts["pid"]
    assert facts["ppid"] in {template.pid for template in it.worker.templates()}
