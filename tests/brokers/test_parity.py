"""What operators do to prefork, done to this pool: the rows of docs/parity.md, in their order.

Real workers on real brokers, external and Python children in each. A worker that needs no options
of its own serves several tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import celery
import psutil
import pytest
from billiard.exceptions import (
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
    WorkerLostError,
)
from celery.exceptions import TaskRevokedError

from celery_subproc_pool import ChildTaskError
from tests.support.basics import DEADLINE, PORTS, python_child, state_of, wait_for
from tests.support.cutting_proxy import CuttingProxy
from tests.support.worker import Worker
from tests.support.workplace import POOL, Workplace, control, get, listening, working

pytestmark = pytest.mark.usefixtures("no_garbage_collection")

OBEYS = {"argv": python_child("obeys"), "tasks": ["do.*", "do.it"]}
CHILDREN = {"children": {"obeys": OBEYS}}
KINDS = ("external", "python")

CODE = """
import os
kept = []
@app.task(name="eat")
def eat(megabytes):
    kept[:] = [b"x" * (megabytes * 2**20)]
    return os.getpid()
@app.task(name="python.once", acks_late=True)
def once(runs, begun, gate):
    from ordinary_tasks import wait
    with open(runs, "a") as file:
        file.write("run\\n")
    wait(begun, gate)
    return "done"
