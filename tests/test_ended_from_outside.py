"""Jobs that are ended from outside, by a limit or a revoke, and what their tasks may still do.

With CSP_TEST_POOL=prefork in the environment, the tests that are not about the pool itself run on
prefork: that is how it was seen what they must expect.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from billiard.exceptions import TimeLimitExceeded

from .conftest import require, wait_for
from .test_python_children import Running, get
from .worker import Project

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
"""


@pytest.fixture(scope="module")
def limits_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A worker whose children have time to clean up, on a busy machine too."""
    directory = tmp_path_factory.mktemp("limits")
    conf: dict[str, Any] = {"subproc_pool": {"python": {"kill_grace": 5, "stop_timeout": 20}}}
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
    assert f"Hard time limit (2s) exceeded for locked[{result.id}]" in limits_worker.worker.log
    assert limits_worker.get("add", 1, 2) == 3


def test_a_task_that_ignores_sigterm_is_killed_all_the_same(
    limits_worker: Running, tmp_path: Path
) -> None:
    """Its place is filled meanwhile."""
    pid_path = tmp_path / "pid"
    result = limits_worker.send("deaf", str(pid_path), time_limit=2)
    with pytest.raises(TimeLimitExceeded):
        get(result)
    assert limits_worker.get("add", 1, 2) == 3
    wait_for(lambda: not psutil.pid_exists(int(pid_path.read_text())), "the end of the child")
    assert not (tmp_path / "pid.ended").exists()
