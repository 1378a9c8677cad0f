"""The engine and real processes: streams, exits, signals, what a child inherits."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from celery_subproc_pool.core import model, outcomes
from celery_subproc_pool.errors import SpawnError
from celery_subproc_pool.wire import messages
from celery_subproc_pool.wire.messages import CancelReason
from tests.support.basics import guardians, sh_child, wait_for
from tests.support.engine import OBEYS, Engine, answer, exit_status


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def test_full_pipes_in_all_three_directions_do_not_deadlock() -> None:
    # Reads its request only while it writes its reply and its stderr: a pipe that nobody serves
    # would stop one of the three for ever.
    code = """
import sys, threading
def flood():
    for _ in range(200): sys.stderr.write("e" * 50000 + "\\n")
line = []
reader = threading.Thread(target=lambda: line.append(sys.stdin.readline()))
flooder = threading.Thread(target=flood)
flooder.start(); reader.start()
sys.stdout.write('{"status":"ok","result":"' + "r" * 10_000_000 + '"}\\n'); sys.stdout.flush()
reader.join(); flooder.join()
print(len(line[0]), file=sys.stderr, flush=True)
sys.stdin.read()
"""
    with Engine(python(code)) as engine:
        reply = answer(engine.run("q" * 10_000_000))
        assert isinstance(reply, messages.Ok)
        assert len(reply.result) == 10_000_000


def test_a_child_that_never_reads_its_stdin_does_not_block_the_engine() -> None:
    code = """