@app.task(base=SubprocTask, name="do.unacked", acks_late=True, acks_on_failure_or_timeout=False)
def unacked(*args): ...
@app.task(base=SubprocTask, name="do.started", track_started=True)
def started(*args): ...
"""


def workplace(directory: Path, broker: str, code: str = "", **conf: Any) -> Workplace:
    """A project with external children and Python ones."""
    return Workplace(directory, broker, CODE + code, **{"subproc_pool": CHILDREN, **conf})


class Held(NamedTuple):
    """A job that goes on until its gate is there."""

    result: Any
    gate: Path

    def end(self) -> Any:
        """Let it end; return what it returned: the pid of its child."""
        self.gate.touch()
        value = get(self.result)
        return value if isinstance(value, int) else value[0]


def hold(place: Workplace, kind: str, name: str = "job", **options: Any) -> Held:
    """Send a job that has begun when this returns."""
    begun, held = send_held(place, kind, name, **options)
    wait_for(begun.exists, f"the begin of {name}")
    return held


def send_held(place: Workplace, kind: str, name: str, **options: Any) -> tuple[Path, Held]:
    """Send a job that waits for its gate; return the file that it makes when it begins too."""
    begun, gate = (place.project.directory / f"{kind} {name} {word}" for word in ("begun", "gate"))
    for path in (begun, gate):
        path.unlink(missing_ok=True)
    if kind == "python":
        result = place.app.send_task("wait", (str(begun), str(gate)), **options)
    else:
        steps = ["touch", str(begun)], ["wait", str(gate)], ["own", "pid", {}]
        result = place.send("do.it", *steps, **options)
    return begun, Held(result, gate)


def pid_of(place: Workplace, kind: str, **options: Any) -> int:
    """Do one job; return the pid of its child."""
    if kind == "python":
        return int(get(place.app.send_task("eat", (0,), **options)))
    return int(get(place.send("do.it", ["own", "pid", {}], **options))[0])


def inspect(place: Workplace, command: str, **arguments: Any) -> Any:
    """Ask the worker, as `celery inspect` does."""
    return control(place, command, **arguments)


def children_of(place: Workplace) -> Counter[str]:
    """How many children each group has, by what `inspect subproc` says; without tracers."""
    return Counter(
        row["group"]
        for row in inspect(place, "subproc")
        if row["state"] != "stopping" and row["group"] != "tracers"
    )


def recycled(worker: Worker) -> int:
    """How many children the worker has recycled, by its log; without tracers."""
    return len(re.findall(r"Child (?!tracers#)\S+ \(pid \d+\) is recycled: ", worker.log))


class Site(NamedTuple):
    place: Workplace
    worker: Worker


@pytest.fixture(scope="module")
def shared_worker(tmp_path_factory: pytest.TempPathFactory, broker: str) -> Iterator[Site]:
    """The worker of all tests that change nothing for good."""
    directory = tmp_path_factory.mktemp("shared")
    place = workplace(
        directory,
        broker,
        accept_content=["json", "pickle", "yaml", "msgpack"],
        worker_pool_restarts=True,
        worker_lost_wait=600.0,
    )
    log = str(directory / "signals.log")
    with working(place, "-c", "2", "-E", SIGNALS_LOG=log) as worker:
        yield Site(place, worker)


@pytest.fixture(scope="module")
def limited_worker(tmp_path_factory: pytest.TempPathFactory, broker: str) -> Iterator[Site]:
    """A worker with all options that limit something."""
    # Time to clean up, on a busy machine too.
    settings = {**CHILDREN, "python": {"kill_grace": 5}}
    place = workplace(tmp_path_factory.mktemp("limited"), broker, subproc_pool=settings)
    words = ["-c", "2", "--max-tasks-per-child", "4", "--max-memory-per-child", "150000"]
    limits = ("--time-limit", "2.5", "--soft-time-limit", "2")
    with working(place, *words, *limits) as worker:
        yield Site(place, worker)


# -- size


def test_concurrency(tmp_path: Path, broker: str) -> None:
    place = workplace(tmp_path, broker, worker_concurrency=3)
    with working(place):
        assert children_of(place) == {"obeys": 3, "python": 3}
        assert inspect(place, "stats")["pool"]["max-concurrency"] == 3


CGROUP = """
import celery.utils.sysinfo
celery.utils.sysinfo.available_cpu_count = lambda: 7
celery.utils.sysinfo.cgroup_cpu_quota = lambda: 2.5
"""


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="Celery 5.7 brought it")
def test_concurrency_auto_respects_a_containers_quota(tmp_path: Path, broker: str) -> None:
    place = workplace(tmp_path, broker, code=CGROUP)
    with working(place, "-c", "auto"):
        assert children_of(place) == {"obeys": 3, "python": 3}
        stats = inspect(place, "stats")
        assert (stats["pool"]["max-concurrency"], stats["prefetch_count"]) == (3, 12)


def test_autoscale(tmp_path: Path, broker: str) -> None:
    place = workplace(tmp_path, broker)
    with working(place, "--autoscale", "3,0", AUTOSCALE_KEEPALIVE="0.5"):
        # There is no child to remove.
        assert children_of(place) == {}
        jobs = [send_held(place, kind, "scaled") for kind in KINDS]
        for begun, _ in jobs:
            wait_for(begun.exists, "a child for each job")
        stats = inspect(place, "stats")
        assert stats["autoscaler"]["current"] == 2
        assert stats["pool"]["max-concurrency"] == 2
        for _, held in jobs:
            held.end()
        wait_for(lambda: children_of(place) == {}, "the children's end")
        assert "ok" in control(place, "autoscale", max=2, min=1)
        wait_for(lambda: children_of(place) == {"obeys": 1, "python": 1}, "one child each")


def test_pool_grow_and_pool_shrink(tmp_path: Path, broker: str) -> None:
    place = workplace(tmp_path, broker)
    with working(place, "-c", "1") as worker:
        busy = hold(place, "external")
        assert "pool will grow" in place.project.control("pool_grow", "2")
        stats = inspect(place, "stats")
        assert (stats["pool"]["max-concurrency"], stats["prefetch_count"]) == (3, 12)
        # As many jobs at a time: one is busy.
        more = [hold(place, "external", f"more {number}") for number in range(2)]
        waiting = send_held(place, "external", "waits")
        assert len(inspect(place, "active")) == 3
        refused = place.project.run("control", "-d", place.project.node, "-t", "20", "pool_shrink")
        assert "Can't shrink pool. All processes busy!" in refused.stdout
        more.pop().end()
        wait_for(waiting[0].exists, "the waiting job's begin")
        waiting[1].end()
        more.pop().end()
        # It neither waits for a busy child nor takes one.
        assert "pool will shrink" in place.project.control("pool_shrink", "2")
        stats = inspect(place, "stats")
        assert (stats["pool"]["max-concurrency"], stats["prefetch_count"]) == (1, 4)
        wait_for(lambda: len(worker.children()) == 2, "two children")
        assert busy.end() in {child.pid for child in worker.children()}
        assert [pid_of(place, kind) for kind in KINDS]
        assert "is replaced" not in worker.log


# -- limits


@pytest.mark.parametrize("kind", KINDS)
def test_max_tasks_per_child(limited_worker: Site, kind: str) -> None:
    place, worker = limited_worker
    jobs = Counter(pid_of(place, kind) for _ in range(10))
    assert max(jobs.values()) <= 4
    assert len(jobs) > 2
    assert "jobs (max_jobs); its successor" in worker.log


@pytest.mark.parametrize("kind", KINDS)
def test_max_memory_per_child(limited_worker: Site, kind: str) -> None:
    place, worker = limited_worker
    reason = ""
    # The last job of a child proves nothing: the child is recycled after it.
    for _ in range(4):
        if kind == "python":
            greedy = get(place.app.send_task("eat", (300,)))
        else:
            [greedy] = get(place.send("do.it", ["eat", 300], ["own", "pid", {}]))
        search = partial(re.search, rf"\(pid {greedy}\) is recycled: (.*)")
        reason = wait_for(lambda find=search: find(worker.log), "its successor")[1]
        if "(max_jobs)" not in reason:
            break
    assert re.match(r"it takes \d+ MiB of memory \(max_memory\)", reason)


@pytest.mark.parametrize("kind", KINDS)
def test_time_limit(limited_worker: Site, kind: str) -> None:
    place, worker = limited_worker
    stubborn = {"external": ("do.it", [[["wait", "/nowhere"]]]), "python": ("soft", [True])}
    name, args = stubborn[kind]
    by_worker = place.app.send_task(name, args)
    by_call = place.app.send_task(name, args, time_limit=1, soft_time_limit=0.9)
    for result, seconds in (by_worker, "2.5"), (by_call, "1"):
        with pytest.raises(TimeLimitExceeded):
            get(result)
        line = rf"Hard time limit \({seconds}(\.0)?s\) exceeded for {name}\[{result.id}\]"
        wait_for(lambda line=line: re.search(line, worker.log), "the words of prefork")
    if kind == "python":
        ended = place.project.directory / "ended"
        limits = {"time_limit": 1, "soft_time_limit": 60}
        result = place.app.send_task("wait", ("/dev/null", "/nowhere", str(ended)), **limits)
        with pytest.raises(TimeLimitExceeded):
            get(result)
        wait_for(ended.exists, "the finally block")


def test_soft_time_limit(limited_worker: Site) -> None:
    place, worker = limited_worker
    assert get(place.app.send_task("soft")) == "cleaned up"
    result = place.app.send_task("wait", ("/dev/null", "/nowhere"), soft_time_limit=0.3)
    with pytest.raises(SoftTimeLimitExceeded):
        get(result)
    assert f"Soft time limit (0.3s) exceeded for wait[{result.id}]" in worker.log


def test_rate_limit_and_time_limit_commands(shared_worker: Site) -> None:
    place, _ = shared_worker
    for name, args in (("do.started", [[["reply", {}]]]), ("eat", [0])):
        assert "ok" in control(place, "rate_limit", task_name=name, rate_limit="20/m")
        jobs = [place.app.send_task(name, args) for _ in range(2)]
        for job in jobs:
            get(job)
        first, second = (job.date_done for job in jobs)
        # Every three seconds. It may take longer.
        assert (second - first).total_seconds() > 2
        assert "ok" in control(place, "rate_limit", task_name=name, rate_limit="0")
    for name, args in (("do.it", [[["wait", "/nowhere"]]]), ("soft", [True])):
        assert "ok" in control(place, "time_limit", task_name=name, hard=0.5)
        with pytest.raises(TimeLimitExceeded):
            get(place.app.send_task(name, args))
        assert "ok" in control(place, "time_limit", task_name=name)


def test_worker_proc_alive_timeout(tmp_path: Path, broker: str) -> None:
    silent = {**OBEYS, "handshake": True, "start_timeout": 0.5}
    place = workplace(tmp_path, broker, subproc_pool={"children": {"obeys": silent}})
    with closing(place):
        done = place.project.run("worker", *POOL, "-c", "1")
        assert done.returncode == 1
        assert "it was not ready within 0.5 s (start_timeout)" in done.stdout


# -- restart


@pytest.mark.parametrize("kind", KINDS)
def test_pool_restart(shared_worker: Site, kind: str) -> None:
    place, worker = shared_worker
    wait_for(lambda: children_of(place) == {"obeys": 2, "python": 2}, "all children")
    before = {row["pid"] for row in inspect(place, "subproc")}
    held = hold(place, kind)
    assert "reload started" in place.project.control("pool_restart")
    for pid in before:
        # The busy one, too: it ends its job beside its successor.
        line = f"(pid {pid}) is recycled: the pool is restarted"
        wait_for(lambda line=line: line in worker.log, "its successor")
    # No job was interrupted.
    assert held.end() in before
    assert pid_of(place, kind) not in before
    rows = [row for row in inspect(place, "subproc") if row["state"] != "stopping"]
    assert {row["last_exit"]["reason"] for row in rows} == {"the pool is restarted"}


def test_pool_restart_reloads_modules(tmp_path: Path, broker: str) -> None:
    place = workplace(tmp_path, broker, worker_pool_restarts=True)
    with working(place, "-c", "1") as worker:
        (tmp_path / "later.py").write_text(
            "from celery import shared_task\n@shared_task(name='later')\ndef later(): return 1\n"
        )
        assert "ok" in control(place, "pool_restart", modules=["later"])
        wait_for(lambda: recycled(worker) == 2, "new children")
        assert get(place.app.send_task("later")) == 1
        (tmp_path / "later.py").write_text(
            "from celery import shared_task\n@shared_task(name='later')\ndef later(): return 22\n"
        )
        assert "ok" in control(place, "pool_restart", modules=["later"], reload=True)
        wait_for(lambda: recycled(worker) == 4, "new children")
        assert get(place.app.send_task("later")) == 22


def test_pool_restart_with_code_that_is_broken(tmp_path: Path, broker: str) -> None:
    module = tmp_path / "deployed.py"
    module.write_text("VERSION = 1\n")
    code = """
