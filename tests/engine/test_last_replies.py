"""A reply counts whenever it comes, also from a child that is about to exit: the scheduler's
decisions, and real processes."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest

from celery_subproc_pool.core import actions, model, outcomes
from celery_subproc_pool.core.actions import CloseStdin, Healed, Resolve, Write
from celery_subproc_pool.core.booting import EOF_GRACE
from celery_subproc_pool.core.model import Child, ChildState, Job, JobState
from celery_subproc_pool.core.outcomes import Answered, Lost, TimedOut
from celery_subproc_pool.wire import messages
from celery_subproc_pool.wire.messages import Error, Ok, Progress, Ready
from tests.support.basics import DEADLINE, wait_for
from tests.support.engine import Engine, answer, exit_status
from tests.support.worker import Project
from tests.support.world import (
    BOOT,
    READ_ALL,
    READ_NOTHING,
    STOP_TIMEOUT,
    World,
    ends,
    kills,
    kind,
    new_child,
    reports,
)

#: The bytes of one request in `World`, and of all that was written up to its end.
REQUEST = len(b"request")
READ_ONE = len(BOOT) + REQUEST

# -- decisions


def world_of_three(
    limit: int = 9, features: tuple[str, ...] = ("multiplex", "progress"), **settings: float
) -> tuple[World, Child, list[Job]]:
    """Return a world, its child, and the child's three jobs. Their requests come after `BOOT`."""
    world = World(limit, a=kind(1, handshake=True, max_in_flight=9, **settings))
    [child] = world.children()
    world.tell(world.scheduler.ready, child, Ready(protocol=1, features=features), None)
    world.at(1.0)
    jobs = [world.send(f"{number}", timeout=20.0)[0] for number in range(3)]
    for number, job in enumerate(jobs):
        job.offset = len(BOOT) + number * REQUEST
    return world, child, jobs


def reserve(world: World, task_id: str) -> Job:
    """Return a job that the child has, and whose request is about to be written."""
    job = Job(task_id, f"task.{task_id}", "a")
    job.request = b"request"
    world.note(world.scheduler.submit, job)
    world.scheduler.dispatch(world.now)
    return job


def test_a_child_that_takes_no_more_requests_drains() -> None:
    world, child, jobs = world_of_three()
    fourth = reserve(world, "fourth")
    assert fourth.child is child
    actions = world.note(world.scheduler.unwritten, child, "it closed its stdin", READ_ALL)
    [report] = reports(actions)
    assert report.jobs == (*jobs, fourth)
    assert ends(actions) == kills(actions) == []
    assert (child.state, child.draining) == (ChildState.BUSY, True)
    assert child not in world.scheduler.groups["a"].available
    # Another child has the fourth: as if it had never been written.
    assert fourth.state is JobState.QUEUED
    other = new_child(world.at(2.0))
    ready = world.tell(world.scheduler.ready, other, Ready(protocol=1), None)
    assert Write(other, fourth) in ready
    # What it says counts, and nothing ends it before its jobs.
    assert world.at(1.0 + STOP_TIMEOUT) == [Healed(world.scheduler.groups["a"])]
    assert world.tell(world.scheduler.progressed, child, Progress(id="0", meta={"a": 1}))
    for job in jobs:
        reply = Ok(id=job.task_id)
        actions = world.tell(world.scheduler.replied, child, reply)
        assert Resolve(job, Answered(reply), child) in actions
    assert actions[-1] == CloseStdin(child)
    assert (child.state, child.jobs, child.jobs_done) == (ChildState.STOPPING, {}, 3)
    assert reports(world.tell(world.scheduler.exited, child, 0, READ_ALL)) == []
    assert world.scheduler.groups["a"].counters.replaced == {model.Cause.EXITED: 1}


def test_limits_go_on_while_a_child_drains() -> None:
    world, child, jobs = world_of_three()
    world.note(world.scheduler.unwritten, child, "it closed its stdin", READ_ALL)
    assert ends(world.at(20.9)) == []
    # Of several, none dies for another.
    assert ends(world.at(21.0))[0] == Resolve(jobs[0], TimedOut(20.0), child)


def test_a_draining_child_that_exits_has_lost_what_it_has_not_answered() -> None:
    world, child, [first, second, third] = world_of_three(max_crashes=1)
    world.note(world.scheduler.unwritten, child, "it closed its stdin", READ_ALL)
    world.tell(world.scheduler.replied, child, Ok(id="1"))
    actions = world.tell(world.scheduler.exited, child, 3, READ_ALL)
    assert ends(actions) == [
        Resolve(job, Lost(3, "it closed its stdin"), child) for job in (first, third)
    ]
    assert second.state is JobState.CLOSED
    assert reports(actions) == []
    assert world.scheduler.groups["a"].counters.replaced == {model.Cause.EXITED: 1}


