"""A thousand kills under load, each of a child that has done a job."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.basics import CHILDREN, DEADLINE, wait_for
from tests.support.worker import Project, Worker

pytestmark = pytest.mark.soak

KILLS = 1000
SIZE = 8
#: Jobs that are sent and have not begun.
AHEAD = 100


class Load:
    """Jobs for perl children, which tell in a file what they begin."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "begun.log"
        self._path.touch()
        perl = {
            "argv": ["perl", str(CHILDREN / "log_jobs.pl")],
            "tasks": ["perl.it"],
            "env": {"LOG": str(self._path)},
        }
        self.project = Project(directory, conf={"subproc_pool": {"children": {"perl": perl}}})
        self._seen = 0
        self.sent: list[Any] = []
        #: Jobs begun, by pid.
        self.begun: Counter[int] = Counter()

    def look(self) -> None:
        """Read what has begun, and send more."""
        with self._path.open("rb") as file:
            file.seek(self._seen)
            # The last line may be incomplete.
            text, newline, _ = file.read().rpartition(b"\n")
        self._seen += len(text + newline)
        self.begun.update(int(line.split()[0]) for line in text.splitlines())
        while len(self.sent) < self.begun.total() + AHEAD:
            self.sent.append(self.project.app.send_task("perl.it"))

    def worked(self) -> set[int]:
        """Children that have begun a second job: they have done one."""
        return {pid for pid, jobs in self.begun.items() if jobs > 1}


def kill(pid: int) -> bool:
    try:
        psutil.Process(pid).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def boot_time(load: Load, worker: Worker) -> float:
    """How long it takes this machine to replace one child, while there is no load, in seconds."""
    [before, *_] = worker.children()
    load.project.app.send_task("perl.it").get(timeout=DEADLINE, interval=0.02)
    began = time.monotonic()
    before.kill()
    wait_for(lambda: len(worker.children()) == SIZE and not before.is_running(), "another child")
    return time.monotonic() - began


@pytest.mark.timeout(600)
def test_a_thousand_kills_leave_the_pool_at_full_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = Load(tmp_path)
    killed: set[int] = set()
    with load.project.worker("-P", "celery_subproc_pool:Pool", "-c", str(SIZE)) as worker:
        boot = boot_time(load, worker)
        began = time.monotonic()
        while len(killed) < KILLS:
            load.look()
            for pid in load.worked() - killed:
                killed.add(pid)
                assert kill(pid) or pid not in [child.pid for child in worker.children()]
                if len(killed) == KILLS:
                    break
            assert time.monotonic() < began + 500, f"{len(killed)} kills only"
        last = time.monotonic()
        wait_for(
            lambda: len({child.pid for child in worker.children()} - killed) == SIZE,
            "a pool at full size",
        )
        healed = time.monotonic() - last
        took = last - began
        # A second; more on a machine that takes that long for a few boots.
        assert healed < max(1.0, 10 * boot)
        wait_for(lambda: all(job.ready() for job in load.sent), "the ends of all jobs", 120.0)
        # No slot had to back off: each child had done a job.
        assert "the next one starts in" not in worker.log
        group = worker.stats()["groups"]["perl"]
        assert (group["in_service"], group["size"]) == (SIZE, SIZE)
    ends = Counter(job.state for job in load.sent)
    assert set(ends) <= {"SUCCESS", "FAILURE"}
    lost = [job for job in load.sent if job.state == "FAILURE"]
    assert {type(job.result).__name__ for job in lost} <= {"WorkerLostError"}
    # No job was begun twice.
    assert load.begun.total() <= len(load.sent) + 1
    with capsys.disabled():
        print(f"\n{KILLS} kills in {took:.1f} s, {len(load.sent)} jobs: {dict(ends)};", end=" ")
        print(f"full size after {healed:.2f} s (one replacement alone: {boot:.2f} s)")


def test_a_child_that_dies_before_its_first_job_is_not_tried_a_thousand_times(
    tmp_path: Path,
) -> None:
    """Spawns are counted in a window of time; the back-off bounds them however fast the machine."""
    good, spawns = tmp_path / "good", tmp_path / "spawns"
    good.touch()
    # Alive for long enough to have started; from then on it exits at once.
    script = f"echo x >> {spawns}; [ -e {good} ] && exec perl {CHILDREN / 'log_jobs.pl'}; exit 1"
    children = {
        "frail": {
            "argv": ["sh", "-c", script],
            "tasks": ["frail.it"],
            "size": 1,
            "env": {"LOG": str(tmp_path / "log")},
        }
    }
    project = Project(tmp_path, conf={"subproc_pool": {"children": children}})
    with project.worker("-P", "celery_subproc_pool:Pool", "-c", "2") as worker:
        good.unlink()
        [child] = worker.children()
        began = time.monotonic()
        child.kill()
        wait_for(lambda: spawns.read_text().count("x") >= 6, "the fifth try")
        # At least a half of 0.1, 0.2, 0.4, 0.8 and 1.6 s had to pass.
        assert time.monotonic() - began > 1.5
        good.touch()
        result = project.app.send_task("frail.it")
        assert result.get(timeout=DEADLINE * 2, interval=0.02) == worker.children()[0].pid
        assert worker.stats()["groups"]["frail"]["cooling"] == 0