import deployed
@app.task(name="version")
def version(): return deployed.VERSION
"""
    place = workplace(tmp_path, broker, code, worker_pool_restarts=True)
    with working(place, "-c", "1") as worker:
        before = pid_of(place, "python")
        module.write_text("raise RuntimeError('half of it is missing')\n")
        assert "ok" in control(place, "pool_restart")
        wait_for(lambda: worker.log.count("half of it is missing") > 1, "several attempts")
        assert (
            f"; pid {before}, which it was to replace, goes on serving; the next one" in worker.log
        )
        assert get(place.app.send_task("version")) == 1
        assert pid_of(place, "python") == before
        module.write_text("VERSION = 22\n")
        assert "ok" in control(place, "pool_restart")
        wait_for(lambda: f"(pid {before}) is recycled" in worker.log, "its successor")
        assert get(place.app.send_task("version")) == 22


#: Celery 5.3 knows no commands but its own.
NEW_COMMANDS = celery.VERSION >= (5, 4)


def test_subproc_restart_of_one_group(tmp_path: Path, broker: str) -> None:
    place = workplace(tmp_path, broker)
    with working(place, "-c", "1") as worker:
        python = pid_of(place, "python")
        external = pid_of(place, "external")
        ours = ("subproc", "restart", "-d", place.project.node, "-t", "20")
        if NEW_COMMANDS:
            said = place.project.control("subproc_restart", "obeys")
        else:
            said = place.project.run(*ours, "obeys").stdout
        assert "restarting obeys" in said
        wait_for(lambda: recycled(worker) == 1, "a new child")
        assert pid_of(place, "external") != external
        assert pid_of(place, "python") == python
        refused = place.project.run(*ours, "rails")
        assert refused.returncode == 1
        assert (
            "expected one of this worker's groups (obeys, python, tracers), got 'rails'"
            in refused.stdout
        )
        assert "worker_pool_restarts" not in worker.log
        # Without the setting, Celery refuses the other one.
        assert "error" in control(place, "pool_restart")


UPGRADED = """
@app.task(name="python.version", ignore_result=True)
def version(number):
    import os, time, upgraded
    begin = time.monotonic()
    time.sleep(0.01)
    line = f"{number} python {upgraded.VERSION} {begin} {time.monotonic()}\\n"
    log = os.open("jobs.log", os.O_WRONLY | os.O_APPEND)
    os.write(log, line.encode())
    os.close(log)
