"""Tracers that die, stand still, hang or can't boot: the worker goes on, and each job ends once."""

from __future__ import annotations

import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError

from tests.support.basics import wait_for
from tests.support.projects import POOL
from tests.support.traced import WATCHED, TracedProject, get
from tests.support.worker import Worker

OK = ["reply", {"result": "done"}]


def pids(processes: list[Any]) -> set[int]:
    return {process.pid for process in processes}


# -- killed

LATE = """
@app.task(base=SubprocTask, name="do.late", acks_late=True, reject_on_worker_lost=True)
def late(*args): ...
"""


def test_the_jobs_of_a_killed_tracer_are_lost_each_once(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, WATCHED + LATE, size=4)
    gate, runs, begun = tmp_path / "gate", tmp_path / "runs", tmp_path / "begun"
    begun.mkdir()

    def steps(name: str, result: str) -> list[list[Any]]:
        touch = ["touch", str(begun / name)]
        return [
            ["append", str(runs), name],
            touch,
            ["wait", str(gate)],
            ["reply", {"result": result}],
        ]

    with project.worker(*POOL, "-c", "8") as worker:
        lost = [project.send("do.it", *steps(str(number), "first")) for number in range(3)]
        late = project.send("do.late", *steps("late", "again"))
        # Its child is told to cancel it, and goes on.
        told = project.app.send_task("many.it", ["wait_and_answer", "ok", str(begun / "many")])
        wait_for(lambda: len(list(begun.iterdir())) == 5, "the begin of all")
        [tracer], children = worker.tracers(), pids(worker.children())
        tracer.kill()
        for result in [*lost, told]:
            with pytest.raises(WorkerLostError, match=rf"SIGKILL.*child tracers pid {tracer.pid}"):
                get(result)
        wait_for(lambda: runs.read_text().count("late") == 2, "the second run")
        wait_for(lambda: "told to end: revoked" in worker.log, "the end of what was cancelled")
        assert len(pids(worker.children()) & children) == 1, "the child that can cancel"
        gate.touch()
        assert get(late) == "again"
        # Nobody answers a job with what another one has left.
        replies = [["reply", {"result": number}] for number in range(20)]
        results = [project.send("do.it", reply) for reply in replies]
        assert [get(result) for result in results] == list(range(20))
        assert get(project.app.send_task("many.it", ["ok", "own"])) == "own"
        assert tracer.pid not in pids(worker.tracers())
    ends = Counter(task_id for task_id, _ in project.noted("failed"))
    assert ends == Counter(result.id for result in [*lost, told])
    assert Counter(runs.read_text().split()) == {"0": 1, "1": 1, "2": 1, "late": 2}


def test_an_exit_of_an_idle_tracer_costs_no_job(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, WATCHED)
    with project.worker(*POOL, "-c", "1") as worker:
        for number in range(3):
            assert get(project.send("do.it", ["reply", {"result": number}])) == number
            [tracer] = worker.tracers()
            tracer.kill()
            wait_for(lambda: pids(worker.tracers()) - {tracer.pid}, "the next one")  # noqa: B023
        assert get(project.send("do.it", OK)) == "done"
    assert project.noted("failed") == []


# -- stopped

QUIET = """
@app.task(base=SubprocTask, name="do.quiet", ignore_result=True)
def quiet(*args): ...
"""


def test_a_tracer_that_stands_still_holds_up_nothing_else(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, QUIET, size=2)
    with project.worker(*POOL, "-c", "4") as worker:
        [tracer] = worker.tracers()
        tracer.suspend()
        try:
            held = project.send("do.it", OK)
            pattern = rf"Child tracers#0 \(pid {tracer.pid}\) stands still: .*do\.it\[{held.id}\]"
            wait_for(lambda: re.search(pattern, worker.log), "the warning")
            inspect = project.app.control.inspect([project.node], timeout=20)
            assert list(inspect.ping()) == [project.node]
            [row] = project.rows("tracers")
            assert row["stands_still"] > 0
            assert row["task"]["id"] == held.id
            quiet = project.send("do.quiet", OK, ignore_result=True)
            wait_for(lambda: f"do.quiet[{quiet.id}] succeeded" in worker.log, "the fast path")
            assert not held.ready()
        finally:
            tracer.resume()
        assert get(held) == "done"
        wait_for(lambda: f"tracers#0 (pid {tracer.pid}) goes on, after" in worker.log, "its word")
        assert project.rows("tracers")[0]["stands_still"] is None
        assert pids(worker.tracers()) == {tracer.pid}


# -- hanging

