"""Features that a child may announce: multiplex, progress, log and cancel.

With the real engine and a real child on asyncio (`children/many.py`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from celery_subproc_pool.core import actions, model, outcomes
from celery_subproc_pool.core.scheduler import Scheduler
from celery_subproc_pool.settings import ChildSettings
from celery_subproc_pool.wire import messages
from celery_subproc_pool.wire.json_lines import encode
from celery_subproc_pool.wire.messages import CancelReason
from celery_subproc_pool.worker.events import complaints
from tests.support.basics import CHILDREN
from tests.support.engine import Engine, answer

ALL = ("progress", "log", "cancel", "multiplex")


def many(features: tuple[str, ...] = ALL, **ready: Any) -> list[str]:
    """Return the command of a child that announces `features`."""
    says = json.dumps({"features": features, **ready})
    return [sys.executable, "-I", "-S", str(CHILDREN / "many.py"), says]


def engine(
    features: tuple[str, ...] = ALL,
    most: int = 10,
    ready: dict[str, Any] | None = None,
    **more: Any,
) -> Engine:
    command = many(features, **(ready or {}))
    return Engine(command, limit=20, handshake=True, max_in_flight=most, **more)


def started(running: Engine) -> model.Child:
    """Return its only child, once that is ready."""
    [group] = running.supervisor.scheduler.groups.values()

    def child() -> model.Child | None:
        return next((each for each in group.children.values() if each.serves), None)

    found: model.Child = running.turn_until(child, "a child that is ready")
    return found


# -- many jobs


def test_jobs_of_one_child_are_answered_in_any_order(tmp_path: Path) -> None:
    with engine() as running:
        child = started(running)
        slow = [
            running.begin("answer_when", str(tmp_path / f"{number}"), task_id=f"{number}")
            for number in range(3)
        ]
        assert answer(running.run("ok", "first", task_id="quick")) == messages.Ok(
            id="quick", result="first"
        )
        assert (len(child.jobs), child.state) == (3, model.ChildState.BUSY)
        for number in (2, 0, 1):
            (tmp_path / f"{number}").touch()
            answer(running.outcome_of(slow[number]))
        assert child.state is model.ChildState.IDLE
        assert len(running.pids) == 1


def test_a_child_gets_no_more_than_both_sides_allow(tmp_path: Path) -> None:
    for most, own, both in ((3, 5, 3), (5, 3, 3), (3, None, 3)):
        ready = {} if own is None else {"max_in_flight": own}
        with engine(most=most, ready=ready) as running:
            child = started(running)
            jobs = [running.begin("hang", task_id=f"{number}") for number in range(5)]
            assert [job.state.value for job in jobs] == ["sent"] * both + ["queued"] * (5 - both)
            assert child.capacity == both


def test_a_child_that_does_not_multiplex_has_one_job_at_a_time() -> None:
    with engine(("cancel",)) as running:
        started(running)
        first, second = (running.begin("hang", task_id=name) for name in "ab")
        assert (first.state.value, second.state.value) == ("sent", "queued")


def test_children_share_the_jobs() -> None:
    with engine(size=2) as running:
        running.turn_until(
            lambda: running.supervisor.scheduler.groups["default"].in_service == 2, "both"
        )
        jobs = [running.begin("hang", task_id=f"{number}") for number in range(10)]
        children = [job.child for job in jobs]
        assert {children.count(child) for child in children} == {5}


def test_two_jobs_of_one_id_are_never_in_one_child(tmp_path: Path) -> None:
    """A message may be delivered again while its job goes on."""
    with engine() as running:
        started(running)
        first = running.begin("answer_when", str(tmp_path / "go"), task_id="x")
        again = running.begin("ok", "again", task_id="x")
        assert answer(running.run("ok", "other", task_id="y"))
        assert again.state is model.JobState.QUEUED
        (tmp_path / "go").touch()
        assert answer(running.outcome_of(first)) == messages.Ok(id="x", result="waited")
        assert answer(running.outcome_of(again)) == messages.Ok(id="x", result="again")


def test_when_a_child_ends_each_of_its_jobs_is_lost_once() -> None:
    with engine() as running:
        child = started(running)
        jobs = [running.begin("hang", task_id=f"{number}") for number in range(4)]
        jobs.append(running.begin("leave", 3, task_id="culprit"))
        ends = [running.outcome_of(job) for job in jobs]
        # Nobody can tell which of them has cost it: none is counted as poison.
        assert ends == [outcomes.Lost(3, "")] * 5
        [report] = [each for each in running.changes if isinstance(each, actions.Report)]
        assert report.jobs == tuple(jobs)
        assert answer(running.run("ok", 1)) == messages.Ok(id="job", result=1)
        assert child.state is model.ChildState.GONE


def test_requests_that_a_child_has_not_read_go_to_the_next_one() -> None:
    with engine(inactivity_timeout=60.0) as running:
        child = started(running)
        # It answers by progress alone, and so shows that it has read the request.
        read = running.begin("say_all", [{"id": "", "status": "progress"}], task_id="read")
        running.turn_until(lambda: running.progress, "that it reads the first")
        assert child.pid is not None
        os.killpg(child.pid, signal.SIGSTOP)
        unread = [running.begin("ok", number, task_id=f"{number}") for number in range(3)]
        os.killpg(child.pid, signal.SIGKILL)
        assert isinstance(running.outcome_of(read), outcomes.Lost)
        for number, job in enumerate(unread):
            assert answer(running.outcome_of(job)).result == number  # type: ignore[attr-defined]


def test_requests_for_which_there_was_no_room_in_the_pipe_go_to_the_next_one(
    tmp_path: Path,
) -> None:
    """The child closes its stdin before it has read them all."""
    script = """