"""

#: As `UPGRADED`, and it has read its version when it booted.
PROGRAM = r"""
use Time::HiRes qw(sleep clock_gettime CLOCK_MONOTONIC);
$| = 1;
open(my $file, "<", "version.txt"); my $version = <$file>;
while (my $line = <STDIN>) {
    my ($number) = $line =~ /"args":\[(\d+)\]/;
    my $begin = clock_gettime(CLOCK_MONOTONIC);
    sleep(0.01);
    open(my $log, ">>", "jobs.log");
    my $end = clock_gettime(CLOCK_MONOTONIC);
    syswrite($log, "$number external $version $begin $end\n");
    print "{\"status\":\"ok\"}\n";
}
"""


def test_an_upgrade_under_load(tmp_path: Path, broker: str) -> None:
    sent = 0
    program = {"argv": ["perl", str(tmp_path / "program.pl")], "tasks": ["perl.version"]}
    place = workplace(
        tmp_path,
        broker,
        UPGRADED,
        subproc_pool={"children": {"program": program}},
        worker_pool_restarts=True,
    )

    def publish(version: int) -> None:
        (tmp_path / "upgraded.py").write_text(f"VERSION = {'1' * version}\n")
        (tmp_path / "version.txt").write_text("1" * version)

    def done() -> int:
        return place.log.read_bytes().count(b"\n")

    def keep_busy() -> None:
        """Have some hundred jobs wait for a child, as long as this is called again."""
        nonlocal sent
        if sent > done() + 300:
            return
        with place.app.producer_pool.acquire() as producer:
            for number in range(sent, sent + 300):
                name = ("perl.version", "python.version")[number % 2]
                place.app.send_task(name, (number,), producer=producer, ignore_result=True)
        sent += 300

    def all_recycled() -> bool:
        keep_busy()
        return recycled(worker) == 8

    (tmp_path / "program.pl").write_text(PROGRAM)
    publish(1)
    with working(place, "-c", "4") as worker:
        keep_busy()
        wait_for(lambda: done() > 100, "some jobs")
        publish(2)
        restarted = time.monotonic()
        assert "ok" in control(place, "pool_restart")
        wait_for(all_recycled, "all of them", deadline=60)
        upgraded = time.monotonic()
        wait_for(lambda: done() >= sent, "all jobs", deadline=90)
        assert worker.stop() == 0
    lines = [line.split() for line in place.log.read_text().splitlines()]
    assert Counter(int(number) for number, *_ in lines) == Counter(range(sent))
    assert not re.search("raised|is replaced|ERROR", worker.log)
    ends = sorted(float(end) for *_, end in lines)
    during = [end for end in ends if restarted < end < upgraded]
    gaps = [after - before for before, after in pairwise(during)]
    boots = []
    for kind in KINDS:
        jobs = [(float(begin), version) for _, of, version, begin, _ in lines if of == kind]
        # Old before, new after; and there was work for the whole time.
        assert min(jobs)[1] == "1"
        assert {version for begin, version in jobs if begin > upgraded} == {"11"}
        boots.append(min(begin for begin, version in jobs if version == "11") - restarted)
    # If a boot had stopped all other children, there would be a gap as long as a boot of Python
    # (perl boots hardly longer than a job runs).
    assert max(gaps) < max(boots) / 2


# -- what children are held to


@pytest.mark.parametrize("kind", KINDS)
def test_worker_lost_wait(shared_worker: Site, kind: str) -> None:
    # Prefork's grace before a job is called lost, here ten minutes, is not needed.
    place, _ = shared_worker
    lost = {"external": ("do.it", [[["exit", 5]]]), "python": ("die", ["os._exit"])}
    with pytest.raises(WorkerLostError, match=r"exitcode [45]"):
        get(place.app.send_task(*lost[kind]))


def test_worker_pool_putlocks(shared_worker: Site) -> None:
    place, _ = shared_worker
    jobs = [send_held(place, kind, f"put {number}") for number in range(2) for kind in KINDS]
    wait_for(lambda: len(inspect(place, "active")) == 2, "two jobs that run")
    wait_for(lambda: len(inspect(place, "reserved")) == 2, "two jobs that wait")
    assert sum(begun.exists() for begun, _ in jobs) <= 2
    for _, held in jobs:
        held.gate.touch()
    assert all(held.end() for _, held in jobs)


@pytest.mark.parametrize("kind", KINDS)
def test_fair_scheduling(shared_worker: Site, kind: str) -> None:
    # As always with `-O fair`: no job waits behind the long one.
    place, _ = shared_worker
    held = hold(place, kind)
    quick = {pid_of(place, kind) for _ in range(5)}
    assert len(quick) == 1
    assert held.end() not in quick


@pytest.mark.parametrize("kind", KINDS)
def test_lost_child(shared_worker: Site, kind: str) -> None:
    place, worker = shared_worker
    lost = {"external": ("do.it", [[["signal", 9]]]), "python": ("die", ["SIGKILL"])}
    with pytest.raises(WorkerLostError, match=r"prematurely: signal 9 \(SIGKILL\)"):
        get(place.app.send_task(*lost[kind]))
    assert pid_of(place, kind)
    wait_for(lambda: len(worker.children()) == 4, "its place to be filled")


def test_late_acknowledgement(shared_worker: Site, tmp_path: Path) -> None:
    place, _ = shared_worker
    # reject_on_worker_lost
    once = ["die_once", str(tmp_path / "external")], ["reply", {"result": "delivered again"}]
    assert get(place.send("do.late", *once)) == "delivered again"
    again = place.app.send_task("die_once", (str(tmp_path / "python"),))
    assert get(again) == "delivered again"
    # retry_on_worker_lost
    if celery.VERSION >= (5, 7):
        assert get(place.app.send_task("retried_when_lost", (1,))) == 1
    # acks_on_failure_or_timeout
    failures = tmp_path / "failures"
    with pytest.raises(Exception, match="7"):
        get(place.app.send_task("fail_unacked", (str(failures),)))
    error = ["append", str(failures)], ["reply", {"status": "error", "message": "boom"}]
    with pytest.raises(ChildTaskError, match="boom"):
        get(place.send("do.unacked", *error))
    assert failures.read_text() == "run\n" * 2


@pytest.mark.parametrize("kind", KINDS)
def test_revoke_and_terminate(shared_worker: Site, kind: str) -> None:
    place, worker = shared_worker
    other = hold(place, "external", "other")
    for signum in ("SIGTERM", "SIGKILL", "SIGUSR2"):
        held = hold(place, kind)
        if signum == "SIGKILL":
            place.project.control("terminate", signum, held.result.id)
        else:
            control(place, "revoke", task_id=held.result.id, terminate=True, signal=signum)
        with pytest.raises(TaskRevokedError):
            get(held.result)
        assert held.result.state == "REVOKED"
    if kind == "python":
        # The signal of soft time limits ends the task, and not the child.
        held = hold(place, kind)
        [pid] = [
            row["pid"]
            for row in inspect(place, "subproc")
            if row["state"] == "busy" and row["group"] == kind
        ]
        control(place, "revoke", task_id=held.result.id, terminate=True, signal="SIGUSR1")
        wait_for(lambda: state_of(held.result) == "REVOKED", "the state REVOKED")
        wait_for(
            lambda: (
                pid in [row["pid"] for row in inspect(place, "subproc") if row["state"] == "idle"]
            ),
            "the child to be free",
        )
        wait_for(lambda: state_of(held.result) == "REVOKED", "the state REVOKED")
    # One that waits is not even begun.
    second = hold(place, "external", "second")
    begun, waiting = send_held(place, kind, "waiting")
    wait_for(lambda: inspect(place, "reserved"), "a job that waits")
    assert "tasks" in place.project.control("revoke", waiting.result.id)
    assert second.end()
    with pytest.raises(TaskRevokedError):
        get(waiting.result)
    assert not begun.exists()
    assert other.end()
    assert "WorkerLostError('Worker exited prematurely: signal 15" not in worker.log


def test_revoke_by_stamped_headers(shared_worker: Site, tmp_path: Path) -> None:
    place, _ = shared_worker
    begun = [tmp_path / "external", tmp_path / "python"]
    steps = [["touch", str(begun[0])], ["wait", "/nowhere"]]
    jobs = [
        place.app.signature("do.it", ([*steps],)),
        place.app.signature("wait", (str(begun[1]), "/nowhere")),
    ]
    results = []
    for job in jobs:
        job.stamp(order="A-1")
        results.append(job.delay())
    for path in begun:
        wait_for(path.exists, "a begin")
    headers = {"order": ["A-1"]}
    assert "ok" in control(
        place, "revoke_by_stamped_headers", headers=headers, terminate=True, signal="SIGKILL"
    )
    for result in results:
        with pytest.raises(TaskRevokedError):
            get(result)


# -- what a task and its author see


def test_task_track_started(shared_worker: Site, tmp_path: Path) -> None:
    place, _ = shared_worker
    gate = tmp_path / "gate"
    jobs = [
        place.app.send_task("started", (str(gate),)),
        place.send("do.started", ["wait", str(gate)], ["own", "pid", {}]),
    ]
    pids = []
    for job in jobs:
        wait_for(lambda job=job: job.state == "STARTED", "its being started")
        pids.append(job.info["pid"])
    gate.touch()
    assert [get(jobs[0]), *get(jobs[1])] == pids


def noted(place: Workplace, event: str) -> set[int]:
    """The processes that have seen a signal of Celery's."""
    lines = (place.project.directory / "signals.log").read_text().splitlines()
    return {int(pid) for word, pid in map(str.split, lines) if word.split(":")[0] == event}


