"""Celery's features on external children, in an embedded worker without an event loop.

The worker runs in a thread of this process on the filesystem transport, so the engine has a thread
of its own. The same features on the hub are tested with real workers on real brokers.
"""

from __future__ import annotations

import datetime
import decimal
import gc
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import celery
import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery, chain, chord, group, signals
from celery.exceptions import Ignore, MaxRetriesExceededError, NotRegistered, TaskRevokedError
from celery.worker.request import Request

from celery_subproc_pool import ChildTaskError, NotInWorkerError, ProtocolFault
from celery_subproc_pool.errors import SubprocPoolError
from celery_subproc_pool.worker.jobs import PoolJob
from tests.support.basics import DEADLINE, pool_processes, state_of, wait_for

pytestmark = pytest.mark.usefixtures("session_worker")


@pytest.fixture
def app(embedded_app: Celery) -> Celery:
    return embedded_app


def send(app: Celery, name: str, *steps: list[Any], **options: Any) -> Any:
    return app.send_task(name, [list(steps)] if steps else [], **options)


def get(result: Any) -> Any:
    return result.get(timeout=DEADLINE, interval=0.02)


# -- results


def test_ok_is_success_with_the_result(app: Celery) -> None:
    result = send(app, "do.it", ["reply", {"result": {"answer": 42}}])
    assert get(result) == {"answer": 42}
    assert result.state == "SUCCESS"


def test_ok_without_a_result_is_none(app: Celery) -> None:
    assert get(send(app, "do.it", ["reply", {}])) is None


def test_error_is_failure_with_the_childs_own_traceback(app: Celery) -> None:
    reply = {"status": "error", "message": "boom", "type": "Oops", "traceback": "worker.rb:17"}
    result = send(app, "do.it", ["reply", reply])
    with pytest.raises(ChildTaskError) as caught:
        get(result)
    assert str(caught.value) == caught.value.message == "Oops: boom"
    assert result.state == "FAILURE"
    assert "worker.rb:17" in result.traceback


def test_error_without_a_message_has_the_default_one(app: Celery) -> None:
    with pytest.raises(ChildTaskError, match="worker reported error"):
        get(send(app, "do.it", ["reply", {"status": "error"}]))


