"""Children written for the forge_jobs worker pool work unchanged.

With the real engine and one child, without Celery. How outcomes reach Celery is tested elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from celery_subproc_pool import config
from celery_subproc_pool.core import outcomes
from celery_subproc_pool.errors import ConfigError
from celery_subproc_pool.wire import messages
from tests.support.basics import echoing, python_child, sh_child
from tests.support.engine import Engine, answer


def reply_to(argv: list[str], task_id: str = "job-1") -> outcomes.Outcome:
    with Engine(argv) as engine:
        return engine.run(task_id=task_id)


def test_ok_is_done() -> None:
    assert answer(reply_to(echoing('{"status":"ok"}'))) == messages.Ok()


def test_error_with_a_message_is_a_failure_with_it() -> None:
    outcome = reply_to(echoing('{"status":"error","message":"boom"}'))
    assert answer(outcome) == messages.Error(message="boom")


def test_error_without_a_message_is_a_failure() -> None:
    assert answer(reply_to(echoing('{"status":"error"}'))) == messages.Error(message=None)


def test_throttled_with_seconds_says_when() -> None:
    outcome = reply_to(echoing('{"status":"throttled","retry_after_secs":12}'))
    assert answer(outcome) == messages.Throttled(retry_after_secs=12.0)


def test_throttled_without_seconds_leaves_the_default() -> None:
    assert answer(reply_to(echoing('{"status":"throttled"}'))) == messages.Throttled()


def test_id_mismatch_fails_the_job_and_replaces_the_child() -> None:
    with Engine(echoing('{"id":"stale","status":"ok"}')) as engine:
        [first] = engine.pids
        outcome = engine.run(task_id="job-X")
        assert isinstance(outcome, outcomes.Faulted)
        assert "the reply's id is 'stale', the request's 'job-X'" in outcome.reason
        engine.turn_until(lambda: engine.pids not in ([first], []), "a new child")


def test_matching_id_is_accepted() -> None:
    outcome = reply_to(echoing('{"id":"job-Y","status":"ok"}'), task_id="job-Y")
    assert answer(outcome) == messages.Ok(id="job-Y")


def test_no_id_is_trusted() -> None:
    assert answer(reply_to(echoing('{"status":"ok","result":1}'))) == messages.Ok(result=1)


def test_a_garbage_line_fails_the_job_and_replaces_the_child() -> None:
    with Engine(echoing("not json")) as engine:
        [first] = engine.pids
        outcome = engine.run()
        assert isinstance(outcome, outcomes.Faulted)
        assert "b'not json'" in outcome.reason
        engine.turn_until(lambda: engine.pids not in ([first], []), "a new child")


def test_the_same_warm_child_serves_job_after_job() -> None:
    with Engine(python_child("obeys")) as engine:
        replies = [answer(engine.run([["facts"]], task_id=f"job-{n}")) for n in range(3)]
    results = [reply.result for reply in replies if isinstance(reply, messages.Ok)]
    assert [result["jobs"] for result in results] == [1, 2, 3]
    assert len({result["pid"] for result in results}) == 1


@pytest.mark.parametrize("argv", [[], "", "   "])
def test_empty_argv_is_rejected_at_start(argv: list[str] | str) -> None:
    with pytest.raises(ConfigError, match=r"subproc_pool\.argv: expected a program"):
        config.load({"argv": argv})


def test_children_are_spawned_eagerly() -> None:
    with Engine(echoing('{"status":"ok"}'), size=3) as engine:
        assert len(engine.pids) == 3


def test_a_child_that_died_is_replaced_in_the_background() -> None:
    with Engine(python_child("obeys")) as engine:
        [first] = engine.pids
        engine.run()
        os.kill(first, 9)
        engine.turn_until(lambda: engine.pids not in ([first], []), "a new child")
        assert answer(engine.run()) == messages.Ok(id="job", result=[])


def test_a_job_that_takes_too_long_times_out_and_its_child_is_killed() -> None:
    with Engine(sh_child("read line; exec sleep 1000"), timeout=0.2) as engine:
        [first] = engine.pids
        assert engine.run() == outcomes.TimedOut(0.2)
        engine.turn_until(lambda: first not in engine.pids, "the child's death")


def test_the_default_timeout_is_600_seconds() -> None:
    assert config.load({"argv": ["sh"]}).children["default"].timeout == 600.0


def test_env_and_cwd_are_the_configured_ones(tmp_path: Path) -> None:
    with Engine(python_child("obeys"), env={"FLAVOUR": "plum"}, cwd=str(tmp_path)) as engine:
        reply = answer(engine.run([["facts"]]))
    assert isinstance(reply, messages.Ok)
    assert reply.result["cwd"] == str(tmp_path)
    assert reply.result["env"]["FLAVOUR"] == "plum"


def test_cancelled_in_flight_kills_the_child() -> None:
    with Engine(sh_child("read line; exec sleep 1000")) as engine:
        [first] = engine.pids
        job = engine.begin()
        engine.supervisor.post(engine.supervisor.scheduler.terminate, job, 15)
        assert engine.outcome_of(job) == outcomes.Terminated(15)
        engine.turn_until(lambda: first not in engine.pids, "the child's death")