def test_worker_process_init_and_shutdown(shared_worker: Site) -> None:
    place, _ = shared_worker
    pids = {pid_of(place, "python") for _ in range(2)}
    assert pids <= noted(place, "init")
    external = pid_of(place, "external")
    control(place, "subproc_restart")
    wait_for(lambda: pids <= noted(place, "shutdown"), "the signal at their end")
    # An external child has no Python of the project.
    assert external not in noted(place, "init") | noted(place, "shutdown")


def test_what_is_set_up_before_the_pool_starts(tmp_path: Path, broker: str) -> None:
    code = """
from celery import bootsteps, signals
from click import Option
seen = {}
app.user_options["preload"].add(Option(["--ini"]))
@signals.user_preload_options.connect
def on_options(options, **_):
    seen["ini"] = options["ini"]
@signals.celeryd_init.connect
def on_init(sender, conf, **_):
    conf.result_expires = 77
    seen["init"] = sender
class Prepares(bootsteps.Step):
    def __init__(self, parent, **options):
        seen["step"] = parent.hostname
app.steps["worker"].add(Prepares)
@app.task(name="seen")
def what_is_seen():
    return {**seen, "expires": app.conf.result_expires}
"""
    place = workplace(tmp_path, broker, code)
    with working(place, "-c", "1", "--ini", "production.ini"):
        node = place.project.node
        expected = {"ini": "production.ini", "init": node, "step": node, "expires": 77}
        assert get(place.app.send_task("seen")) == expected


def test_task_signals(shared_worker: Site, tmp_path: Path, broker: str) -> None:
    place, worker = shared_worker
    child = pid_of(place, "python")
    wait_for(lambda: child in noted(place, "prerun") & noted(place, "postrun"), "its signals")
    assert worker.process.pid not in noted(place, "init")
    # An external job is traced in a tracer, if a signal has receivers there.
    observed = workplace(tmp_path, broker)
    log = str(tmp_path / "signals.log")
    with working(observed, "-c", "1", SIGNALS_LOG=log, OBSERVED="1") as worker:
        pid_of(observed, "external")
        tracers = {tracer.pid for tracer in worker.tracers()}
        wait_for(lambda: tracers & noted(observed, "postrun"), "the tracer's signals")
        assert worker.process.pid not in noted(observed, "prerun") | noted(observed, "postrun")


def test_serializers_and_compression(shared_worker: Site) -> None:
    place, _ = shared_worker
    for options in (
        {"serializer": "pickle"},
        {"serializer": "yaml"},
        {"serializer": "json", "compression": "gzip"},
    ):
        assert get(place.app.send_task("echo", ([1, "é"],), **options)) == [[[1, "é"]], {}]
        assert get(place.app.send_task("do.it", ([1, "é"],), **options)) == [[1, "é"]]


def test_titles_of_processes(shared_worker: Site) -> None:
    place, worker = shared_worker
    title = f"[celeryd: {place.project.node}"
    family = psutil.Process(worker.process.pid).children()
    lines = [" ".join(process.cmdline()) for process in family]
    assert sum(line.endswith(f"{title}:guardian]") for line in lines) == 1
    if importlib.util.find_spec("setproctitle") is not None:
        child = psutil.Process(pid_of(place, "python")).cmdline()[0]
        assert re.fullmatch(re.escape(title) + r":SubprocPoolWorker-\d+\]\s*", child)


def test_logging(tmp_path: Path, broker: str) -> None:
    place = workplace(tmp_path, broker)
    with working(place, "-c", "1", "--logfile", "worker%I.log", "-E") as worker:
        get(place.app.send_task("logging_task", ("spoken",)))
        get(place.send("do.it", ["stderr", "shouted"], ["reply", {}]))
        own = tmp_path / "worker.log"
        child = tmp_path / "worker-1.log"
        wait_for(child.exists, "a file of the child's own")
        wait_for(lambda: "spoken" in child.read_text(), "a task's own words")
        wait_for(lambda: "shouted" in own.read_text(), "what a child wrote to stderr")
        assert worker.stop() == 0


# -- what an operator sees


def test_banner(shared_worker: Site) -> None:
    _, worker = shared_worker
    assert "concurrency: 2 (celery_subproc_pool)" in worker.log
    banner = worker.log[: worker.log.index("Connected to")]
    assert re.search(r"\. obeys: .*obeys\.py\n +size: 2; tasks: do\.\*, do\.it\n", banner)
    assert re.search(
        r"\. python: .*-m celery_subproc_pool\.python_child\.main\n +size: 2; tasks: all", banner
    )


def at_rest(place: Workplace) -> bool:
    return {row["state"] for row in inspect(place, "subproc")} == {"idle"}


def test_inspect(shared_worker: Site) -> None:
    place, _ = shared_worker
    node = place.project.node
    # Another test's restart may still go on: an old child would be gone when its job ends.
    wait_for(lambda: at_rest(place), "rest")
    assert get(place.send("do.it", ["throttle", 1, 0.2])) == {"throttles": 1, "retries": 0}
    held = {kind: hold(place, kind) for kind in KINDS}
    active = {request["id"]: request for request in inspect(place, "active")}
    busy = [row for row in inspect(place, "subproc") if row["task"] and row["group"] != "tracers"]
    rows = {row["task"]["id"]: row for row in busy}
    for kind, group in (("external", "obeys"), ("python", "python")):
        task_id = held[kind].result.id
        assert inspect(place, "query_task", ids=[task_id])[task_id][0] == "active"
        row = rows[task_id]
        assert active[task_id]["worker_pid"] == row["pid"]
        assert (row["group"], row["state"], row["task"]["name"]) == (
            group,
            "busy",
            {"external": "do.it", "python": "wait"}[kind],
        )
        assert row["task"]["seconds"] > 0
        assert row["rss"] > 2**20
        assert row["age"] >= row["task"]["seconds"]
    if NEW_COMMANDS:
        done = place.project.run("inspect", "-d", node, "-t", "20", "subproc")
        assert done.stdout.count("* {'group': ") == len(inspect(place, "subproc"))
    table = place.project.run("subproc", "children", "-d", node, "-t", "20", COLUMNS="250").stdout
    assert re.search(rf"obeys .*{held['external'].result.id}\] for \d", table)
    pids = {kind: held[kind].end() for kind in KINDS}
    # A Python child stores a result before it replies.
    wait_for(lambda: at_rest(place), "rest")
    stats = inspect(place, "stats")["pool"]
    assert stats["implementation"] == "celery_subproc_pool:Pool"
    assert {*stats["processes"]} >= {*pids.values()}
    assert (stats["max-tasks-per-child"], stats["timeouts"]) == ("N/A", [0, 0])
    # As dashboards read prefork's.
    writes = stats["writes"]
    assert writes["total"] == sum(map(int, writes["raw"].split(", "))) >= 3
    assert len(writes["all"].split(", ")) == 4
    assert (writes["avg"], writes["strategy"]) == ("0.25", "fair")
    assert writes["inqueues"] == {"total": 4, "active": 0}
    groups = stats["groups"]
    assert groups["obeys"]["states"] == groups["python"]["states"] == {"idle": 2}
    assert groups["obeys"]["throttled"] >= 1
    for group in groups.values():
        assert group["jobs"] >= 1
        assert 0 < group["run"]["p50"] <= group["run"]["p95"] <= group["run"]["p99"]
        assert group["wait"]["p50"] <= group["wait"]["p99"]


