"""Children that the worker may not kill: it says so, goes on, and ends all the same.

A worker of one user has children of another, by a program that changes its user as `sudo` does.
Only root can set that up.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError

from tests.support.basics import DEADLINE, require, wait_for
from tests.support.worker import Project, Worker
from tests.support.workplace import BACKEND, BROKERS

POOL = ("-P", "celery_subproc_pool:Pool")
SETPRIV = shutil.which("setpriv")
#: Of the worker, and of its children.
WORKER, OTHER = 65534, 65533

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or SETPRIV is None, reason="needs root and the program setpriv"
)

#: It does nothing but what its first argument says; to end it, one must have the right.
CHILD = """
echo $$ >> "$PIDS"
while [ "$1" = stuck ]; do sleep 1; done
while IFS= read -r line; do
    case $line in
        *hang*) trap '' TERM; while :; do sleep 1; done ;;
        *mute*) exec >&-; while :; do sleep 1; done ;;
    esac
    printf '{"status":"ok","result":1}\\n'
done
"""


class Unprivileged(Project):
    """A project whose worker is not root's. It may read all, but signal only its own."""

    def command(self, *words: str) -> list[str]:
        caps = "+dac_override,+dac_read_search,+fowner"
        user = [f"--reuid={WORKER}", f"--regid={WORKER}", "--clear-groups"]
        return [
            *([SETPRIV] if SETPRIV else []),
            *user,
            f"--inh-caps={caps}",
            f"--ambient-caps={caps}",
            *super().command(*words),
        ]


class Place:
    """A project and the pids of the children that it has had."""

    def __init__(self, directory: Path, broker: str | None, *words: str, **settings: Any) -> None:
        program = directory / "as_other"
        assert SETPRIV is not None
        shutil.copy(SETPRIV, program)
        program.chmod(0o4755)
        #: Runs a program as another user.
        self.as_other = [str(program), f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups"]
        self._pids = directory / "pids"
        self._pids.touch()
        self._pids.chmod(0o666)
        argv = [*self.as_other, "sh", "-c", CHILD, "sh", *words]
        child = {"argv": argv, "env": {"PIDS": str(self._pids)}, "tasks": ["do.it"], **settings}
        conf: dict[str, Any] = {"subproc_pool": {"children": {"sudo": child}}}
        if broker is None:
            self.project: Project = Unprivileged(directory, conf=conf)
        else:
            conf["task_default_queue"] = f"csp-test-{uuid.uuid4().hex}"
            self.project = Unprivileged(directory, BROKERS[broker], BACKEND, conf)

    def pids(self) -> list[int]:
        return [int(line) for line in self._pids.read_text().split()]

    def send(self, *args: str) -> Any:
        return self.project.app.send_task("do.it", args)

    def end_all(self) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def get(result: Any) -> Any:
    return result.get(timeout=DEADLINE, interval=0.02)


def left_behind(worker: Worker) -> list[int]:
    """The pids that the last words of the worker name."""
    found = re.search(r"leaves children behind that it can't kill: pid ([\d, ]+)\. ", worker.log)
    return [] if found is None else [int(pid) for pid in found[1].split(", ")]


@pytest.mark.parametrize("broker", [None, pytest.param("redis", marks=pytest.mark.redis)])
def test_a_child_of_another_user_is_named_and_the_worker_ends(
    directory: Path, broker: str | None
) -> None:
    """The engine is in a thread of its own, or in the worker's event loop."""
    if broker is not None:
        require(broker)
    place = Place(directory, broker, timeout=1.0, stop_timeout=0.5, size=1)
    with place.project.worker(*POOL, "-c", "1") as worker:
        with pytest.raises(TimeLimitExceeded):
            get(place.send("hang"))
        assert get(place.send("")) == 1
        [hangs, serves] = place.pids()
        user = psutil.Process(hangs).username()
        said = (
            rf"Child sudo#0 \(pid {hangs}\) can't be killed: it runs as {user} \(by sudo, .*do\.it"
        )
        wait_for(lambda: re.search(said, worker.log), "its word")
        group = worker.stats()["groups"]["sudo"]
        assert (group["unkillable"], group["states"]) == (1, {"idle": 1, "stopping": 1})
        assert worker.stop() == 0
    assert len(re.findall("can't be killed", worker.log)) == 1
    assert left_behind(worker) == [hangs]
    assert not psutil.pid_exists(serves)
    place.end_all()


def test_a_job_of_such_a_child_that_has_closed_its_stdout_is_lost(directory: Path) -> None:
    place = Place(directory, None, size=1)
    with place.project.worker(*POOL, "-c", "1") as worker:
        with pytest.raises(WorkerLostError, match="its child can't be killed: it runs as "):
            get(place.send("mute"))
        assert get(place.send("")) == 1
        assert worker.stop() == 0
    assert left_behind(worker) == place.pids()[:1]
    place.end_all()


def test_a_cold_stop_ends_too(directory: Path) -> None:
    place = Place(directory, None, size=2)
    with place.project.worker(*POOL, "-c", "2") as worker:
        results = [place.send("hang") for _ in range(2)]
        wait_for(lambda: worker.log.count("received") == 2, "both jobs")
        pids = place.pids()
        worker.process.send_signal(signal.SIGQUIT)
        worker.process.wait(DEADLINE)
        assert not any(result.successful() for result in results)
    assert sorted(left_behind(worker)) == sorted(pids)
    place.end_all()


def test_a_soft_limit_that_such_a_python_child_cannot_be_told_of_costs_it_nothing(
    directory: Path,
) -> None:
    place = Place(directory, None)
    caps = "+dac_override,+dac_read_search"
    wrapper = [*place.as_other, f"--inh-caps={caps}", f"--ambient-caps={caps}"]
    conf = {"subproc_pool": {"python": {"wrapper": wrapper, "stop_timeout": 0.5}}}
    project = Unprivileged(directory, conf=conf, code="app.conf.include = ['ordinary_tasks']\n")
    begun, gate = directory / "begun", directory / "gate"
    with project.worker(*POOL, "-c", "1") as worker:
        args = (str(begun), str(gate))
        result = project.app.send_task("wait", args, soft_time_limit=0.2)
        wait_for(lambda: "can't be told of soft time limits" in worker.log, "the limit")
        gate.touch()
        pid = get(result)
        assert psutil.Process(pid).uids().real == OTHER
        assert worker.stop() == 0
    assert "failed" not in worker.log
    assert "is replaced" not in worker.log
    assert left_behind(worker) == []


def test_a_start_fails_though_such_a_child_that_never_boots_stays(directory: Path) -> None:
    place = Place(directory, None, "stuck", size=1, handshake=True, start_timeout=1.0)
    done = place.project.run("worker", *POOL, "-c", "1")
    assert done.returncode != 0
    assert "The pool can't start: no child of the group sudo came up: it was not" in done.stdout
    assert re.search(r"leaves children behind that it can't kill: pid [\d, ]+\.", done.stdout)
    place.end_all()