def test_the_one_job_that_a_draining_child_has_left_is_to_blame_for_its_end() -> None:
    world, child, jobs = world_of_three(max_crashes=1)
    world.note(world.scheduler.unwritten, child, "it closed its stdin", READ_ALL)
    for job in jobs[:2]:
        world.tell(world.scheduler.replied, child, Ok(id=job.task_id))
    [end] = ends(world.tell(world.scheduler.exited, child, 3, READ_ALL))
    assert end == Resolve(jobs[2], Lost(3, "it closed its stdin", crashes=1), child)


def test_requests_unread_when_a_child_closes_its_stdin_are_requeued_at_once() -> None:
    world, child, [first, second, third] = world_of_three()
    actions = world.note(world.scheduler.unwritten, child, "it closed its stdin", READ_ONE)
    assert ends(actions) == []
    assert [job.state for job in (first, second, third)] == [
        JobState.SENT,
        JobState.QUEUED,
        JobState.QUEUED,
    ]
    assert list(world.scheduler.groups["a"].waiting) == [second, third]
    assert child.draining
    assert child.stop_deadline is None


def test_a_child_that_has_read_nothing_has_nothing_to_drain() -> None:
    world, child, jobs = world_of_three()
    actions = world.note(world.scheduler.unwritten, child, "it closed its stdin", READ_NOTHING)
    assert ends(actions) == []
    assert {job.state for job in jobs} == {JobState.QUEUED}
    assert (child.state, child.draining) == (ChildState.STOPPING, False)


def test_half_a_request_is_not_waited_for_beyond_the_time_to_stop() -> None:
    world = World(a=kind())
    job, child = world.send()
    world.note(world.scheduler.unwritten, child, "it closed its stdin", READ_ONE - 1)
    assert child.draining
    assert kills(world.at(STOP_TIMEOUT)) == [signal.SIGTERM]
    reply = Error(message="half of it is missing")
    actions = world.tell(world.scheduler.replied, child, reply)
    assert Resolve(job, Answered(reply), child) in actions
    assert child.state is ChildState.STOPPING


def test_a_draining_child_that_breaks_the_protocol_is_killed_and_counted_once() -> None:
    world, child, jobs = world_of_three()
    world.note(world.scheduler.unwritten, child, "it closed its stdin", READ_ALL)
    actions = world.tell(world.scheduler.faulted, child, "not JSON")
    assert [end.job for end in ends(actions) if isinstance(end, Resolve)] == jobs
    assert kills(actions) == [signal.SIGKILL]
    assert (child.state, child.draining) == (ChildState.STOPPING, False)
    assert world.scheduler.groups["a"].counters.replaced == {model.Cause.EXITED: 1}


def test_a_draining_child_that_closes_its_stdout_can_answer_no_more() -> None:
    world, child, _ = world_of_three()
    world.note(world.scheduler.unwritten, child, "it closed its stdin", READ_ALL)
    world.tell(world.scheduler.stdout_closed, child)
    assert child.state is ChildState.STOPPING
    assert kills(world.at(1.0 + EOF_GRACE)) == [signal.SIGKILL]


def test_the_success_of_a_job_whose_child_is_killed_for_another_counts() -> None:
    world, child, [first, second, third] = world_of_three()
    world.tell(world.scheduler.terminate, first, signal.SIGTERM)
    grace = child.group.settings.cancel_grace
    assert kills(world.at(1.0 + grace)) == [signal.SIGKILL]
    assert child.state is ChildState.STOPPING
    # What came of the first is over, and its failure may be due to the kill.
    assert world.tell(world.scheduler.replied, child, Ok(id="0")) == []
    assert world.tell(world.scheduler.replied, child, Error(id="1")) == []
    assert world.tell(world.scheduler.replied, child, Ok(id="nobody's")) == []
    done = Ok(id="2", retire=True)
    assert world.tell(world.scheduler.replied, child, done) == [
        Resolve(third, Answered(done), child)
    ]
    assert world.tell(world.scheduler.replied, child, done) == []
    actions = world.tell(world.scheduler.exited, child, -9, READ_ALL)
    assert [end for end in ends(actions) if isinstance(end, Resolve)] == [
        Resolve(second, Lost(-9, child.reason), child)
    ]


# -- real processes

#: Reads the start of a request, answers and exits; a later child reads all of it.
HASTY = """
import os, sys, time
first = not os.path.exists(sys.argv[1])
open(sys.argv[1], "a").close()
if first:
    os.read(0, 30_000)
    os.write(1, b'{"status":"error","message":"too big"}\\n')
    HOW
for line in os.fdopen(0, "rb"):
    os.write(1, b'{"status":"ok","result":"run again"}\\n')
"""