def test_events(shared_worker: Site) -> None:
    place, worker = shared_worker
    with listening(place) as events:
        for kind in KINDS:
            pid_of(place, kind)
        lost = {"external": ("do.it", [[["exit", 5]]]), "python": ("die", ["os._exit"])}
        for kind, group in (("external", "obeys"), ("python", "python")):
            result = place.app.send_task(*lost[kind])
            with pytest.raises(WorkerLostError):
                get(result)

            def child_events(kind: str, group: str = group) -> list[dict[str, Any]]:
                wanted = f"subproc-child-{kind}"
                return [
                    event
                    for event in list(events)
                    if event["type"] == wanted and event["group"] == group
                ]

            [replaced] = wait_for(lambda: child_events("replaced"), "the loss")
            assert re.fullmatch(r"it exited: exitcode [45]", replaced["reason"])
            assert (replaced["uuid"], replaced["worker_pid"]) == (result.id, worker.process.pid)
            wait_for(lambda: child_events("started"), "its successor")
            control(place, "subproc_restart", group=group)
            wait_for(lambda: len(child_events("recycled")) == 2, "two that are recycled")
            first = child_events("recycled")[0]
            assert first["reason"] == "the pool is restarted"
            assert first["successor"] in {event["pid"] for event in child_events("started")}
        types = {event["type"] for event in events}
        assert {"task-received", "task-started", "task-succeeded", "task-failed"} <= types


def test_events_once_they_are_enabled(limited_worker: Site) -> None:
    place, _ = limited_worker

    def restart() -> None:
        before = {row["pid"] for row in inspect(place, "subproc")}
        assert "ok" in control(place, "subproc_restart")
        wait_for(lambda: not before & {row["pid"] for row in inspect(place, "subproc")}, "its end")

    with listening(place) as events:
        restart()
        assert "ok" in control(place, "enable_events")
        assert not [event for event in events if event["type"].startswith("subproc-")]
        restart()
        wait_for(lambda: "subproc-child-recycled" in {e["type"] for e in list(events)}, "an event")
        assert "ok" in control(place, "disable_events")


class Flower:
    """A running Flower, by its HTTP API."""

    def __init__(self, place: Workplace, port: int) -> None:
        self.node = place.project.node
        self._url = f"http://127.0.0.1:{port}/api"

    def ask(self, path: str, **fields: Any) -> Any:
        """GET without `fields`, else POST."""
        data = urllib.parse.urlencode(fields).encode() if fields else None
        with urllib.request.urlopen(self._url + path, data, timeout=DEADLINE) as reply:
            return json.loads(reply.read() or b"null")

    def worker(self) -> Any:
        """What it knows of the worker, asked anew."""
        with suppress(urllib.error.URLError, ConnectionError):
            return self.ask(f"/workers?refresh=1&workername={self.node}").get(self.node)
        return None