import sys, time
print('{"status":"ok"}', flush=True)
time.sleep(1000)
"""
    stuck = "import sys, time; sys.stdin.read(1); time.sleep(1000)"
    with Engine(python(stuck), timeout=0.3) as engine:
        assert engine.run("q" * 1_000_000) == outcomes.TimedOut(0.3)
    with Engine(python("import sys; sys.stdin.read(1);" + code.strip())) as engine:
        # It answered without having read the request to its end: the job is done.
        assert answer(engine.run("q" * 1_000_000)) == messages.Ok()


def test_an_exit_with_a_job_in_flight_loses_the_job_with_its_status_and_last_words() -> None:
    with Engine(OBEYS) as engine:
        job = engine.begin([["stderr", "no space left"], ["exit", 3]])
        assert exit_status(engine.outcome_of(job)) == 3
        facts = engine.facts[job]
        assert facts is not None
        assert facts.stderr == ("no space left",)


def test_a_signal_with_a_job_in_flight_loses_the_job() -> None:
    with Engine(OBEYS) as engine:
        outcome = engine.run([["signal", 9]])
        assert isinstance(outcome, outcomes.Lost)
        assert outcome.status == -signal.SIGKILL


def test_a_reply_that_was_written_before_the_exit_counts() -> None:
    with Engine(OBEYS) as engine:
        outcome = engine.run([["reply", {"result": "last"}], ["exit", 1]])
        assert answer(outcome) == messages.Ok(id="job", result="last")
        engine.turn_until(lambda: answer(engine.run()), "the next child")


def test_a_request_that_a_dying_child_never_read_goes_to_the_next_one(tmp_path: Path) -> None:
    dying = tmp_path / "dying"
    script = (
        f'if [ -e {dying} ]; then while read line; do echo \'{{"status":"ok"}}\'; done; fi;'
        f" touch {dying}; sleep 0.3; exit 1"
    )
    with Engine(sh_child(script)) as engine:
        wait_for(dying.exists, "the first child")
        # Written into the pipe of the first child, which exits without reading it.
        assert answer(engine.run()) == messages.Ok()


def test_half_a_reply_and_an_exit_is_a_lost_job() -> None:
    with Engine(OBEYS) as engine:
        assert exit_status(engine.run([["raw", '{"id":"job","sta'], ["exit", 0]])) == 0


def test_an_exit_is_seen_though_a_grandchild_holds_the_pipes() -> None:
    script = "sleep 1000 & read line; exit 7"
    with Engine(sh_child(script)) as engine:
        [child] = engine.pids
        grandchild = wait_for(lambda: psutil.Process(child).children(), "the grandchild")[0]
        assert exit_status(engine.run()) == 7
        wait_for(lambda: not grandchild.is_running(), "the grandchild's death")


def test_a_child_that_closes_its_stdout_and_stays_is_killed_and_its_job_lost() -> None:
    with Engine(sh_child("read line; exec >&-; exec sleep 1000")) as engine:
        outcome = engine.run()
        assert outcome == outcomes.Lost(-signal.SIGKILL, "it closed its stdout")


def test_an_idle_child_that_died_unseen_costs_no_job() -> None:
    with Engine(OBEYS, size=1) as engine:
        [child] = engine.pids
        psutil.Process(child).kill()
        wait_for(
            lambda: psutil.Process(child).status() == psutil.STATUS_ZOMBIE, "the child's death"
        )
        # The engine has not been turned since: it hands the job to the dead child first.
        job = engine.begin()
        assert answer(engine.outcome_of(job)) == messages.Ok(id="job", result=[])
        # It is accepted once, with the child that it was first meant for.
        assert engine.accepted_pids[job] == [child]


def test_output_without_a_request_costs_the_child_but_no_job() -> None:
    with Engine(OBEYS) as engine:
        [first] = engine.pids
        assert answer(engine.run([["raw", '{"status":"ok"}\noops\n']]))
        assert answer(engine.run(task_id="innocent")) == messages.Ok(id="innocent", result=[])
        assert engine.pids != [first]


def test_two_replies_without_an_id_do_not_answer_the_next_job() -> None:
    reply = '{"status":"ok","result":1}'
    twice = sh_child(f"while read line; do printf '%s\\n%s\\n' '{reply}' '{reply}'; done")
    with Engine(twice) as engine:
        for number in range(5):
            assert answer(engine.run(task_id=f"job-{number}")) == messages.Ok(result=1)


def test_a_line_longer_than_the_limit_is_a_fault() -> None:
    with Engine(OBEYS, max_message_bytes=2048) as engine:
        outcome = engine.run([["size", 5000]])
        assert isinstance(outcome, outcomes.Faulted)
        assert "longer than max_message_bytes (2048), which begins b'{" in outcome.reason


def test_children_inherit_three_descriptors_and_a_session_of_their_own() -> None:
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        with Engine(OBEYS, size=2) as engine:
            reply = answer(engine.run([["facts"]]))
    finally:
        os.close(leak)
    assert isinstance(reply, messages.Ok)
    # The fourth is the one with which the child lists the others.
    assert len(reply.result["descriptors"]) == 4
    assert reply.result["descriptors"][:3] == [0, 1, 2]
    assert reply.result["session"] == reply.result["pid"]


def test_a_clean_environment_has_the_path_and_what_is_configured() -> None:
    environ = {"PATH": os.environ["PATH"], "SECRET": "x"}
    with Engine(OBEYS, environ=environ, clean_env=True, env={"A": "1"}) as engine:
        reply = answer(engine.run([["facts"]]))
    assert isinstance(reply, messages.Ok)
    env = set(reply.result["env"]) - {"LC_CTYPE", "PWD", "SHLVL", "_"}
    assert env == {"PATH", "A", "CELERY_SUBPROC_POOL_WORKER", "CELERY_SUBPROC_POOL_SLOT"}


def test_stderr_is_logged_line_by_line_with_the_child_and_its_job(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO), Engine(OBEYS) as engine:
        [pid] = engine.pids
        engine.run([["stderr", "one\ntwo \x1b[31m"], ["reply", {}]])
        engine.turn_until(lambda: len(caplog.records) >= 2, "the log records")
    assert [record.name for record in caplog.records] == ["celery_subproc_pool.child.default"] * 2
    assert caplog.messages[0].startswith(f"[default#0 pid {pid}")
    assert caplog.messages[0].endswith("] one")
    assert caplog.messages[1].endswith("] two \\x1b[31m")


def test_stderr_null_is_not_read() -> None:
    with Engine(OBEYS, stderr="null") as engine:
        job = engine.begin([["stderr", "lost"], ["exit", 1]])
        engine.outcome_of(job)
        facts = engine.facts[job]
        assert facts is not None
        assert facts.stderr == ()


def test_the_log_says_why_a_child_was_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with Engine(OBEYS) as engine:
        [pid] = engine.pids
        engine.run([["stderr", "words"], ["write", "rubbish"], ["wait", "/nowhere"]])
    report = next(message for message in caplog.messages if "is replaced" in message)
    assert report.startswith(f"Child default#0 (pid {pid}) is replaced: JSON is malformed")
    assert "in the line b'rubbish'; its job was some.task[job]; the next one starts in" in report
    assert report.endswith("its last stderr lines: words")


def test_terminate_takes_in_a_reply_that_has_already_come(tmp_path: Path) -> None:
    answered = tmp_path / "answered"
    with Engine(OBEYS) as engine:
        job = engine.begin([["reply", {"result": "in time"}], ["touch", str(answered)]])
        assert job.state is model.JobState.SENT
        # The engine is not turned meanwhile.
        wait_for(answered.exists, "the reply")
        engine.supervisor.terminate(job, signal.SIGTERM, CancelReason.REVOKED)
        assert answer(engine.outcome_of(job)) == messages.Ok(id="job", result="in time")
        late = engine.begin([["wait", "/nowhere"]], task_id="late")
        assert late.state is model.JobState.SENT
        engine.supervisor.terminate(late, signal.SIGTERM, CancelReason.REVOKED)
        assert engine.outcome_of(late) == outcomes.Terminated(signal.SIGTERM)


def test_stopping_closes_stdin_then_terminates_then_kills() -> None:
    stubborn = sh_child("trap '' TERM; while :; do sleep 0.05; done")
    with Engine(stubborn, stop_timeout=0.2) as engine:
        [pid] = engine.pids
        process = psutil.Process(pid)
        engine.supervisor.post(engine.supervisor.scheduler.stop)
        engine.turn_until(lambda: not engine.pids, "the child's death")
        # It is reaped when what it has started has ended, too.
        engine.turn_until(lambda: not process.is_running(), "the end of what it has started")


def test_stopping_lets_a_child_finish_by_itself(tmp_path: Path) -> None:
    last_words = tmp_path / "bye"
    child = sh_child(f"while read line; do :; done; echo bye > {last_words}")
    with Engine(child) as engine:
        engine.supervisor.post(engine.supervisor.scheduler.stop)
        engine.turn_until(lambda: not engine.pids, "the child's exit")
    assert last_words.read_text() == "bye\n"


def test_a_soft_limit_is_signalled_to_a_child_that_understands_it() -> None:
    code = """
