"""Jobs that are ended from outside, by a limit or a revoke, and what their tasks may still do.

With CSP_TEST_POOL=prefork in the environment, the tests that are not about the pool itself run on
prefork: that is how it was seen what they must expect.
"""

from __future__ import annotations

import os
import re
import signal
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery.exceptions import TaskRevokedError

from tests.support.basics import DEADLINE, require, state_of, wait_for
from tests.support.running import Running, get, ours
from tests.support.worker import Project
from tests.support.workplace import Workplace

pytestmark = pytest.mark.usefixtures("no_garbage_collection")

POOL = os.environ.get("CSP_TEST_POOL", "celery_subproc_pool:Pool")

CODE = """
app.conf.include = ["ordinary_tasks"]


@app.task(name="locked")
def locked(name, pid_path):
    import os, redis
    from ordinary_tasks import wait
    with open(pid_path, "w") as file:
        file.write(str(os.getpid()))
    with redis.Redis(db=9).lock(name, timeout=600):
        wait(pid_path + ".begun", "/nowhere", pid_path + ".ended")


@app.task(name="deaf")
def deaf(pid_path):
    import os, signal
    from ordinary_tasks import wait
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(pid_path, "w") as file:
        file.write(str(os.getpid()))
    wait(pid_path + ".begun", "/nowhere", pid_path + ".ended")


@app.task(name="tidy")
def tidy(begun, ended):
    from celery.exceptions import SoftTimeLimitExceeded
    from ordinary_tasks import wait
    try:
        wait(begun, "/nowhere", ended)
    except SoftTimeLimitExceeded:
        return "what there is"


@app.task(name="stubborn")
def stubborn(begun):
    from celery.exceptions import SoftTimeLimitExceeded
    from ordinary_tasks import wait
    try:
        wait(begun, "/nowhere")
    except SoftTimeLimitExceeded:
        wait(begun, "/nowhere")


@app.task(name="slow_end")
def slow_end(begun, gate, ended):
    from ordinary_tasks import wait
    try:
        wait(begun, "/nowhere")
    finally:
        wait(begun, gate, ended)
"""


@pytest.fixture(scope="module")
def limits_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A worker whose children have time to clean up, on a busy machine too."""
    directory = tmp_path_factory.mktemp("limits")
    conf: dict[str, Any] = {"subproc_pool": {"python": {"kill_grace": 5, "stop_timeout": 3}}}
    project = Project(directory, conf=conf, code=CODE)
    with project.worker("-P", POOL, "-c", "1") as worker:
        yield Running(project, worker)


@pytest.mark.redis
def test_at_the_hard_limit_finally_blocks_run(limits_worker: Running, tmp_path: Path) -> None:
    require("redis")
    redis = pytest.importorskip("redis")
    name, pid_path = f"csp-test-{uuid.uuid4().hex}", tmp_path / "pid"
    result = limits_worker.send("locked", name, str(pid_path), time_limit=2)
    wait_for(lambda: redis.Redis(db=9).exists(name), "the lock to be held")
    with pytest.raises(TimeLimitExceeded):
        get(result)
    wait_for((tmp_path / "pid.ended").exists, "the finally block")
    wait_for(lambda: not redis.Redis(db=9).exists(name), "the lock to be released")
    wait_for(lambda: not psutil.pid_exists(int(pid_path.read_text())), "the end of the child")
    line = rf"Hard time limit \(2(\.0)?s\) exceeded for locked\[{result.id}\]"
    assert re.search(line, limits_worker.worker.log)
    assert limits_worker.get("add", 1, 2) == 3


def test_a_task_that_ignores_sigterm_is_killed_all_the_same(
    limits_worker: Running, tmp_path: Path
) -> None:
    """Its slot has a new child meanwhile."""
    pid_path = tmp_path / "pid"
    result = limits_worker.send("deaf", str(pid_path), time_limit=2)
    with pytest.raises(TimeLimitExceeded):
        get(result)
    assert limits_worker.get("add", 1, 2) == 3
    wait_for(lambda: not psutil.pid_exists(int(pid_path.read_text())), "the end of the child")
    assert not (tmp_path / "pid.ended").exists()


# -- a gentle revoke


def begin(it: Running, directory: Path, name: str, *args: Any, **options: Any) -> Any:
    """Send a task that makes a file when it begins, and wait until it has."""
    begun = directory / f"begun {uuid.uuid4().hex}"
    result = it.send(name, str(begun), *args, **options)
    wait_for(begun.exists, f"the begin of {name}")
    return result


def test_a_revoke_by_the_signal_of_soft_limits_spares_the_process(
    limits_worker: Running, tmp_path: Path
) -> None:
    """The job is REVOKED all the same; on prefork, it is what the task makes of its exception."""
    pid = limits_worker.get("facts")["pid"]
    ended = tmp_path / "ended"
    result = begin(limits_worker, tmp_path, "wait", "/nowhere", str(ended))
    result.revoke(terminate=True, signal="SIGUSR1")
    wait_for(ended.exists, "the finally block")
    assert limits_worker.get("facts")["pid"] == pid
    if "subproc" in POOL:
        wait_for(lambda: state_of(result) == "REVOKED", "the state REVOKED")
        assert f"pid {pid}" not in limits_worker.worker.log


def test_what_a_task_returns_after_such_a_revoke_is_kept(
    limits_worker: Running, tmp_path: Path
) -> None:
    """Celery stores nothing over a SUCCESS."""
    pid = limits_worker.get("facts")["pid"]
    result = begin(limits_worker, tmp_path, "tidy", str(tmp_path / "ended"))
    result.revoke(terminate=True, signal="SIGUSR1")
    assert limits_worker.get("facts")["pid"] == pid
    assert (result.state, result.result) == ("SUCCESS", "what there is")


@ours
def test_a_task_that_goes_on_after_a_revoke_costs_its_child_its_life(
    limits_worker: Running, tmp_path: Path
) -> None:
    pid = limits_worker.get("facts")["pid"]
    result = begin(limits_worker, tmp_path, "stubborn")
    result.revoke(terminate=True, signal="SIGUSR1")
    with pytest.raises(TaskRevokedError):
        get(result)
    assert limits_worker.get("facts")["pid"] != pid
    assert re.search(
        rf"Child python#0 \(pid {pid}\) is replaced: it went on with"
        rf" stubborn\[{result.id}\] for 3 s after it was sent SIGUSR1 \(revoked\)",
        limits_worker.worker.log,
    )
    assert result.state == "REVOKED"


@ours
def test_a_stop_waits_for_a_task_that_was_revoked_gently(tmp_path: Path) -> None:
    project = Project(tmp_path, code=CODE)
    with project.worker("-P", POOL, "-c", "1") as worker:
        it = Running(project, worker)
        gate, ended = tmp_path / "gate", tmp_path / "ended"
        result = begin(it, tmp_path, "slow_end", str(gate), str(ended))
        result.revoke(terminate=True, signal="SIGUSR1")
        wait_for(lambda: state_of(result) == "REVOKED", "the state REVOKED")
        worker.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Warm shutdown" in worker.log, "the begin of the stop")
        gate.touch()
        assert worker.process.wait(DEADLINE) == 0
    assert ended.exists()
    assert state_of(result) == "REVOKED"


# -- a warm stop


BREAKABLE = """
import os
app.conf.include = ["ordinary_tasks"]
if os.path.exists({path!r}):
    raise ImportError("no licence")