@contextmanager
def flower(place: Workplace) -> Iterator[Flower]:
    """Flower from PyPI, unmodified."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = ("flower", "--address=127.0.0.1", f"--port={port}", "--inspect-timeout=20000")
    log = place.project.directory / "flower.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            place.project.command(*words),
            cwd=place.project.directory,
            env=place.project.environment(FLOWER_UNAUTHENTICATED_API="true"),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        it = Flower(place, port)
        wait_for(it.worker, "Flower to know the worker")
        yield it
    except BaseException:
        print(log.read_text())
        raise
    finally:
        process.terminate()
        process.wait(DEADLINE)


def test_flower(shared_worker: Site) -> None:
    place, worker = shared_worker
    node = place.project.node
    with flower(place) as it:
        pool = it.worker()["stats"]["pool"]
        assert pool["implementation"] == "celery_subproc_pool:Pool"
        processes = [*worker.children(), *worker.tracers()]
        assert {process.pid for process in processes} == {*pool["processes"]}
        it.ask(f"/worker/pool/grow/{node}", n=1)
        wait_for(lambda: it.worker()["stats"]["pool"]["max-concurrency"] == 3, "one more")
        it.ask(f"/worker/pool/shrink/{node}", n=1)
        wait_for(lambda: children_of(place) == {"obeys": 2, "python": 2}, "one less")
        before = {*inspect(place, "stats")["pool"]["processes"]}
        it.ask(f"/worker/pool/restart/{node}", n=1)
        wait_for(
            lambda: not before & {*inspect(place, "stats")["pool"]["processes"]}, "the restart"
        )
        for kind in KINDS:
            held = hold(place, kind)
            task_id = held.result.id
            wait_for(lambda task_id=task_id: it.ask("/tasks").get(task_id), "it to know the job")
            it.ask(f"/task/revoke/{task_id}", terminate="true", signal="SIGKILL")
            with pytest.raises(TaskRevokedError):
                get(held.result)
            wait_for(
                lambda task_id=task_id: it.ask("/tasks")[task_id]["state"] == "REVOKED",
                "it to say so",
            )
        waiting = place.app.send_task("echo", countdown=600)
        wait_for(lambda: inspect(place, "scheduled"), "a job for later")
        it.ask(f"/task/revoke/{waiting.id}", terminate="false")
        wait_for(lambda: waiting.id in inspect(place, "revoked"), "its being revoked")


# -- the connection to the broker


@contextmanager
def cut_off(directory: Path, broker: str, *words: str, **conf: Any) -> Iterator[Any]:
    """A worker whose way to its broker can be cut."""
    with closing(CuttingProxy(PORTS[broker])) as proxy:
        place = workplace(directory, broker, proxy=proxy, **conf)
        with working(place, *words) as worker:

            def cut() -> None:
                proxy.cut()
                wait_for(lambda: "onnection to broker lost" in worker.log, "the loss")

            yield place, worker, cut


def test_lost_connection(tmp_path: Path, broker: str) -> None:
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    with cut_off(tmp_path, broker, "-c", "4") as (place, worker, cut):
        held = [hold(place, kind) for kind in KINDS]
        # Their limits began before the loss, and end after it.
        limited = [
            place.send("do.it", ["wait", "/nowhere"], time_limit=3),
            place.app.send_task("soft", (True,), time_limit=3, soft_time_limit=2.9),
        ]
        # They wait in the worker, and are delivered again.
        for number in range(4):
            steps = ["append", str(runs), str(number)], ["wait", str(gate)], ["reply", {}]
            place.send("do.late", *steps)
        wait_for(lambda: len(inspect(place, "reserved")) == 4, "four jobs that wait")
        cut()
        for job in held:
            assert job.end()
        for result in limited:
            with pytest.raises(TimeLimitExceeded):
                get(result)
        gate.touch()
        assert get(place.send("do.it", ["reply", {"result": "after"}])) == "after"
        wait_for(lambda: runs.exists() and len(runs.read_text().split()) >= 4, "those that waited")
        assert worker.stop() == 0
    assert sorted(runs.read_text().split()) == ["0", "1", "2", "3"]


def test_worker_cancel_long_running_tasks_on_connection_loss(tmp_path: Path, broker: str) -> None:
    conf = {"worker_cancel_long_running_tasks_on_connection_loss": True}
    runs, gate, begun = tmp_path / "runs", tmp_path / "gate", tmp_path / "begun"
    with cut_off(tmp_path, broker, "-c", "2", **conf) as (place, worker, cut):
        late = [
            place.send(
                "do.late",
                *(["append", str(runs)], ["touch", str(begun)], ["wait", str(gate)]),
                ["reply", {"result": "done"}],
            ),
            place.app.send_task("python.once", (str(runs), str(begun), str(gate))),
        ]
        wait_for(lambda: runs.exists() and len(runs.read_text().split()) == 2, "their begin")
        children = {child.pid for child in worker.children()}
        cut()
        wait_for(lambda: len(runs.read_text().split()) == 4, "their being run again")
        gate.touch()
        assert [get(result) for result in late] == ["done", "done"]
        wait_for(lambda: len({c.pid for c in worker.children()} - children) == 2, "new children")
        assert worker.stop() == 0
    assert len(runs.read_text().split()) == 4


# -- the end


def test_warm_shutdown(tmp_path: Path, broker: str) -> None:
    place = workplace(tmp_path, broker)
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    begun = tmp_path / "begun"
    with closing(place):
        with place.project.worker(*POOL, "-c", "2") as worker:
            external = place.send(
                "do.late", ["append", str(runs)], ["wait", str(gate)], ["reply", {"result": 7}]
            )
            python = place.app.send_task("python.once", (str(runs), str(begun), str(gate)))
            wait_for(lambda: runs.exists() and len(runs.read_text().split()) == 2, "their begin")
            waiting = place.app.send_task("echo")
            worker.process.send_signal(signal.SIGTERM)
            wait_for(lambda: "Warm shutdown" in worker.log, "the shutdown")
            gate.touch()
            assert worker.process.wait(DEADLINE) == 0
        assert (get(external), get(python)) == (7, "done")
        # They were acknowledged, and the one that waited was given back.
        with place.project.worker(*POOL, "-c", "1"):
            assert get(waiting) == [[], {}]
    assert runs.read_text() == "run\n" * 2


@pytest.mark.parametrize("how", ["SIGQUIT", "remapped SIGTERM"])
def test_cold_shutdown(tmp_path: Path, broker: str, how: str) -> None:
    place = workplace(tmp_path, broker)
    environ = {"REMAP_SIGTERM": "SIGQUIT"} if how == "remapped SIGTERM" else {}
    runs, gate, begun = (tmp_path / name for name in ("runs", "gate", "begun"))
    with closing(place):
        with place.project.worker(*POOL, "-c", "2", **environ) as worker:
            jobs = [
                place.send(
                    "do.late",
                    *(["append", str(runs)], ["wait", str(gate)]),
                    ["reply", {"result": "done"}],
                ),
                place.app.send_task("python.once", (str(runs), str(begun), str(gate))),
            ]
            wait_for(lambda: runs.exists() and len(runs.read_text().split()) == 2, "their begin")
            children = worker.children()
            worker.process.send_signal(signal.SIGQUIT if how == "SIGQUIT" else signal.SIGTERM)
            worker.process.wait(DEADLINE)
            # Prefork's words: neither revoked nor failed.
            assert not {job.state for job in jobs} & {"REVOKED", "FAILURE"}
            assert are_gone(children)
        gate.touch()
        with place.project.worker(*POOL, "-c", "2"):
            assert [get(job) for job in jobs] == ["done", "done"]
    assert runs.read_text() == "run\n" * 4


@pytest.mark.skipif(celery.VERSION < (5, 5), reason="Celery 5.5 brought it")
def test_soft_shutdown(tmp_path: Path, broker: str) -> None:
    place = workplace(tmp_path, broker, worker_soft_shutdown_timeout=3.0)
    gate, later = tmp_path / "gate", tmp_path / "later"

    def send(name: str, opens: Path) -> Any:
        """A late-acked job that waits for a file, once it has begun."""
        begun, runs = tmp_path / f"{name} begun", tmp_path / f"{name} runs"
        steps = ["append", str(runs)], ["touch", str(begun)], ["wait", str(opens)]
        result = place.send("do.late", *steps, ["reply", {"result": name}])
        wait_for(begun.exists, "the job's begin")
        return result

    with closing(place):
        with place.project.worker(*POOL, "-c", "3") as worker:
            short, long = send("short", gate), send("long", later)
            ordinary = place.app.send_task("wait", (str(tmp_path / "begun"), str(gate)))
            wait_for((tmp_path / "begun").exists, "the ordinary task's begin")
            worker.process.send_signal(signal.SIGQUIT)
            wait_for(lambda: "Initiating Soft Shutdown" in worker.log, "the shutdown")
            gate.touch()
            worker.process.wait(DEADLINE)
            assert get(short) == "short"
            assert get(ordinary) is not None
            assert long.state not in ("SUCCESS", "REVOKED", "FAILURE")
        later.touch()
        with place.project.worker(*POOL, "-c", "1"):
            assert get(long) == "long"
            assert get(place.send("do.it")) == []
    assert (tmp_path / "short runs").read_text() == "run\n", "it was acknowledged"
    assert (tmp_path / "long runs").read_text() == "run\n" * 2


@contextmanager
def in_a_terminal(place: Workplace, *words: str) -> Iterator[tuple[Worker, int]]:
    """A worker in the foreground of a terminal of its own, and what its keyboard writes to."""
    keyboard, terminal = pty.openpty()
    try:
        with place.project.worker(*POOL, *words, terminal=terminal) as worker:
            yield worker, keyboard
    finally:
        os.close(keyboard)
        os.close(terminal)


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_ctrl_c(tmp_path: Path, broker: str, times: int) -> None:
    place = workplace(tmp_path, broker)
    with closing(place), in_a_terminal(place, "-c", "2") as (worker, keyboard):
        held = [hold(place, kind) for kind in KINDS]
        children = worker.children()
        os.write(keyboard, b"\x03")
        wait_for(lambda: "Warm shutdown" in worker.log, "the warm shutdown")
        if times == 1:
            # It does not reach a child.
            assert all(job.end() for job in held)
            # Celery decides the exit status.
            worker.process.wait(DEADLINE)
            assert "is replaced" not in worker.log
        else:
            # Now it does not wait for its jobs.
            os.write(keyboard, b"\x03")
            worker.process.wait(DEADLINE)
            assert not any(job.result.ready() for job in held)
        assert are_gone(children)


#: Celery leaves it to chance whether it forks beat before or after the pool starts.
BEAT_LAST = """
from celery.worker import components
components.Beat.requires = (components.Pool,)
"""


def test_sigkill_of_the_worker(tmp_path: Path, broker: str) -> None:
    # With beat, a copy of the worker that outlives it, as on prefork.
    place = workplace(tmp_path, broker, BEAT_LAST)
    with working(place, "-c", "2", "-B") as worker:
        escaped = psutil.Process(get(place.send("do.it", ["escape"])))
        held = hold(place, "python")
        beat, children = beat_and_children(worker)
        worker.process.kill()
        worker.process.wait()
        # Two seconds are the promise; how long a busy machine takes is not the point.
        wait_for(lambda: are_gone([*children, escaped]), "their end")
        beat.kill()
        assert not held.result.ready()


def test_beat(tmp_path: Path, broker: str) -> None:
    ticks = tmp_path / "ticks"
    schedule = {
        kind: {"task": task, "schedule": 0.5, "args": args}
        for kind, task, args in (
            ("external", "do.it", [[["append", str(ticks), "external"], ["reply", {}]]]),
            ("python", "log_pid", [str(ticks), 1]),
        )
    }
    place = workplace(tmp_path, broker, BEAT_LAST, beat_schedule=schedule)
    with working(place, "-c", "1", "-B") as worker:
        wait_for(
            lambda: ticks.exists() and {"1", "external"} <= {*ticks.read_text().split()},
            "both kinds to be sent",
        )
        beat, children = beat_and_children(worker)
        assert len(children) == 2
        assert not pipes_of(beat) & {pipe for child in children for pipe in pipes_of(child)}
        assert worker.stop() == 0
    assert "is replaced" not in worker.log


def are_gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs."""
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