import json, os, sys, time
said = {"status": "ready", "protocol": 1, "features": ["multiplex"]}
print(json.dumps(said), flush=True)
if os.path.exists(sys.argv[1]):
    for line in sys.stdin:
        print(json.dumps({"id": json.loads(line)["id"], "status": "ok"}), flush=True)
open(sys.argv[1], "w").close()
while not os.path.exists(sys.argv[1] + ".close"):
    time.sleep(0.01)
os.close(0)
time.sleep(60)
"""
    flag = tmp_path / "flag"
    command = [sys.executable, "-I", "-S", "-c", script, str(flag)]
    with Engine(command, limit=20, handshake=True, max_in_flight=20) as running:
        started(running)
        jobs = [running.begin("x" * 20_000, task_id=f"{number}") for number in range(10)]
        assert {job.state for job in jobs} == {model.JobState.SENT}
        (tmp_path / "flag.close").touch()
        for job in jobs:
            assert answer(running.outcome_of(job)).id == job.task_id


def test_a_worn_child_goes_when_nothing_is_in_flight(tmp_path: Path) -> None:
    with engine(max_jobs=3, recycle_jitter=0.0) as running:
        old = started(running)
        slow = running.begin("answer_when", str(tmp_path / "go"), task_id="slow")
        for number in range(2):
            answer(running.run("sleep", 0, task_id=f"{number}"))
        # It has had its three jobs: the next are its successor's, while it ends the first.
        reply = answer(running.run("sleep", 0, task_id="next"))
        assert isinstance(reply, messages.Ok)
        assert reply.result not in (old.pid, None)
        assert old.state is model.ChildState.BUSY
        (tmp_path / "go").touch()
        assert answer(running.outcome_of(slow)) == messages.Ok(id="slow", result="waited")
        running.turn_until(lambda: old.state is model.ChildState.GONE, "its end")
        assert not [each for each in running.changes if isinstance(each, actions.Report)]


# -- cancel


@pytest.mark.parametrize("reason", [CancelReason.REVOKED, CancelReason.SHUTDOWN])
def test_a_job_that_is_terminated_costs_its_child_nothing_if_it_answers(
    reason: CancelReason, tmp_path: Path
) -> None:
    with engine() as running:
        child = started(running)
        other = running.begin("answer_when", str(tmp_path / "go"), task_id="other")
        job = running.begin("wait_and_answer", "ok", task_id="job")
        running.supervisor.terminate(job, signal.SIGTERM, reason)
        # It is over whatever the child answers, which still holds it until it does.
        assert running.outcome_of(job) == outcomes.Terminated(signal.SIGTERM, reason)
        running.turn_until(lambda: "job" not in child.jobs, "its answer")
        (tmp_path / "go").touch()
        assert answer(running.outcome_of(other)).id == "other"
        assert child.state is model.ChildState.IDLE
        assert [type(change) for change in running.changes] == [actions.Started]


INTERRUPTED = """
import json, signal, sys
class Over(Exception): ...
def over(*_): raise Over
signal.signal(signal.SIGUSR1, over)
for line in sys.stdin:
    request = json.loads(line)
    try:
        open(request["payload"]["args"][0], "w").close()
        signal.pause()
    except Over:
        print(json.dumps({"id": request["id"], "status": "error"}), flush=True)