@app.task(name="late", acks_late=True)
def late():
    return "done"

@app.task(name="early")
def early():
    return "done"
"""


@ours
def test_a_warm_stop_ends_though_an_accepted_job_waits_for_children_that_cannot_boot(
    tmp_path: Path, broker: str
) -> None:
    """What was acknowledged fails; the rest stays with the broker, and is done by the next worker.

    Their child ends before it has read them, and none can follow. (A template would go on forking.)
    """
    broken = tmp_path / "broken"
    spawned = {"python": {"start": "spawn"}}
    place = Workplace(tmp_path, broker, BREAKABLE.format(path=str(broken)), subproc_pool=spawned)
    pool = ("-P", POOL, "-c", "2")
    with closing(place):
        with place.project.worker(*pool) as worker:
            children = worker.children()
            for child in children:
                child.suspend()
            early, late = (place.app.send_task(name) for name in ("early", "late"))
            wait_for(lambda: _accepted(place) == {early.id, late.id}, "both to be accepted")
            broken.touch()
            for child in children:
                child.kill()
            wait_for(lambda: worker.log.count("no licence") > 1, "children that can't boot")
            assert worker.stop() == 0
        with pytest.raises(WorkerLostError, match=r"the worker stops, and no child .*no licence"):
            get(early)
        assert re.search(
            "The worker stops, and no child of the group python can start: .*no licence.*"
            rf"early\[{early.id}\]",
            worker.log,
        )
        assert not late.ready()
        broken.unlink()
        with place.project.worker(*pool):
            assert get(late) == "done"


@ours
def test_a_warm_stop_waits_for_children_that_boot_slowly(tmp_path: Path, broker: str) -> None:
    """A job that lost its child gets another one, also during a stop."""
    slow, gate = tmp_path / "slow", tmp_path / "gate"
    code = f"""
import os
app.conf.include = ["ordinary_tasks"]
if os.path.exists({str(slow)!r}):
    from ordinary_tasks import wait_for_file
    wait_for_file({str(gate)!r})
"""
    place = Workplace(tmp_path, broker, code, subproc_pool={})
    with closing(place), place.project.worker("-P", POOL, "-c", "1") as worker:
        [child] = worker.children()
        child.suspend()
        result = place.app.send_task("add", (1, 2))
        wait_for(lambda: _accepted(place) == {result.id}, "it to be accepted")
        slow.touch()
        child.kill()
        wait_for(lambda: "is replaced" in worker.log, "the next child")
        worker.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Warm shutdown" in worker.log, "the begin of the stop")
        gate.touch()
        assert worker.process.wait(DEADLINE) == 0
        assert get(result) == 3


def _accepted(place: Workplace) -> set[str]:
    node = place.project.node
    [active] = place.app.control.inspect([node], timeout=DEADLINE, limit=1).active().values()
    return {request["id"] for request in active}