def beat_and_children(worker: Worker) -> tuple[psutil.Process, list[psutil.Process]]:
    """The process that `-B` makes, and the pool's."""
    processes = worker.children()
    [beat] = [process for process in processes if "worker" in process.cmdline()]
    return beat, [process for process in processes if process != beat]


def pipes_of(process: psutil.Process) -> set[str]:
    """The pipes that it has an end of."""
    descriptors = Path(f"/proc/{process.pid}/fd").iterdir()
    return {name for name in map(os.readlink, descriptors) if name.startswith("pipe:")}


def test_purge(tmp_path: Path, broker: str) -> None:
    place, runs = workplace(tmp_path, broker), tmp_path / "runs"
    runs.touch()
    for kind in (["append", str(runs)], ["append", str(runs)]):
        place.send("do.it", kind, ["reply", {}])
    with working(place, "-c", "1", "--purge") as worker:
        assert [pid_of(place, kind) for kind in KINDS]
        assert "purge: Erased 2 messages" in worker.log
    assert runs.read_text() == ""


def test_detach_and_pidfile(tmp_path: Path, broker: str) -> None:
    place, pidfile, log = workplace(tmp_path, broker), tmp_path / "it.pid", tmp_path / "it.log"
    words = ("--detach", "--pidfile", str(pidfile), "--logfile", str(log), "-l", "INFO")
    with closing(place):
        done = place.project.run("worker", *POOL, "-c", "1", "-n", place.project.node, *words)
        assert done.returncode == 0, done.stdout
        wait_for(lambda: log.exists() and " ready." in log.read_text(), "the worker")
        pid = int(pidfile.read_text())
        pids = {pid_of(place, kind) for kind in KINDS}
        assert pids <= {process.pid for process in psutil.Process(pid).children(recursive=True)}
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not pidfile.exists(), "the worker's end")


def test_celery_multi(tmp_path: Path, broker: str) -> None:
    place = workplace(tmp_path, broker)
    node = place.project.node
    files = (f"--pidfile={tmp_path}/%n.pid", f"--logfile={tmp_path}/%n.log")

    def multi(*words: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "celery", "multi", *words, *files],
            cwd=tmp_path,
            env=place.project.environment(),
            check=True,
            timeout=60,
            capture_output=True,
        )

    name = node.partition("@")[0]
    log, pidfile = tmp_path / f"{name}.log", tmp_path / f"{name}.pid"
    with closing(place):
        multi("start", node, "-A", "proj", *POOL, "-c", "1", "-l", "INFO")
        wait_for(lambda: log.exists() and " ready." in log.read_text(), "the worker")
        first = {pid_of(place, kind) for kind in KINDS}
        multi("restart", node, "-A", "proj", *POOL, "-c", "1", "-l", "INFO")
        wait_for(lambda: log.read_text().count(" ready.") == 2, "another worker")
        assert not first & {pid_of(place, kind) for kind in KINDS}
        multi("stopwait", node)
        wait_for(lambda: not pidfile.exists(), "the worker's end")
