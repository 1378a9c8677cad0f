"""Asyncio children: how they start and end, and how they share a worker with other children."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import celery
import pytest

from tests.support.basics import DEADLINE, wait_for
from tests.support.projects import POOL, ask
from tests.support.worker import Project

CODE = """
import asyncio, os, sys
from pathlib import Path
from celery import signals
def note(*words):
    with open({notes!r}, "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")
@app.task(name="plain.wait")
def plain_wait(begun, gate):
    from ordinary_tasks import wait
    note("plain", os.getpid())
    return wait(begun, gate)
@app.task(name="plain.hold")
def plain_hold(gate):
    from ordinary_tasks import wait_for_file
    wait_for_file(gate)
@app.task(name="aio.echo")
async def echo(*args):
    await asyncio.sleep(0)
    return [*args, os.getpid()]
@app.task(name="aio.wait")
async def wait(begun, gate):
    Path(begun).touch()
    try:
        while not Path(gate).exists():
            await asyncio.sleep(0.01)
    finally:
        note("over", type(sys.exc_info()[1]).__name__)
    return "done"
"""

LIFESPAN = """
import contextlib
opened = []
@contextlib.asynccontextmanager
async def lifespan(app):
    note("opens", app.main, os.getpid())
    async with asyncio.timeout(1000) if sys.version_info >= (3, 11) else contextlib.nullcontext():
        opened.append(asyncio.get_running_loop())
        yield
        note("closes", os.getpid())
@signals.worker_process_init.connect(weak=False)
def on_init(**_):
    note("init", os.getpid(), bool(opened))
@app.task(name="aio.same_loop")
async def same_loop():
    return opened == [asyncio.get_running_loop()]
"""


class Noting(Project):
    """A project that notes what happens in a file."""

    def __init__(self, directory: Path, code: str = "", **conf: Any) -> None:
        self._notes = directory / "notes"
        self._notes.touch()
        super().__init__(directory, conf=conf, code=CODE.format(notes=str(self._notes)) + code)

    def noted(self, first: str) -> list[list[str]]:
        lines = [line.split() for line in self._notes.read_text().splitlines()]
        return [words[1:] for words in lines if words[0] == first]

    def begun(self, name: str, directory: Path, *args: Any, **options: Any) -> Any:
        """Send a task that notes that it has begun, and wait for that."""
        path = directory / f"begun-{len(list(directory.iterdir()))}"
        result = self.app.send_task(name, [str(path), *args], **options)
        wait_for(path.exists, f"{name} to begin")
        return result


def get(result: Any) -> Any:
    return result.get(timeout=DEADLINE, interval=0.02)


def settings(**asyncio: Any) -> dict[str, Any]:
    return {"asyncio": asyncio, "python": {"size": 1}}


# -- start and end


def test_the_lifespan_is_around_all_jobs(tmp_path: Path) -> None:
    conf = settings(lifespan="proj:lifespan")
    project = Noting(tmp_path, LIFESPAN, subproc_pool=conf)
    with project.worker(*POOL, "-c", "4"):
        [[_, pid]] = project.noted("opens")
        assert ask(project, "aio.echo", 1) == [1, int(pid)]
        assert ask(project, "aio.same_loop") is True
        assert project.noted("closes") == []
    assert project.noted("closes") == [[pid]]
    assert [pid, "False"] in project.noted("init")


@pytest.mark.parametrize(
    ("lifespan", "words"),
    [
        ("proj:fails", "RuntimeError: no database"),
        ("proj:missing", "subproc_pool.asyncio.lifespan: 'proj:missing' can't be imported"),
        ("proj:plain", "expected that 'proj:plain' returns an asynchronous context manager"),
    ],
)
def test_a_lifespan_that_fails_stops_the_worker(tmp_path: Path, lifespan: str, words: str) -> None:
    code = LIFESPAN + (
        "@contextlib.asynccontextmanager\n"
        "async def fails(app):\n"
        "    raise RuntimeError('no database')\n"
        "    yield\n"
        "def plain(app): ...\n"
    )
    project = Noting(tmp_path, code, subproc_pool=settings(lifespan=lifespan))
    done = project.run("worker", *POOL, "-c", "2", "-l", "INFO")
    assert done.returncode == 1
    assert words in done.stdout


def test_a_warm_shutdown_lets_coroutines_end(tmp_path: Path) -> None:
    project = Noting(tmp_path, subproc_pool=settings())
    gate = tmp_path / "gate"
    with project.worker(*POOL, "-c", "4") as worker:
        results = [project.begun("aio.wait", tmp_path, str(gate)) for _ in range(3)]
        worker.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Warm shutdown" in worker.log, "the shutdown")
        gate.touch()
        worker.process.wait(DEADLINE)
        assert [get(result) for result in results] == ["done"] * 3
    assert project.noted("over") == [["NoneType"]] * 3


@pytest.mark.skipif(celery.VERSION < (5, 5), reason="Celery cancels no job then")
def test_a_cold_shutdown_cancels_coroutines(tmp_path: Path) -> None:
    project = Noting(tmp_path, subproc_pool=settings())
    gate = tmp_path / "gate"
    with project.worker(*POOL, "-c", "4") as worker:
        for _ in range(3):
            project.begun("aio.wait", tmp_path, str(gate))
        worker.process.send_signal(signal.SIGQUIT)
        worker.process.wait(DEADLINE)
    assert project.noted("over") == [["CancelledError"]] * 3


def test_a_worker_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    """`conftest` looks whether processes are left."""
    project = Noting(tmp_path, subproc_pool=settings())
    with project.worker(*POOL, "-c", "4") as worker:
        project.begun("aio.wait", tmp_path, str(tmp_path / "gate"))
        worker.process.kill()
        worker.process.wait()


def test_a_child_is_recycled_when_its_successor_is_ready(tmp_path: Path) -> None:
    project = Noting(tmp_path, subproc_pool=settings(max_jobs=5, recycle_jitter=0))
    gate = tmp_path / "gate"
    with project.worker(*POOL, "-c", "50"):
        held = project.begun("aio.wait", tmp_path, str(gate))
        pids = [get(project.app.send_task("aio.echo"))[0] for _ in range(12)]
        assert len(set(pids)) == 3
        gate.touch()
        assert get(held) == "done"


# -- which children there are


def test_without_coroutines_there_are_no_asyncio_children(tmp_path: Path) -> None:
    project = Project(tmp_path, code='@app.task(name="plain")\ndef plain(): return 1\n')
    with project.worker(*POOL, "-c", "1") as worker:
        assert ask(project, "plain") == 1
        assert "asyncio" not in worker.log


def test_with_coroutines_only_there_are_no_python_children(tmp_path: Path) -> None:
    code = '@app.task(name="aio")\nasync def aio(x): return x\n'
    project = Project(tmp_path, code=code)
    with project.worker(*POOL, "-c", "30") as worker:
        assert ask(project, "aio", 1) == 1
        assert "size: 1, 30 jobs each; tasks: async def" in worker.log
        assert "python_child" not in worker.log
        # Celery's own tasks run there, too. It calls the task for each of the arguments.
        each = project.app.signature(
            "celery.starmap", kwargs={"task": project.app.signature("aio")}
        )
        assert get(each.apply_async(kwargs={"it": [(1,), (2,), (3,)]})) == [1, 2, 3]


def test_the_command_shows_them(tmp_path: Path) -> None:
    project = Noting(tmp_path, subproc_pool=settings())
    done = project.run("subproc", "check")
    assert done.returncode == 0
    assert "celery_subproc_pool.asyncio_child.main\n    size: 1; tasks: aio.echo, aio.wait" in (
        done.stdout
    )
    python = done.stdout.partition("asyncio:")[0]
    assert "aio." not in python


def test_eager_tasks_run_their_coroutine(tmp_path: Path) -> None:
    """In a process that has called `celery_subproc_pool.run_coroutines`."""
    code = """
