"""Python children that are forked from a template: what they share, and what they must not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.basics import DEADLINE, wait_for
from tests.support.projects import POOL, ask
from tests.support.worker import Project, Worker

CODE = """
import os, random, socket, sys, threading, uuid
@app.task(name="look")
def look():
    targets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    return {
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "sid": os.getsid(0),
        "slot": os.environ["CELERY_SUBPROC_POOL_SLOT"],
        "random": random.random(),
        "uuid": str(uuid.uuid4()),
        "threads": threading.active_count(),
        "open": targets,
        "version": globals().get("VERSION", 1),
    }
@app.task(name="eat")
def eat(megabytes):
    global eaten
    eaten = b"x" * (megabytes * 2**20)
    return os.getpid()
@app.task(name="pid")
def pid():
    return os.getpid()
@app.task(name="python.wait")
def wait_for_gate(begun, gate):
    from ordinary_tasks import wait
    return wait(begun, gate)
"""


def project(directory: Path, code: str = "", **python: Any) -> Project:
    return Project(directory, conf={"subproc_pool": {"python": python}}, code=CODE + code)


def template_of(worker: Worker) -> psutil.Process:
    """Return the process that has forked children."""
    found = [each for each in worker.templates() if each.children()]
    assert len(found) == 1
    return found[0]


def look_at_all(place: Project, count: int) -> dict[int, dict[str, Any]]:
    """Return what each of `count` children sees."""
    seen: dict[int, dict[str, Any]] = {}

    def complete() -> bool:
        results = [place.app.send_task("look") for _ in range(2 * count)]
        seen.update(
            (each["pid"], each)
            for each in (result.get(timeout=DEADLINE, interval=0.02) for result in results)
        )
        return len(seen) >= count

    wait_for(complete, "each child to do a job")
    return seen


def test_children_are_forked_and_share_nothing_else(tmp_path: Path) -> None:
    place = project(tmp_path)
    with place.worker(*POOL, "-c", "4") as worker:
        seen = look_at_all(place, 4)
        template = template_of(worker)
        assert {each["ppid"] for each in seen.values()} == {template.pid}
        assert {each["slot"] for each in seen.values()} == {"0", "1", "2", "3"}
        assert all(each["sid"] == pid for pid, each in seen.items())
        for fact in ("random", "uuid"):
            assert len({each[fact] for each in seen.values()}) == 4
        for pid, each in seen.items():
            pipes = {name for name in each["open"] if name.startswith("pipe:")}
            for other, others in seen.items():
                assert pid == other or not pipes & set(others["open"]) - streams_of(worker)
            assert not [name for name in each["open"] if name.startswith("socket:")]
            assert each["threads"] == 1


def streams_of(worker: Worker) -> set[str]:
    """Return what the worker's own stdout and stderr are: children write there."""
    return {os.readlink(f"/proc/{worker.process.pid}/fd/{number}") for number in (1, 2)}


def test_a_killed_child_is_forked_anew(tmp_path: Path) -> None:
    place = project(tmp_path)
    with place.worker(*POOL, "-c", "2") as worker:
        template = template_of(worker)
        facts = worker.stats()["groups"]["python"]["template"]
        assert (facts["pid"], facts["forks"], facts["children"]) == (template.pid, 2, 2)
        first, second = look_at_all(place, 2)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: f"(pid {first}) is replaced: " in worker.log, "the log")
        seen = wait_for(lambda: {*look_at_all(place, 2)} - {first, second}, "another child")
        assert {process.pid for process in template.children()} == {*seen, second}


def test_a_template_that_dies_is_replaced_and_its_children_go_on(tmp_path: Path) -> None:
    place = project(tmp_path)
    gate = tmp_path / "gate"
    with place.worker(*POOL, "-c", "2") as worker:
        template = template_of(worker)
        begun = tmp_path / "begun"
        held = place.app.send_task("python.wait", [str(begun), str(gate)])
        wait_for(begun.exists, "the job to begin")
        template.kill()
        words = f"The template of python (pid {template.pid}) has died: its 2 children go on"
        wait_for(lambda: words in worker.log, "the log")
        other = ask(place, "pid")
        os.kill(other, signal.SIGKILL)
        wait_for(lambda: ask(place, "pid") != other, "another child")
        [new] = worker.templates()
        assert new.pid != template.pid
        gate.touch()
        held.get(timeout=DEADLINE, interval=0.02)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (
            "threading.Thread(target=threading.Event().wait, name='mine', daemon=True).start()",
            "starts a thread (mine)",
        ),
        ("left = socket.socketpair()", "opens a socket"),
        ("import odd_module", "loads odd_module, which does not survive a fork"),
    ],
)
def test_what_can_not_be_forked_is_spawned(tmp_path: Path, code: str, why: str) -> None:
    (tmp_path / "odd_module.py").touch()
    place = project(tmp_path, code + "\n", not_forkable=["odd_module"])
    with place.worker(*POOL, "-c", "2") as worker:
        assert len(look_at_all(place, 2)) == 2
        assert worker.log.count(why) == 1
        assert "The children of python are not forked, because importing the project" in worker.log
        wait_for(lambda: not worker.templates(), "the template to be gone")


