"""joblib's processes, and joblib's own tracker that cleans up after them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.basics import wait_for
from tests.support.projects import POOL, ask
from tests.support.worker import Project

pytestmark = pytest.mark.ecosystem

CODE = """
import os, signal
from joblib import Parallel, delayed
from joblib.externals.loky.backend import resource_tracker
@app.task(name="parallel")
def parallel(folder, die):
    pids = Parallel(n_jobs=2)(delayed(os.getpid)() for _ in range(4))
    # As joblib does for the files in which it passes arrays.
    os.mkdir(folder)
    resource_tracker.register(folder, "folder")
    with open(folder + ".pids", "w") as file:
        file.write(" ".join(map(str, [os.getpid(), *pids])))
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("die", [False, True])
def test_its_processes_and_folders_go_with_the_child(tmp_path: Path, die: bool) -> None:
    project, folder = Project(tmp_path, code=CODE), tmp_path / "folder"
    with project.worker(*POOL, "-c", "1", "--max-tasks-per-child", "1"):
        result = project.app.send_task("parallel", (str(folder), die))
        pids = tmp_path / "folder.pids"
        wait_for(lambda: pids.exists() and pids.read_text(), "the job")
        wait_for(
            lambda: not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split()),
            "the end of its processes",
        )
        wait_for(lambda: not folder.exists(), "the end of its folder")
        assert ask(project, "parallel", str(tmp_path / "other"), False) is None
        assert result.state == ("FAILURE" if die else "SUCCESS")