def test_reject_gives_the_message_back(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    rejects: list[tuple[str, bool]] = []
    reject = Request.reject

    def noted(request: Request, requeue: bool = False) -> None:
        reject(request, requeue)
        rejects.append((request.id, requeue))

    monkeypatch.setattr(Request, "reject", noted)
    result = send(app, "do.late", ["reply", {"status": "reject"}])
    wait_for(lambda: rejects, "the reject")
    assert rejects == [(result.id, False)]
    # Since Celery 5.7, a reject without requeue is a FAILURE; before, nothing is stored.
    assert result.state == ("FAILURE" if celery.VERSION >= (5, 7) else "PENDING")


def test_reject_with_requeue_is_delivered_again(app: Celery, tmp_path: Path) -> None:
    result = send(app, "do.late", ["requeue", str(tmp_path / "rejected")])
    assert get(result) == "delivered again"


def test_ignore_stores_nothing(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Any] = []
    on_failure = Request.on_failure

    def noted(request: Request, einfo: Any, **options: Any) -> None:
        on_failure(request, einfo, **options)
        ended.append((request.id, type(einfo.exception)))

    monkeypatch.setattr(Request, "on_failure", noted)
    result = send(app, "do.it", ["reply", {"status": "ignore"}])
    wait_for(lambda: ended, "the task's end")
    assert ended == [(result.id, Ignore)]
    assert result.state == "PENDING"


# -- retries


class Attempts:
    """Plans what a child answers to the attempts of one task, by its payload."""

    def __init__(self) -> None:
        self.payloads: list[dict[str, Any]] = []

    def on_received(self, request: Request, **_: Any) -> None:
        sent = request.request_dict
        self.payloads.append(
            {"retries": sent["retries"], "throttles": sent.get("subproc_throttles", 0)}
        )


@pytest.fixture
def attempts() -> Any:
    plan = Attempts()
    signals.task_received.connect(plan.on_received, weak=False)
    yield plan
    signals.task_received.disconnect(plan.on_received)


def test_throttled_is_retried_after_the_seconds_and_is_no_failure(
    app: Celery, attempts: Attempts
) -> None:
    # Throttles for as long as the payload counts less than two of them.
    result = send(app, "do.it", ["throttle", 2, 0.01])
    assert get(result) == {"throttles": 2, "retries": 0}
    assert attempts.payloads == [{"retries": 0, "throttles": count} for count in range(3)]


def test_throttled_without_seconds_waits_sixty(app: Celery) -> None:
    etas: list[datetime.datetime] = []

    def on_received(request: Request, **_: Any) -> None:
        if request.request_dict["eta"]:
            etas.append(datetime.datetime.fromisoformat(request.request_dict["eta"]))

    signals.task_received.connect(on_received, weak=False)
    try:
        before = datetime.datetime.now(datetime.timezone.utc)
        result = send(app, "do.it", ["reply", {"status": "throttled"}])
        wait_for(lambda: etas, "the retry")
        after = datetime.datetime.now(datetime.timezone.utc)
    finally:
        signals.task_received.disconnect(on_received)
    minute = datetime.timedelta(seconds=60)
    assert before + minute <= etas[0] <= after + minute
    wait_for(lambda: state_of(result) == "RETRY", "the state RETRY")
    result.revoke()


def test_after_ten_throttles_all_three_retries_are_left(app: Celery, attempts: Attempts) -> None:
    result = send(app, "do.thrice", ["throttle", 10, 0], ["retry"])
    with pytest.raises(ChildTaskError, match="try again"):
        get(result)
    throttled = [{"retries": 0, "throttles": count} for count in range(11)]
    retried = [{"retries": count, "throttles": 10} for count in range(1, 4)]
    assert attempts.payloads == throttled + retried


def test_throttle_max_retries_bounds_throttles(app: Celery) -> None:
    with pytest.raises(MaxRetriesExceededError, match=r"throttled 3 times.*throttle_max_retries"):
        # Not at once: the third one's failure must not be stored before the second one's retry.
        get(send(app, "capped.it", ["throttle", 10, 0.2]))


def test_retry_counts_against_max_retries(app: Celery, attempts: Attempts) -> None:
    with pytest.raises(ChildTaskError, match="again"):
        get(send(app, "do.thrice", ["reply", {"status": "retry", "message": "again"}]))
    assert [attempt["retries"] for attempt in attempts.payloads] == [0, 1, 2, 3]


def test_autoretry_for_retries_errors(app: Celery, attempts: Attempts) -> None:
    with pytest.raises(ChildTaskError, match="boom"):
        get(send(app, "do.autoretry", ["reply", {"status": "error", "message": "boom"}]))
    assert len(attempts.payloads) == 3


# -- the payload


def test_the_payload_is_what_the_protocol_says(app: Celery) -> None:
    result = app.send_task(
        "do.it",
        [[["payload"]], 17],
        {"currency": "EUR"},
        headers={"tenant": "acme"},
        time_limit=50,
        soft_time_limit=40,
    )
    assert get(result) == {
        "task": "do.it",
        "args": [[["payload"]], 17],
        "kwargs": {"currency": "EUR"},
        "retries": 0,
        "throttles": 0,
        "root_id": result.id,
        "parent_id": None,
        "group": None,
        "queue": "celery",
        "redelivered": False,
        "eta": None,
        "expires": None,
        "timelimit": [50, 40],
        "headers": {"tenant": "acme"},
    }


def test_values_that_json_lacks_are_written_plainly(app: Celery) -> None:
    values = {
        "when": datetime.datetime(2026, 11, 23, 12, 0, tzinfo=datetime.timezone.utc),
        "day": datetime.date(2026, 11, 23),
        "price": decimal.Decimal("1.10"),
        "key": uuid.UUID(int=5),
        "raw": b"\xff\x00",
        "set": {1},
        "pair": (1, 2),
    }
    result = app.send_task("do.it", [[["payload"]]], values, serializer="pickle")
    assert get(result)["kwargs"] == {
        "when": "2026-11-23T12:00:00Z",
        "day": "2026-11-23",
        "price": "1.10",
        "key": "00000000-0000-0000-0000-000000000005",
        "raw": "/wA=",
        "set": [1],
        "pair": [1, 2],
    }


def test_what_cannot_be_written_fails_the_job_and_names_the_argument(app: Celery) -> None:
    before = get(send(app, "one.it", ["facts"]))["pid"]
    result = app.send_task("one.it", [1], {"bad": complex(1, 2)}, serializer="pickle")
    with pytest.raises(Exception, match=r"kwargs\['bad'\] can't be sent to the child as JSON"):
        get(result)
    assert get(send(app, "one.it", ["facts"]))["pid"] == before


# -- faults reach Celery


def test_rubbish_is_a_protocol_fault_that_quotes_it(app: Celery) -> None:
    result = send(app, "do.it", ["stderr", "debug words"], ["write", "<html>"])
    with pytest.raises(ProtocolFault) as caught:
        get(result)
    message = str(caught.value)
    assert "b'<html>'" in message
    assert "child obeys pid " in message
    assert "stdout is reserved for the protocol" in message
    assert "Last stderr lines: debug words" in message


def test_a_lost_child_is_a_worker_lost_error(app: Celery) -> None:
    with pytest.raises(WorkerLostError, match=r"Worker exited prematurely: exitcode 5"):
        get(send(app, "do.it", ["exit", 5]))
    with pytest.raises(WorkerLostError, match=r"signal 11 \(SIGSEGV\)"):
        get(send(app, "do.it", ["signal", 11]))


def test_the_hard_limit_is_stored_logged_and_told_once(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[str] = []

    def on_failure(task_id: str, **_: Any) -> None:
        failures.append(task_id)

    signals.task_failure.connect(on_failure, weak=False)
    try:
        result = send(app, "do.it", ["wait", "/nowhere"], time_limit=0.3)
        with pytest.raises(TimeLimitExceeded):
            get(result)
        assert get(send(app, "do.it")) == []
    finally:
        signals.task_failure.disconnect(on_failure)
    assert failures == [result.id]
    assert f"Hard time limit (0.3s) exceeded for do.it[{result.id}]" in caplog.text


def test_a_soft_limit_that_cannot_be_told_is_said_once(
    app: Celery, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for number in range(2):
        gate = tmp_path / str(number)
        result = send(app, "one.it", ["wait", str(gate)], ["reply", {}], soft_time_limit=0.1)
        wait_for(lambda: caplog.text.count("Soft time limit (0.1s)") > number, "the soft limit")  # noqa: B023
        gate.touch()
        assert get(result) is None
    assert caplog.text.count("soft_timeout_signal") == 1


def test_revoke_with_terminate_ends_the_job_and_its_child(app: Celery) -> None:
    before = get(send(app, "one.it", ["facts"]))["pid"]
    result = send(app, "one.it", ["wait", "/nowhere"])
    wait_for(lambda: running(result.id), "the job's begin")
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        get(result)
    assert get(send(app, "one.it", ["facts"]))["pid"] != before


def test_a_revoked_job_is_announced_once(app: Celery) -> None:
    announced: list[str] = []

    def on_revoked(request: Any, **_: Any) -> None:
        announced.append(request.id)

    signals.task_revoked.connect(on_revoked, weak=False)
    try:
        result = send(app, "one.it", ["wait", "/nowhere"])
        wait_for(lambda: running(result.id), "the job's begin")
        result.revoke(terminate=True)
        with pytest.raises(TaskRevokedError):
            get(result)
        assert get(send(app, "one.it")) == []
    finally:
        signals.task_revoked.disconnect(on_revoked)
    assert announced == [result.id]


def test_asking_the_child_twice_for_one_job_is_an_error_and_no_hang(app: Celery) -> None:
    with pytest.raises(SubprocPoolError, match="has asked its child already"):
        get(app.tasks["do.twice"].delay())


def running(task_id: str) -> bool:
    from celery.worker import state

    return any(request.id == task_id for request in state.active_requests)


def test_nothing_keeps_a_finished_job_alive(app: Celery) -> None:
    get(send(app, "do.it"))

    def alive() -> list[PoolJob]:
        gc.collect()
        return [thing for thing in gc.get_objects() if isinstance(thing, PoolJob)]

    wait_for(lambda: not alive(), "the end of all jobs")


# -- tasks


def test_the_body_of_a_stub_never_runs_and_its_child_is_the_named_one(app: Celery) -> None:
    stub = app.tasks["do.stub"].delay([["facts"]])
    single = send(app, "one.it", ["facts"])
    assert get(stub)["pid"] == get(single)["pid"]


def test_a_pattern_takes_an_ordinary_task(app: Celery) -> None:
    assert get(app.tasks["do.ordinary"].delay(1, 2)) == [1, 2]


def test_names_listed_exactly_are_registered(app: Celery) -> None:
    assert {"do.it", "one.it", "capped.it"} <= set(app.tasks)


def test_a_task_that_no_group_takes_runs_in_a_python_child(app: Celery) -> None:
    children = set(python_pids())
    facts = get(app.tasks["plain.task"].delay(fail=True))
    assert facts["pid"] in children
    assert facts["retries"] == 1
    assert get(app.tasks["plain.class"].delay()) in children


def test_a_task_that_no_python_child_can_know_fails_and_says_so(app: Celery) -> None:
    with pytest.raises(NotRegistered, match=r"plain\.closure: .*Define it in a module"):
        get(app.tasks["plain.closure"].delay())


def test_celerys_own_tasks_run_too(app: Celery) -> None:
    assert get(app.tasks["celery.ping"].delay()) == "pong"


def python_pids() -> list[int]:
    """Return the pids of the Python children."""
    return [
        process.pid
        for process in pool_processes()
        if "celery_subproc_pool.python_child.main" in process.cmdline()
    ]


@pytest.mark.parametrize("call", ["direct", "eager"])
@pytest.mark.parametrize("name", ["do.stub", "do.it"])
def test_a_direct_or_eager_call_says_where_the_task_can_run(
    app: Celery, name: str, call: str
) -> None:
    task = app.tasks[name]
    with pytest.raises(NotInWorkerError, match=r"external child.*In tests"):
        task(1) if call == "direct" else task.apply((1,), throw=True)


def test_a_direct_call_of_an_ordinary_task_runs_its_body(app: Celery) -> None:
    assert app.tasks["do.ordinary"](1) == "the body ran"


def test_ignored_results_are_not_stored(app: Celery) -> None:
    result = app.tasks["do.ignored"].delay()
    get(send(app, "do.it"))
    assert result.state == "PENDING"


def test_started_has_the_pid_of_the_child(app: Celery, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    result = app.tasks["do.started"].delay([["wait", str(gate)], ["facts"]])
    info = wait_for(lambda: result.state == "STARTED" and result.info, "the state STARTED")
    wait_for(lambda: result.info["pid"] != os.getpid(), "the child's pid")
    info = result.info
    gate.touch()
    assert info["pid"] == get(result)["pid"]


# -- canvas


def test_chain(app: Celery) -> None:
    it = app.tasks["do.it"]
    assert get(chain(it.s("a"), it.s("b"))()) == [["a"], "b"]


def test_group(app: Celery) -> None:
    it = app.tasks["do.it"]
    assert get(group(it.s(n) for n in range(5))()) == [[n] for n in range(5)]


def test_chord(app: Celery) -> None:
    it = app.tasks["do.it"]
    body = it.s("body")
    assert get(chord([it.s(1), it.s(2)])(body)) == [[[1], [2]], "body"]


def test_link_and_link_error(app: Celery, tmp_path: Path) -> None:
    linked, failed = tmp_path / "linked", tmp_path / "failed"
    it = app.tasks["do.it"]
    it.apply_async(link=it.si([["touch", str(linked)], ["reply", {}]]))
    it.apply_async(
        ([["reply", {"status": "error"}]],),
        link_error=it.si([["touch", str(failed)], ["reply", {}]]),
    )
    wait_for(linked.exists, "the callback")
    wait_for(failed.exists, "the errback")


def test_countdown_and_expiry(app: Celery) -> None:
    assert get(send(app, "do.it", ["reply", {"result": 1}], countdown=0.2)) == 1
    late = send(app, "do.it", countdown=0.5, expires=0.1)
    with pytest.raises(TaskRevokedError):
        get(late)


# -- names


def test_child_logs_carry_the_task(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "celery_subproc_pool.child.obeys"):
        result = send(app, "do.it", ["stderr", "hello"], ["wait", "/dev/null"], ["reply", {}])
        get(result)
        wait_for(lambda: "hello" in caplog.text, "the line in the log")
    assert any(record.name == "celery_subproc_pool.child.obeys" for record in caplog.records)