HANGS = """
def hang(kwargs, where):
    if kwargs.get("hang") == where:
        note("hangs", os.getpid())
        while not os.path.exists(kwargs["gate"]):
            time.sleep(0.01)
class Hangs(SubprocTask):
    abstract = True
    def before_start(self, task_id, args, kwargs):
        hang(kwargs, "before_start")
    def on_success(self, retval, task_id, args, kwargs):
        hang(kwargs, "on_success")
@app.task(base=Hangs, name="do.hangs")
def hangs(*args, **kwargs): ...
"""


def test_a_limit_that_is_over_in_a_hook_ends_the_job_when_the_hook_ends(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, HANGS + QUIET)
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    with project.worker(*POOL, "-c", "2") as worker:
        tracers = pids(worker.tracers())
        job = [[["append", str(runs)], OK]], {"hang": "before_start", "gate": str(gate)}
        result = project.app.send_task("do.hangs", *job, time_limit=1)
        wait_for(lambda: project.noted("hangs"), "the hook")
        # The only child is kept for the job until its limit is over.
        quiet = project.send("do.quiet", OK, ignore_result=True)
        wait_for(lambda: f"do.quiet[{quiet.id}] succeeded" in worker.log, "the limit")
        wait_for(lambda: "stands still" in worker.log, "the warning")
        wait_for(lambda: re.search(r"File .*proj\.py.* in hang", worker.log), "where it hangs")
        assert not result.ready()
        gate.touch()
        with pytest.raises(TimeLimitExceeded):
            get(result)
        assert get(project.send("do.it", OK)) == "done"
        assert pids(worker.tracers()) == tracers
        assert worker.log.count(f"exceeded for do.hangs[{result.id}]") == 1
    assert [task_id for task_id, _ in project.noted("failed")] == [result.id]
    assert not runs.exists(), "the child did the job"


@pytest.mark.parametrize("how", ["lost", "over its limit"])
def test_celery_is_told_of_an_end_when_the_tracer_has_let_go(tmp_path: Path, how: str) -> None:
    project = TracedProject(tmp_path, WATCHED + HANGS, size=2)
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    steps: list[list[Any]] = [["touch", str(begun)], ["wait", str(tmp_path / "dies")]]
    # Were its result stored, the look at the result backend would wait for the tracer anyway.
    options = {"ignore_result": True, **({} if how == "lost" else {"time_limit": 2})}
    with project.worker(*POOL, "-c", "2") as worker:
        result = project.send("do.it", *steps, ["signal", signal.SIGKILL], **options)
        wait_for(begun.exists, "the job in its child")
        # The tracer reads nothing as long as this hook runs.
        busy = project.app.send_task(
            "do.hangs", [[OK]], {"hang": "before_start", "gate": str(gate)}
        )
        wait_for(lambda: project.noted("hangs"), "the hook")
        if how == "lost":
            (tmp_path / "dies").touch()
        wait_for(lambda: re.search(r"Child obeys#\d \(pid \d+\) ", worker.log), "its child's end")
        gate.touch()
        assert get(busy) == "done"
        wait_for(lambda: project.noted("failed"), "its end")
    names = [words[0] for words in project.noted() if words[1] == result.id]
    assert names == ["prerun", "postrun", "failed"]


@pytest.mark.parametrize("where", ["before_start", "on_success"])
def test_a_tracer_that_does_not_let_go_is_replaced(tmp_path: Path, where: str) -> None:
    project = TracedProject(tmp_path, HANGS, {"cancel_grace": 0.5}, size=2)
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with project.worker(*POOL, "-c", "3") as worker:
        [tracer] = worker.tracers()
        wait = ["touch", str(begun)], ["wait", str(gate)], OK
        neighbour = project.app.send_task("do.hangs", [[*wait]])
        wait_for(begun.exists, "the other job")
        job = [[OK]], {"hang": where, "gate": str(tmp_path / "never")}
        result = project.app.send_task("do.hangs", *job, time_limit=1)
        pattern = rf"Child tracers#0 \(pid {tracer.pid}\) is replaced: it went on with do\.hangs"
        wait_for(lambda: re.search(pattern, worker.log), "the next tracer")
        with pytest.raises(WorkerLostError):
            get(neighbour)
        wait_for(lambda: project.noted("failed", result.id), "its end")
        if where == "before_start":
            with pytest.raises(TimeLimitExceeded):
                get(result)
        assert get(project.send("do.it", OK)) == "done"
        assert worker.log.count(f"exceeded for do.hangs[{result.id}]") == 1
        assert pids(worker.tracers()) != {tracer.pid}
    ends = Counter(task_id for task_id, _ in project.noted("failed"))
    assert ends == {result.id: 1, neighbour.id: 1}