import signal, sys
def soft(*_): print('{"status":"error","message":"soft limit"}', flush=True)
signal.signal(signal.SIGUSR1, soft)
sys.stderr.write("ready\\n"); sys.stderr.flush()
while True: sys.stdin.readline(); signal.pause()
"""
    with Engine(python(code), soft_timeout_signal="SIGUSR1") as engine:
        job = engine.begin(soft_timeout=1.0)
        assert answer(engine.outcome_of(job)) == messages.Error(message="soft limit")
        assert engine.soft == [(job, True)]


def test_a_soft_limit_leaves_other_children_alone(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with Engine(OBEYS) as engine:
        job = engine.begin([["wait", str(gate)], ["reply", {}]], soft_timeout=0.1)
        engine.turn_until(lambda: engine.soft, "the soft limit")
        gate.touch()
        assert answer(engine.outcome_of(job)) == messages.Ok(id="job")
        assert engine.soft == [(job, False)]


def test_terminating_sends_the_signal_asked_for(tmp_path: Path) -> None:
    ready, heard = tmp_path / "ready", tmp_path / "heard"
    script = f"""
trap 'echo usr1 > {heard}; exit' USR1
read line
touch {ready}
while :; do sleep 0.05; done
"""
    with Engine(sh_child(script)) as engine:
        job = engine.begin()
        wait_for(ready.exists, "the job's begin")
        engine.supervisor.post(engine.supervisor.scheduler.terminate, job, signal.SIGUSR1)
        assert engine.outcome_of(job) == outcomes.Terminated(signal.SIGUSR1)
        wait_for(heard.exists, "the signal")


def test_a_program_that_the_system_refuses_fails_the_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere/at/all\n")
    broken.chmod(0o755)
    engine = Engine([str(broken)])
    with pytest.raises(SpawnError, match=r"can't start .*broken"):
        engine.supervisor.start()
    engine.supervisor.close()


def test_children_that_die_before_their_first_job_respawn_with_growing_delays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Engine(sh_child("exit 1")) as engine:
        engine.turn_until(
            lambda: sum("is replaced" in message for message in caplog.messages) >= 4,
            "four failed starts",
        )
    delays = [
        float(message.split("starts in ")[1].split(" s")[0])
        for message in caplog.messages
        if "starts in" in message
    ]
    assert delays == sorted(delays)
    assert delays[3] > 2 * delays[0]


def test_a_callback_that_raises_does_not_stop_the_engine(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(OBEYS) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "accepted", lambda *_: 1 / 0)
            assert answer(engine.run())
        assert answer(engine.run())
    assert any("callback" in message for message in caplog.messages)


def test_no_descriptor_leaks_when_children_are_replaced() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with Engine(OBEYS) as engine:
        engine.run()
        before = descriptors()
        for _ in range(5):
            engine.run([["reply", {}], ["exit", 0]])
            engine.turn_until(lambda: len(engine.pids) == 1, "the replacement")
            engine.run()
        assert descriptors() == before
        with_engine = descriptors()
    assert descriptors() < with_engine


def test_a_guardian_that_was_killed_is_replaced() -> None:
    before = {process.pid for process in guardians()}
    with Engine(OBEYS) as engine:
        [guardian] = [process for process in guardians() if process.pid not in before]
        guardian.kill()
        wait_for(lambda: guardian.status() == psutil.STATUS_ZOMBIE, "the guardian's death")
        [child] = engine.pids
        os.kill(child, signal.SIGKILL)
        engine.turn_until(lambda: engine.pids not in ([child], []), "the replacement")
        [second] = [
            process
            for process in guardians()
            if process.pid not in before and process.pid != guardian.pid
        ]
        assert second.is_running()
    wait_for(lambda: not second.is_running(), "the guardian's end")


def test_booting_does_not_count_against_the_first_jobs_limit() -> None:
    slow = sh_child('sleep 1; while read line; do echo \'{"status":"ok"}\'; done')
    with Engine(slow, timeout=0.3) as engine:
        before = engine.pids
        assert answer(engine.run()) == messages.Ok()
        assert engine.pids == before


def test_a_reply_before_the_limit_counts_when_the_engine_turns_late(tmp_path: Path) -> None:
    replied = tmp_path / "replied"
    with Engine(OBEYS, timeout=0.5) as engine:
        engine.run()
        job = engine.begin([["reply", {"result": 1}], ["touch", str(replied)]])
        wait_for(replied.exists, "the reply")
        # The worker's main thread was busy with something else until after the limit.
        wait_for(lambda: engine.supervisor.wait_time(60.0) == 0.0, "the limit")
        other = engine.begin(task_id="other")
        assert answer(engine.outcome_of(job)) == messages.Ok(id="job", result=1)
        assert answer(engine.outcome_of(other))


def test_a_stopped_guardian_does_not_hang_the_stop() -> None:
    before = {process.pid for process in guardians()}
    with Engine(OBEYS):
        [guardian] = [process for process in guardians() if process.pid not in before]
        guardian.suspend()
    assert not guardian.is_running()


def test_a_guardian_that_cannot_start_costs_no_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine(OBEYS) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/no/such/python")
            for guardian in guardians():
                guardian.kill()
            for _ in range(3):
                [child] = engine.pids
                engine.run([["exit", 1]])
                engine.turn_until(lambda old=child: engine.pids not in ([old], []), "a new child")
                assert answer(engine.run())
        assert "The guardian can't start" in caplog.text
        [child] = engine.pids
        engine.run([["exit", 1]])
        engine.turn_until(lambda: engine.pids not in ([child], []), "a new child")
        assert guardians()


def test_a_daemon_that_floods_the_dead_childs_stderr_does_not_hold_the_engine(
    tmp_path: Path,
) -> None:
    pid_file = tmp_path / "pid"
    daemon = f"echo $$ > {pid_file}; exec yes flood >&2"
    script = f"read line; setsid sh -c '{daemon}' & while [ ! -s {pid_file} ]; do :; done; exit 1"
    with Engine(sh_child(script)) as engine:
        try:
            assert exit_status(engine.run()) == 1
            engine.turn_until(lambda: len(engine.pids) == 1, "the next child")
        finally:
            os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_a_request_that_a_daemon_of_the_dead_child_may_read_is_lost_not_run_again(
    tmp_path: Path,
) -> None:
    pid_file, gate = tmp_path / "pid", tmp_path / "gate"
    daemon = f"echo $$ > {pid_file}; while [ ! -e {gate} ]; do sleep 0.01; done; read line"
    script = (
        f"exec 3<&0; setsid sh -c '{daemon}' <&3 &"
        f" while [ ! -s {pid_file} ] || [ ! -e {gate}.exit ]; do sleep 0.01; done; exit 1"
    )
    with Engine(sh_child(script)) as engine:
        job = engine.begin()
        wait_for(lambda: pid_file.exists() and pid_file.read_text(), "the daemon")
        (tmp_path / "gate.exit").touch()
        assert exit_status(engine.outcome_of(job)) == 1
        gate.touch()