"""


def test_a_revoke_by_its_soft_signal_costs_a_child_nothing_if_it_answers(tmp_path: Path) -> None:
    """Checked twice in a row with the same child."""
    argv = [sys.executable, "-I", "-S", "-c", INTERRUPTED]
    with Engine(argv, soft_timeout_signal="SIGUSR1") as running:
        [pid] = running.pids
        for name in ("first", "second"):
            begun = tmp_path / name
            job = running.begin(str(begun), task_id=name)
            running.turn_until(begun.exists, "its begin")
            running.supervisor.terminate(job, signal.SIGUSR1, CancelReason.REVOKED)
            assert running.outcome_of(job) == outcomes.Terminated(signal.SIGUSR1)
            running.turn_until(lambda: running.overruled_jobs, "its answer")
            assert running.overruled_jobs.pop() is job
        assert running.pids == [pid]


def test_a_soft_limit_reaches_the_child_as_a_message() -> None:
    with engine() as running:
        started(running)
        job = running.begin("wait_and_answer", "error", task_id="job", soft_timeout=0.1)
        assert answer(running.outcome_of(job)) == messages.Error(
            id="job", message="soft_time_limit"
        )
        assert job.cancelled is CancelReason.SOFT_TIME_LIMIT
        assert running.soft == [(job, True)]


@pytest.mark.parametrize(
    ("limits", "settings", "reason"),
    [
        ({"timeout": 0.2}, {}, "time_limit"),
        ({}, {"inactivity_timeout": 0.2}, "time_limit"),
    ],
)
def test_a_hard_limit_spares_a_child_that_ends_the_job(
    limits: dict[str, float], settings: dict[str, float], reason: str
) -> None:
    with engine(**limits, **settings) as running:
        child = started(running)
        job = running.begin("wait_and_answer", "error", task_id="job")
        silent = bool(settings)
        assert running.outcome_of(job) == outcomes.TimedOut(0.2, silent)
        running.turn_until(lambda: not child.jobs, "its answer")
        assert child.serves
        assert job.cancelled is CancelReason(reason)


@pytest.mark.parametrize("how", ["terminated", "soft", "hard"])
def test_a_child_that_does_not_end_a_job_is_killed_after_its_grace(how: str) -> None:
    timeout = 0.2 if how == "hard" else 60.0
    with engine(cancel_grace=0.3, timeout=60.0) as running:
        child = started(running)
        other = running.begin("hang", task_id="other")
        running.timeout = timeout
        job = running.begin("hang", task_id="job", soft_timeout=0.2 if how == "soft" else None)
        if how == "terminated":
            running.supervisor.terminate(job, signal.SIGTERM, CancelReason.REVOKED)
        expected: dict[str, outcomes.Outcome] = {
            "terminated": outcomes.Terminated(signal.SIGTERM),
            "soft": outcomes.SoftTimedOut(0.2),
            "hard": outcomes.TimedOut(0.2),
        }
        assert running.outcome_of(job) == expected[how]
        lost = running.outcome_of(other)
        assert isinstance(lost, outcomes.Lost)
        assert "it went on with some.task[job] for 0.3 s after it was told to" in lost.reason
        assert child.state is model.ChildState.GONE
        assert answer(running.run("ok", 1)) == messages.Ok(id="job", result=1)


def test_a_child_with_other_jobs_is_given_time_even_if_it_cannot_cancel(tmp_path: Path) -> None:
    with engine(("multiplex",), cancel_grace=60.0) as running:
        child = started(running)
        other = running.begin("answer_when", str(tmp_path / "go"), task_id="other")
        job = running.begin("answer_when", str(tmp_path / "go"), task_id="job")
        running.supervisor.terminate(job, signal.SIGTERM, CancelReason.REVOKED)
        assert running.outcome_of(job) == outcomes.Terminated(signal.SIGTERM)
        (tmp_path / "go").touch()
        assert answer(running.outcome_of(other)) == messages.Ok(id="other", result="waited")
        running.turn_until(lambda: not child.jobs, "the answer that nobody wants any more")
        assert child.serves


def test_a_stop_lets_a_child_that_can_cancel_exit_by_itself() -> None:
    with engine(cancel_grace=60.0) as running:
        child = started(running)
        job = running.begin("wait_and_answer", "ok", task_id="job")
        running.supervisor.post(running.supervisor.scheduler.stop)
        # It ends by the end of its stdin, and not by a signal.
        assert running.outcome_of(job) == outcomes.Lost(0, "")
        assert not child.killed


# -- progress and log


def test_progress_reaches_the_owner_of_the_job_before_the_reply() -> None:
    with engine() as running:
        started(running)
        job = running.begin("tell", 3, 0.0, task_id="job")
        assert answer(running.outcome_of(job)) == messages.Ok(id="job", result=3)
        assert running.progress == [(job, {"done": number, "of": 3}) for number in (1, 2, 3)]


def test_progress_is_a_sign_of_life() -> None:
    with engine(inactivity_timeout=1.5) as running:
        child = started(running)
        silent = running.begin("hang", task_id="silent")
        job = running.begin("tell", 16, 0.15, task_id="job")
        assert running.outcome_of(silent) == outcomes.TimedOut(1.5, silent=True)
        assert answer(running.outcome_of(job)) == messages.Ok(id="job", result=16)
        assert child.serves


@pytest.mark.parametrize(
    ("level", "number"),
    [("debug", 10), ("info", 20), ("WARN", 30), ("error", 40), ("fatal", 50), ("loud", 20)],
)
@pytest.mark.parametrize("about", [False, True])
def test_a_log_record_keeps_its_level_and_names_its_job(
    level: str, number: int, about: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "celery_subproc_pool.child.default")
    with engine() as running:
        child = started(running)
        answer(running.run("log", level, "half\ndone", about, task_id="job"))
        [record] = [each for each in caplog.records if "done" in each.getMessage()]
        doing = " some.task[job]" if about else ""
        assert record.getMessage() == f"[default#0 pid {child.pid}{doing}] half\\ndone"
        assert (record.levelno, record.name) == (number, "celery_subproc_pool.child.default")
        assert getattr(record, "task_id", None) == ("job" if about else None)
        assert getattr(record, "task_name", None) == ("some.task" if about else None)


# -- what is against the protocol


@pytest.mark.parametrize(
    ("features", "job", "reason"),
    [
        (ALL, ["answer_as", ["nobody"]], "the reply's id is 'nobody', which is none of its 2 jobs"),
        (ALL, ["say_all", [{"status": "ok"}]], "a reply without an id, which a child with several"),
        (
            ALL,
            ["say_all", [{"id": "nobody", "status": "progress"}]],
            "the progress's id is 'nobody', which is none of its 2 jobs",
        ),
        (
            ("multiplex", "log"),
            ["say_all", [{"id": "", "status": "progress"}]],
            "it sent progress, a feature that it did not announce",
        ),
        (
            ("multiplex", "progress"),
            ["say_all", [{"status": "log", "message": "x"}]],
            "it sent log, a feature that it did not announce",
        ),
        (ALL, ["say_all", [{"id": "", "status": "progress", "meta": 3}]], "meta"),
        (ALL, ["say_all", [{"id": "", "status": "log", "level": 3}]], "level"),
    ],
)
def test_a_message_against_the_protocol_costs_the_jobs_of_that_child_alone(
    features: tuple[str, ...], job: list[Any], reason: str
) -> None:
    with engine(features, size=2) as running:
        group = running.supervisor.scheduler.groups["default"]
        running.turn_until(lambda: group.in_service == 2, "both")
        jobs = [running.begin("hang", task_id=name) for name in ("one", "other's")]
        culprit = running.begin(*job, task_id="culprit")
        ends = [running.outcome_of(each) for each in (jobs[0], culprit)]
        assert all(isinstance(each, outcomes.Faulted) for each in ends), ends
        assert ends[0] == ends[1]
        assert reason in getattr(ends[0], "reason", "")
        assert jobs[1].state is model.JobState.SENT
        assert answer(running.run("ok", 1)) == messages.Ok(id="job", result=1)


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (["answer_as", [None, None]], "a reply for culprit, which it had answered before"),
        (
            ["say_all", [{"id": "", "status": "ok"}, {"id": "", "status": "progress"}]],
            "a progress for culprit, which it had answered before",
        ),
    ],
)
def test_what_comes_after_the_end_of_a_job_is_a_fault(job: list[Any], reason: str) -> None:
    with engine() as running:
        started(running)
        other = running.begin("hang", task_id="other")
        culprit = running.begin(*job, task_id="culprit")
        assert answer(running.outcome_of(culprit)).id == "culprit"
        fault = running.outcome_of(other)
        assert isinstance(fault, outcomes.Faulted)
        assert reason in fault.reason


@pytest.mark.parametrize(
    ("ready", "reason"),
    [
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"max_in_flight": "many"}, "max_in_flight"),
        ({"tasks": [1]}, "tasks"),
        ({"tasks": [""]}, "tasks"),
        ({"tasks": "one"}, "tasks"),
        # They would stand in logs.
        ({"tasks": ["evil\n[2026-01-01: CRITICAL] forged"]}, "tasks"),
        ({"tasks": ["evil\x1b[2J"]}, "tasks"),
        ({"tasks": ["trailing\n"]}, "tasks"),
        ({"features": [{}]}, "features"),
        ({"protocol": 2}, "it speaks protocol 2"),
    ],
)
def test_an_invalid_greeting_is_a_fault(ready: dict[str, Any], reason: str) -> None:
    line = encode({"status": "ready", "protocol": 1, **ready}).strip()
    with pytest.raises(messages.ProtocolFault, match=reason):
        messages.decode_greeting(line)


def test_null_counts_as_a_missing_field() -> None:
    with engine() as running:
        started(running)
        said = [
            {"id": "", "status": "progress", "meta": None},
            {"id": None, "status": "log", "level": None, "message": None},
            {"id": "", "status": "ok"},
        ]
        job = running.begin("say_all", said, task_id="job")
        assert answer(running.outcome_of(job)) == messages.Ok(id="job")
        assert running.progress == [(job, {})]


def test_unknown_features_and_fields_of_a_greeting_are_ignored() -> None:
    line = b'{"status":"ready","protocol":1,"features":["telepathy","log"],"mood":"fine"}'
    greeting = messages.decode_greeting(line)
    assert isinstance(greeting, messages.Ready)
    assert greeting.known_features == {messages.Feature.LOG}


# -- what the log says of a greeting


@pytest.mark.parametrize(
    ("ready", "takes_tasks", "says"),
    [
        ({}, True, []),
        (
            {"features": ("multiplex", "progres")},
            True,
            [
                "announce features that this pool does not know: progres; it knows progress, log,"
                " cancel, multiplex"
            ],
        ),
        (
            {"features": ("multiplex",), "max_in_flight": 3},
            True,
            [
                "announce that they take 3 jobs at a time, though"
                " subproc_pool.children.a.max_in_flight is 9, and the number of children follows"
                " from that: set it to 3, or set a size"
            ],
        ),
        (
            {"features": ("cancel",)},
            True,
            [
                "take one job at a time, though subproc_pool.children.a.max_in_flight is 9: they do"
                " not announce 'multiplex' (their features: cancel)"
            ],
        ),
        (
            {},
            False,
            [
                "have no tasks: subproc_pool.children.a.tasks is empty, they announce none, and no"
                " task names the group as its child"
            ],
        ),
    ],
)
def test_the_log_warns_of_an_odd_greeting(
    ready: dict[str, Any], takes_tasks: bool, says: list[str]
) -> None:
    settings = ChildSettings(argv=("true",), handshake=True, max_in_flight=9)
    scheduler = Scheduler({"a": model.Group("a", settings, 1)}, 1)
    [spawn] = scheduler.start(0.0)
    assert isinstance(spawn, actions.Spawn)
    child = spawn.child
    greeting = messages.Ready(protocol=1, **{"features": ("multiplex",), **ready})
    scheduler.spawned(child, 7, 0.0)
    scheduler.ready(child, greeting, None, 0.0)
    assert list(complaints(child, takes_tasks)) == says