# -- replaced on purpose


def used(project: TracedProject) -> list[str]:
    """Return the tracers in the order of the jobs' ends."""
    return [pid for _, pid in project.noted("postrun")]


RESTARTS: list[tuple[str, dict[str, str]]] = [
    ("subproc_restart", {"group": "tracers"}),
    ("pool_restart", {}),
]


@pytest.mark.parametrize(("command", "arguments"), RESTARTS)
def test_a_restart_lets_traces_end(tmp_path: Path, command: str, arguments: dict[str, str]) -> None:
    project = TracedProject(tmp_path, WATCHED, size=2, worker_pool_restarts=True)
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with project.worker(*POOL, "-c", "2") as worker:
        [before] = worker.tracers()
        result = project.send("do.it", ["touch", str(begun)], ["wait", str(gate)], OK)
        wait_for(begun.exists, "the job")
        # Not by the command line: that of Celery 5.3 knows no commands of others.
        project.app.control.broadcast(command, arguments=arguments, destination=[project.node])
        log = rf"Child tracers#0 \(pid {before.pid}\) is recycled: the pool is restarted"
        wait_for(lambda: re.search(log, worker.log), "the restart")
        assert get(project.send("do.it", OK)) == "done"
        gate.touch()
        assert get(result) == "done"
        wait_for(lambda: before.pid not in pids(worker.tracers()), "the end of the old one")
        [after] = worker.tracers()
    assert used(project) == [str(after.pid), str(before.pid)]
    assert project.noted("failed") == []


def test_tracers_are_recycled(tmp_path: Path) -> None:
    project = TracedProject(tmp_path, WATCHED, {"max_jobs": 2, "recycle_jitter": 0})
    with project.worker(*POOL, "-c", "1"):
        for number in range(6):
            assert get(project.send("do.it", ["reply", {"result": number}])) == number
        wait_for(lambda: len(used(project)) == 6, "the last signal")
    assert sorted(Counter(used(project)).values()) == [2, 2, 2]
    assert project.noted("failed") == []


# -- it can't boot

BROKEN = """
if os.environ.get("BROKEN") and os.path.exists(os.environ["BROKEN"]):
    raise RuntimeError("no licence")
"""


def broken_project(directory: Path, **conf: Any) -> tuple[TracedProject, Path]:
    """Return a project whose tracers can't boot while a file is there, and the file."""
    broken = directory / "broken"
    broken.touch()
    return TracedProject(directory, BROKEN, {"env": {"BROKEN": str(broken)}}, **conf), broken


def test_if_tracers_are_needed_and_cannot_boot_the_worker_does_not_start(tmp_path: Path) -> None:
    project, _ = broken_project(tmp_path)
    done = project.run("worker", *POOL, "-c", "1")
    assert done.returncode != 0
    [line] = [line for line in done.stdout.splitlines() if "The pool can't start" in line]
    assert re.search(r"no child of the group tracers came up: .*RuntimeError: no licence", line)


def fails_to_boot(worker: Worker) -> Any:
    return re.search(r"Child tracers#0 .*is replaced: it can't boot: .*no licence", worker.log)


def test_on_demand_jobs_wait_until_a_tracer_can_boot(tmp_path: Path) -> None:
    project, broken = broken_project(tmp_path, task_ignore_result=True, size=2)
    error = ["reply", {"status": "error", "message": "boom"}]
    with project.worker(*POOL, "-c", "4") as worker:
        failed = project.send("do.it", error)
        wait_for(lambda: fails_to_boot(worker), "the tracer")
        quiet = project.send("do.it", OK, ignore_result=True)
        wait_for(lambda: f"do.it[{quiet.id}] succeeded" in worker.log, "the fast path")
        assert not project.noted("failed")
        broken.unlink()
        wait_for(lambda: project.noted("failed", failed.id), "the end")
        end = f"do.it[{failed.id}] raised unexpected: ChildTaskError('boom')"
        wait_for(lambda: end in worker.log, "the tracer's log")


def test_a_warm_stop_gives_up_jobs_that_no_tracer_can_end(tmp_path: Path) -> None:
    project, _ = broken_project(tmp_path, task_ignore_result=True)
    with project.worker(*POOL, "-c", "1") as worker:
        failed = project.send("do.it", ["reply", {"status": "error", "message": "boom"}])
        wait_for(lambda: fails_to_boot(worker), "the tracer")
        assert worker.stop() == 0
    assert [task_id for task_id, _ in project.noted("failed")] == [failed.id]
    assert "no child of the group tracers can start" in worker.log