from celery_subproc_pool import run_coroutines
run_coroutines(app)
async def inside():
    return echo.apply(["in a loop"]).result[0], (await echo(1))[0]
print(echo.apply(["word"]).result[0], asyncio.run(inside()))
app.conf.task_always_eager = True
print(echo.delay("eager").get()[0])
"""
    project = Noting(tmp_path, code)
    done = project.run("report")
    assert done.stdout.startswith("word ('in a loop', 1)\neager\n"), done.stdout


# -- sizes


def test_a_large_concurrency_is_for_coroutines(tmp_path: Path) -> None:
    project = Noting(tmp_path)
    gate = tmp_path / "gate"
    with project.worker(*POOL, "-c", "300") as worker:
        results = [
            project.app.send_task("aio.wait", [str(gate) + "b", str(gate)]) for _ in range(300)
        ]
        wait_for(lambda: _running(project, "asyncio") == 300, "all coroutines to run")
        gate.touch()
        assert {get(result) for result in results} == {"done"}
        assert "The concurrency 300 is for the asyncio children, too: python gets" in worker.log


def test_a_backlog_of_one_kind_lets_the_other_kind_pass(tmp_path: Path) -> None:
    project = Noting(tmp_path, subproc_pool=settings())
    gate = tmp_path / "gate"
    # Celery would prefetch 8 messages, and only one of these jobs has a child.
    with project.worker(*POOL, "-c", "2") as worker:
        plain = [project.app.send_task("plain.hold", [str(gate)]) for _ in range(120)]
        for word in range(20):
            assert ask(project, "aio.echo", word)[0] == word
        # One that waits is revoked: it is not begun.
        project.app.control.revoke(plain[-1].id)
        wait_for(lambda: plain[-1].id in worker.log.partition("revoked")[2], "the revoke")
        gate.touch()
        for result in plain[:-1]:
            assert get(result) is None
        wait_for(lambda: plain[-1].state == "REVOKED", "the revoked job to be dropped")


def test_concurrency_bounds_the_jobs_of_a_group(tmp_path: Path) -> None:
    project = Noting(tmp_path, subproc_pool=settings(concurrency=3))
    gate = tmp_path / "gate"
    with project.worker(*POOL, "-c", "20"):
        results = [
            project.app.send_task("aio.wait", [str(gate) + "b", str(gate)]) for _ in range(10)
        ]
        wait_for(lambda: _running(project, "asyncio") == 3, "three to run")
        # The others had the time: a job that came later has been done.
        held = project.begun("plain.wait", tmp_path, str(gate))
        assert _running(project, "asyncio") == 3
        gate.touch()
        assert {get(result) for result in results} == {"done"}
        get(held)


def _running(project: Project, group: str) -> int:
    """Return how many jobs children of `group` have now."""
    [reply] = project.app.control.broadcast(
        "subproc", reply=True, destination=[project.node], timeout=DEADLINE, limit=1
    )
    [rows] = reply.values()
    return sum(row["in_flight"] for row in rows if row["group"] == group)


def test_uvloop_must_be_installed(tmp_path: Path) -> None:
    try:
        import uvloop  # noqa: F401
    except ImportError:
        project = Noting(tmp_path, subproc_pool=settings(uvloop=True))
        done = project.run("worker", *POOL)
        assert done.returncode == 1
        assert "subproc_pool.asyncio.uvloop: expected that uvloop is installed" in done.stdout
    else:
        assert sys.modules["uvloop"]
