"""With setproctitle, Celery gives its processes titles.

A title overwrites the environment that /proc shows.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.basics import DEADLINE, runs, wait_for
from tests.support.worker import Project

pytestmark = pytest.mark.ecosystem

CODE = """
import os, signal
@app.task(name="daemonise")
def daemonise():
    pid = os.fork()
    if not pid:
        os.setsid()
        while True:
            signal.pause()
    while os.getsid(pid) != pid:
        pass
    return pid
"""


def test_a_copy_in_a_session_of_its_own_ends_with_the_worker(tmp_path: Path) -> None:
    """A task forks the copy. It runs no other program and has the title of its child."""
    import setproctitle  # noqa: F401 (without it, this would show nothing)

    project = Project(tmp_path, code=CODE)
    with project.worker("-P", "celery_subproc_pool:Pool", "-c", "1") as worker:
        result = project.app.send_task("daemonise")
        pid = result.get(timeout=DEADLINE, interval=0.02)
        assert runs(pid)
        with pytest.raises(KeyError):
            psutil.Process(pid).environ()["CELERY_SUBPROC_POOL_WORKER"]
        worker.process.kill()
        worker.process.wait(DEADLINE)
        wait_for(lambda: not runs(pid), "its end")