def test_children_are_forked_on_request_whatever_is_loaded(tmp_path: Path) -> None:
    place = project(tmp_path, "left = socket.socketpair()\n", start="fork")
    with place.worker(*POOL, "-c", "1") as worker:
        assert ask(place, "look")["ppid"] == template_of(worker).pid


def test_children_are_spawned_on_request(tmp_path: Path) -> None:
    place = project(tmp_path, start="spawn")
    with place.worker(*POOL, "-c", "1") as worker:
        assert ask(place, "look")["ppid"] == worker.process.pid


def test_an_upgrade_comes_from_a_new_template(tmp_path: Path) -> None:
    place = project(tmp_path)
    path = tmp_path / "proj.py"
    with place.worker(*POOL, "-c", "2") as worker:
        old = template_of(worker)
        path.write_text(path.read_text() + "VERSION = 2\n")
        # Celery 5.3's command line does not know it, and later the command line can't load it.
        place.app.control.broadcast("subproc_restart", destination=[place.node])
        wait_for(lambda: ask(place, "look")["version"] == 2, "the new code")
        wait_for(lambda: [each.pid for each in worker.templates()] != [old.pid], "its template")
        wait_for(lambda: not old.is_running(), "the old template to be gone")
        # Code that is broken: the old children stay, and new ones come from their template.
        good = template_of(worker)
        path.write_text(path.read_text() + "raise RuntimeError('broken')\n")
        place.app.control.broadcast("subproc_restart", destination=[place.node])
        wait_for(lambda: "RuntimeError: broken" in worker.log, "the log")
        pid = ask(place, "look")["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(good.children()) == 2, "a child of the old template")
        assert {each["version"] for each in look_at_all(place, 2).values()} == {2}


def test_a_limit_of_memory_counts_what_is_a_childs_own(tmp_path: Path) -> None:
    # The template takes as much, and each child shares it.
    code = "ballast = [str(number) for number in range(2_000_000)]\n"
    place = project(tmp_path, code, max_memory=80 * 2**20, recycle_jitter=0)
    with place.worker(*POOL, "-c", "1") as worker:
        assert template_of(worker).memory_info().rss > 100 * 2**20
        pid = ask(place, "pid")
        assert [ask(place, "pid") for _ in range(5)] == [pid] * 5
        assert ask(place, "eat", 100) == pid
        wait_for(lambda: ask(place, "pid") != pid, "the child to be recycled")


def test_many_children_start_and_end_at_a_time(tmp_path: Path) -> None:
    """The socket of a template takes ten messages at a time, or few more."""
    place = project(tmp_path)
    with place.worker(*POOL, "-c", "60") as worker:
        children = worker.children()
        assert len(children) == 60
        for child in children:
            child.kill()
        # Some have closed their stdout a while before their exit is seen.
        wait_for(lambda: worker.log.count(" is replaced: ") == 60, "the log")
        wait_for(lambda: len(worker.children()) == 60, "60 others")
        template = template_of(worker)

        def zombies() -> int:
            statuses = [child.status() for child in template.children()]
            return statuses.count(psutil.STATUS_ZOMBIE)

        wait_for(lambda: not zombies(), "the dead ones to be reaped")
        assert "can't be" not in worker.log


def test_a_template_that_stops_is_replaced(tmp_path: Path) -> None:
    place = project(tmp_path)
    with place.worker(*POOL, "-c", "1") as worker:
        template = template_of(worker)
        template.suspend()
        pid = ask(place, "pid")
        os.kill(pid, signal.SIGKILL)
        why = "its template did not fork it within 10 s"
        wait_for(lambda: why in worker.log, "the log")
        wait_for(lambda: ask(place, "pid") != pid, "another child")