#: Takes three jobs, then no more, and answers them when the gate is open.
DRAINING = """
import json, os, sys, time
first = not os.path.exists(sys.argv[1])
open(sys.argv[1], "a").close()
print('{"status":"ready","protocol":1,"features":["multiplex","progress"]}', flush=True)
requests = os.fdopen(0, "rb", buffering=0)
ids = []
for _ in range(3 if first else 99):
    line = requests.readline()
    if not line:
        break
    ids.append(json.loads(line)["id"])
    if not first:
        print(json.dumps({"id": ids[-1], "status": "ok", "result": "next"}), flush=True)
if first:
    requests.close()
    open(sys.argv[1] + ".closed", "a").close()
    while not os.path.exists(sys.argv[1] + ".gate"):
        time.sleep(0.005)
    for task_id in ids:
        print(json.dumps({"id": task_id, "status": "progress", "meta": {"n": 1}}), flush=True)
        print(json.dumps({"id": task_id, "status": "ok", "result": "drained"}), flush=True)
"""


def python(code: str, path: Path) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, str(path)]


def is_zombie(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("busy", [False, True], ids=["engine at once", "engine late"])
@pytest.mark.parametrize("how", ["os._exit(0)", "os.close(0); time.sleep(600)"])
def test_a_child_may_answer_before_it_has_read_all(how: str, busy: bool, tmp_path: Path) -> None:
    child = python(HASTY.replace("HOW", how), tmp_path / "first")
    for _ in range(4):
        (tmp_path / "first").unlink(missing_ok=True)
        with Engine(child, stop_timeout=0.2) as engine:
            [pid] = engine.pids
            job = engine.begin("q" * 1_000_000)
            assert job.state is model.JobState.SENT
            if busy and "exit" in how:
                # Somebody else has the thread for a while.
                wait_for(lambda pid=pid: is_zombie(pid), "the child's exit")
            assert answer(engine.outcome_of(job)) == messages.Error(message="too big")
            engine.turn_until(lambda pid=pid: engine.pids not in ([pid], []), "the next child")
            assert answer(engine.run()) == messages.Ok(result="run again")


def test_a_job_that_was_answered_is_not_run_again(tmp_path: Path) -> None:
    """Although `task_reject_on_worker_lost` has lost jobs run again."""
    children = {
        f"hasty{number}": {
            "argv": python(HASTY.replace("HOW", "os._exit(0)"), tmp_path / f"first{number}"),
            "tasks": [f"hasty{number}"],
            "size": 1,
        }
        for number in range(6)
    }
    conf = {
        "subproc_pool": {"children": children},
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
    }
    project = Project(tmp_path, conf=conf)
    with project.worker("-P", "celery_subproc_pool:Pool", "-c", "6"):
        jobs = [project.app.send_task(name, ("q" * 1_000_000,)) for name in children]
        for job in jobs:
            with pytest.raises(Exception, match="too big"):
                job.get(timeout=DEADLINE, interval=0.02)


def test_a_child_that_takes_no_more_requests_ends_those_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "first"
    with Engine(
        python(DRAINING, path), limit=9, handshake=True, max_in_flight=9, tasks=[]
    ) as engine:
        engine.turn_until(lambda: not engine.supervisor.scheduler.booting, "the child")
        [pid] = engine.pids
        jobs = [engine.begin(task_id=f"job-{number}") for number in range(3)]
        closed = Path(f"{path}.closed")
        engine.turn_until(closed.exists, "the end of its stdin")
        fourth = engine.begin(task_id="fourth")
        assert answer(engine.outcome_of(fourth)) == messages.Ok(id="fourth", result="next")
        assert pid in engine.pids
        assert not any(job in engine.outcomes for job in jobs)
        Path(f"{path}.gate").touch()
        for job in jobs:
            reply = answer(engine.outcome_of(job))
            assert reply == messages.Ok(id=job.task_id, result="drained")
        assert [job for job, _ in engine.progress] == jobs
        engine.turn_until(lambda: pid not in engine.pids, "its exit")
        assert [type(change) for change in engine.changes].count(actions.Report) == 1


def test_a_limit_holds_for_a_child_that_takes_no_more_requests(tmp_path: Path) -> None:
    path = tmp_path / "first"
    with Engine(
        python(DRAINING, path), limit=9, handshake=True, max_in_flight=9, timeout=1.0, tasks=[]
    ) as engine:
        engine.turn_until(lambda: not engine.supervisor.scheduler.booting, "the child")
        jobs = [engine.begin(task_id=f"job-{number}") for number in range(3)]
        engine.turn_until(Path(f"{path}.closed").exists, "the end of its stdin")
        fourth = engine.begin(task_id="fourth")
        assert answer(engine.outcome_of(fourth)) == messages.Ok(id="fourth", result="next")
        assert [engine.outcome_of(job) for job in jobs] == [outcomes.TimedOut(1.0)] * 3


def test_a_child_that_stops_reading_in_the_midst_of_a_request_is_not_waited_for_long(
    tmp_path: Path,
) -> None:
    code = "import os, time; os.read(0, 10); os.close(0); time.sleep(600)"
    with Engine(python(code, tmp_path), stop_timeout=0.2) as engine:
        outcome = engine.run("q" * 1_000_000)
        assert exit_status(outcome) == -15
        assert isinstance(outcome, outcomes.Lost)
        assert outcome.reason == "it closed its stdin"
