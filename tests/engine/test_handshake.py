"""Children with a handshake: what greetings mean, the scheduler's decisions, and real children."""

from __future__ import annotations

import json
import re
import signal
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_subproc_pool.core.actions import CloseStdin, Kill, Resolve, Write
from celery_subproc_pool.core.booting import EOF_GRACE
from celery_subproc_pool.core.model import Child, ChildState, Job, JobState
from celery_subproc_pool.core.outcomes import Answered, Faulted, Lost, TimedOut
from celery_subproc_pool.errors import ProtocolFault
from celery_subproc_pool.wire.messages import (
    Fatal,
    Ready,
    around_greeting,
    decode_greeting,
    decode_reply,
    encode,
)
from celery_subproc_pool.wire.python import (
    Boot,
    Raised,
    Returned,
    TaskMessage,
    TaskRequest,
    Traced,
    decode_boot,
    decode_request,
    decode_traced,
)
from tests.support.basics import sh_child
from tests.support.engine import Engine, answer
from tests.support.world import READ_ALL, World, kills, kind, new_child, reports

ECHO = 'while IFS= read -r line; do echo \'{"status":"ok"}\'; done'
READY = 'echo \'{"status":"ready","protocol":1}\''

# -- what a child says of its boot


@pytest.mark.parametrize(
    ("line", "greeting"),
    [
        (b'{"status":"ready","protocol":1}', Ready(protocol=1)),
        (
            b' {"status":"ready","protocol":1,"pid":7,"name":"x"}',
            Ready(protocol=1, pid=7, name="x"),
        ),
        (b'{"status":"fatal","message":"no db"}', Fatal(message="no db")),
        (b'{"status":"fatal"}', Fatal(message="no reason given")),
        (b"Loading...", None),
        (b"", None),
        (b"\xff\xfe", None),
        (b'["ready"]', None),
        (b'Loading {"status":"ready","protocol":1}', None),
        (b"\xef\xbb\xbfLoading", None),
    ],
)
def test_a_line_during_the_boot_is_a_greeting_or_output(
    line: bytes, greeting: Ready | Fatal | None
) -> None:
    assert decode_greeting(line) == greeting


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"status":"ok"}', "Invalid value 'ok'"),
        (b'{"status":"ready"}', "missing required field `protocol`"),
        (b'{"status":"ready","protocol":2}', "it speaks protocol 2, and this pool protocol 1"),
        (b'{"status":"ready","protocol":"1"}', "Expected `int`, got `str`"),
        (b"{broken", "JSON is malformed"),
        (b'{"\xff":1}', "can't decode byte"),
        (b'\xef\xbb\xbf{"status":"ready","protocol":1}', r"a byte order mark \(U\+FEFF\)"),
        ('\ufeff{"status":"ready"}'.encode("utf-16-le"), "the byte order mark of UTF-16"),
        ('\ufeff{"status":"ready"}'.encode("utf-16-be"), "the byte order mark of UTF-16"),
    ],
)
def test_a_wrong_greeting_is_a_fault_that_says_why(line: bytes, reason: str) -> None:
    with pytest.raises(ProtocolFault, match=reason):
        decode_greeting(line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"Loading...", None),
        (b"", None),
        (b'He said {"status":"fine"}', None),
        (
            b'Loading... {"status":"ready","protocol":1}',
            "b'Loading... ' stands before the greeting in its line"
            ' b\'Loading... {"status":"ready","protocol":1}\'',
        ),
        (
            '\u200b{"status": "ready"}'.encode(),
            "b'\\xe2\\x80\\x8b' stands before the greeting in its line"
            ' b\'\\xe2\\x80\\x8b{"status": "ready"}\'',
        ),
    ],
)
def test_what_stands_before_a_greeting_is_named(line: bytes, words: str | None) -> None:
    assert around_greeting(line) == words


def test_a_greeting_without_the_handshake_setting_names_the_setting() -> None:
    with pytest.raises(ProtocolFault, match="set handshake for its group"):
        decode_reply(b'{"status":"ready","protocol":1}')
    with pytest.raises(ProtocolFault, match="Invalid value 'ready'"):
        decode_reply(b'{"status":"ready"}')


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary() | st.text().map(str.encode) | st.text().map(lambda text: b"{" + text.encode()))
def test_any_line_is_decoded_or_a_protocol_fault(line: bytes) -> None:
    for decode in (decode_greeting, decode_traced):
        with suppress(ProtocolFault):
            decode(line)


@pytest.mark.parametrize(
    "message",
    [
        Traced(id="x", result="5", runtime=0.5),
        Traced(id="x", escaped=True, raised=Raised(type="ValueError", args=["a", 1])),
        Traced(id="x", raised=Raised(type="Retry", cause=Raised(type="KeyError"), when=3)),
        Returned(id="x", value={"a": [None]}),
        Returned(id="x", words="<object>"),
    ],
)
def test_traces_come_back_as_they_were(message: Traced | Returned) -> None:
    assert decode_traced(encode(message)[:-1]) == message


def test_what_a_python_child_reads_comes_back_as_it_was() -> None:
    boot = Boot(hostname="h", app="proj", recipes={"a": b"\x00\xff"}, tasks={"a": "proj"})
    assert decode_boot(encode(boot)) == boot
    request = TaskRequest(id="x", payload=TaskMessage(task="a", raw=b"\xff", request={"a": [1]}))
    assert decode_request(encode(request)) == request


# -- decisions

BOOTING = kind(2, handshake=True, start_timeout=60.0)


def jobs_without_tracer(world: World, *ids: str) -> list[Job]:
    jobs = []
    for task_id in ids:
        job = Job(task_id, "task", "a")
        job.request = b"request"
        world.tell(world.scheduler.submit, job)
        jobs.append(job)
    return jobs


def ready(world: World, child: Child, pid: int | None = None) -> list[object]:
    return list(world.tell(world.scheduler.ready, child, Ready(protocol=1), pid))


def test_a_job_waits_until_a_child_is_ready() -> None:
    world = World(a=BOOTING)
    first, second = world.children()
    assert first.state is second.state is ChildState.STARTING
    [job] = jobs_without_tracer(world, "x")
    assert job.state is JobState.QUEUED
    assert world.scheduler.booting
    assert Write(second, job) in ready(world, second, 4711)
    assert second.pid == 4711
    assert world.scheduler.booting
    ready(world, first)
    assert first.pid == 101
    assert not world.scheduler.booting
    assert world.scheduler.groups["a"].came_up


def test_the_reply_of_a_job_without_a_tracer_here_is_its_end() -> None:
    world = World(limit=1, a=BOOTING)
    child, _ = world.children()
    ready(world, child)
    job, after = jobs_without_tracer(world, "x", "y")
    reply = Traced(id="x", result="1")
    actions = world.tell(world.scheduler.replied, child, reply)
    assert actions[0] == Resolve(job, Answered(reply), child)
    assert Write(child, after) in actions
    assert job.state is JobState.CLOSED
    assert world.scheduler.open_jobs == 1


def test_a_fault_ends_a_job_without_a_tracer_here() -> None:
    world = World(a=BOOTING)
    child, _ = world.children()
    ready(world, child)
    [job] = jobs_without_tracer(world, "x")
    actions = world.tell(world.scheduler.faulted, child, "rubbish")
    assert actions[0] == Resolve(job, Faulted("rubbish"), child)
    assert world.idle()


def test_limits_after_a_handshake_are_not_deferred_for_the_boot() -> None:
    world = World(boot_slowly=True, a=BOOTING)
    child, _ = world.children()
    ready(world, child)
    job = Job("x", "task", "a", timeout=1.0)
    job.request = b"request"
    world.tell(world.scheduler.submit, job)
    assert kills(world.at(1.0)) == [signal.SIGKILL]


def test_a_child_that_is_not_ready_in_time_is_replaced() -> None:
    world = World(a=BOOTING)
    first, second = world.children()
    ready(world, second)
    actions = world.at(60.0)
    [report] = reports(actions)
    assert report.child is first
    assert report.reason.startswith(
        "it was not ready within 60 s (start_timeout): it did not write"
    )
    assert report.delay == pytest.approx(0.1)
    assert kills(actions) == [signal.SIGKILL]
    assert world.scheduler.booting, "its end may tell more"
    assert world.tell(world.scheduler.ready, first, Ready(protocol=1), None) == []
    assert world.tell(world.scheduler.boot_failed, first, "late") == []
    world.tell(world.scheduler.exited, first, -9, READ_ALL)
    assert not world.scheduler.booting, "the first attempt of each slot is over"


def test_a_child_that_says_why_it_cannot_boot() -> None:
    world = World(a=BOOTING)
    first, _ = world.children()
    actions = world.tell(world.scheduler.boot_failed, first, "no database\n  at line 7")
    [report] = reports(actions)
    assert report.reason == "it can't boot: no database"
    group = world.scheduler.groups["a"]
    assert group.failure == "no database\n  at line 7"
    assert not group.came_up


def test_a_booting_child_that_closes_its_stdout_has_a_grace_to_exit() -> None:
    world = World(a=BOOTING)
    first, second = world.children()
    for child in (first, second):
        assert world.tell(world.scheduler.stdout_closed, child) == []
    [report] = reports(world.tell(world.scheduler.exited, first, 7, READ_ALL))
    assert report.reason == "it exited: exitcode 7"
    [report] = reports(world.at(EOF_GRACE))
    assert (report.child, report.reason) == (second, "it closed its stdout")


def test_a_booting_child_is_stopped_like_any_other() -> None:
    world = World(a=BOOTING)
    first, second = world.children()
    actions = world.tell(world.scheduler.stop)
    assert actions == [CloseStdin(first), CloseStdin(second)]
    assert Kill(first, signal.SIGTERM) in world.at(10.0)


def test_a_replacement_boots_before_it_serves() -> None:
    world = World(a=kind(1, handshake=True))
    [child] = world.children()
    ready(world, child)
    [job] = jobs_without_tracer(world, "x")
    actions = world.tell(world.scheduler.exited, child, -9, READ_ALL)
    assert actions[0] == Resolve(job, Lost(-9, "", killed_by_others=True), child)
    [later] = jobs_without_tracer(world, "y")
    successor = new_child(world.at(1.0))
    assert later.state is JobState.QUEUED
    assert Write(successor, later) in ready(world, successor)


def test_a_reply_that_has_not_ended_within_the_grace_is_quoted() -> None:
    world = World(a=kind(1, handshake=True))
    [child] = world.children()
    world.tell(world.scheduler.ready, child, Ready(protocol=1, features=("cancel",)), None)
    job, _ = world.send(timeout=20.0)
    child.open_line = lambda: "b'{'"
    assert kills(world.at(20.0)) == []
    [report] = reports(world.at(25.0))
    assert report.reason.startswith(f"it went on with {job.title} for 5 s after it was told to")
    assert report.reason.endswith("; it has not ended its line with a newline: b'{'")


# -- real children


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            f"printf 'Loading... '; {READY}; echo done",
            r"b'Loading\.\.\. ' stands before the greeting in its line b'Loading.*ready",
        ),
        (
            'printf \'%s\' \'{"status":"ready","protocol":1}\'',
            r"it has not ended its line with a newline: b'.\"status\":\"ready\",\"protocol\":1.'",
        ),
        ("printf 'Loading...\\n'", r"it did not write ..status.:.ready."),
        ("printf '%100000d' 1", r"it .* newline: b' {200}'\.\.\. \(100000 bytes\)"),
    ],
)
def test_the_report_of_a_child_that_is_not_ready_in_time_quotes_what_came_closest(
    script: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    script = f"{script}; read -r line"
    with Engine(sh_child(script), handshake=True, start_timeout=0.5) as engine:
        engine.turn_until(lambda: "is replaced" in caplog.text, "the replacement")
    assert re.search(rf"not ready within 0\.5 s \(start_timeout\): {reason}", caplog.text)


def test_a_greeting_behind_a_byte_order_mark_is_a_fault_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = f"printf '\\357\\273\\277'; {READY}; read -r line"
    with Engine(sh_child(script), handshake=True) as engine:
        engine.turn_until(lambda: "is replaced" in caplog.text, "the replacement")
    assert "it begins with a byte order mark (U+FEFF): write UTF-8 without one" in caplog.text


@pytest.mark.parametrize("answered", [False, True], ids=["its first job", "a later job"])
def test_a_reply_that_does_not_end_is_quoted(
    answered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first = 'read -r line; echo \'{"status":"ok"}\'; ' if answered else ""
    script = f"{first}read -r line; printf '{{\"status\":'; read -r line"
    with Engine(sh_child(script), timeout=0.5) as engine:
        if answered:
            answer(engine.run())
        assert engine.run(task_id="second") == TimedOut(0.5)
    words = "(hard time limit); it has not ended its line with a newline: b'{\"status\":'"
    assert words in caplog.text
    assert "flush" not in caplog.text


def test_output_before_ready_is_logged_and_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "celery_subproc_pool")
    with Engine(sh_child(f"echo Loading...; {READY}; {ECHO}"), handshake=True) as engine:
        answer(engine.run())
        assert "Loading..." in caplog.text


def test_a_child_that_greets_wrongly_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    script = 'echo \'{"status":"ok"}\'; read -r line'
    with Engine(sh_child(script), handshake=True) as engine:
        engine.turn_until(lambda: "is replaced" in caplog.text, "the replacement")
    assert "Invalid value 'ok'" in caplog.text


def test_a_fatal_greeting_gives_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    fatal = json.dumps({"status": "fatal", "message": "no licence"})
    with Engine(sh_child(f"echo '{fatal}'; read -r line"), handshake=True) as engine:
        engine.turn_until(lambda: not engine.supervisor.scheduler.booting, "the end of the boot")
        assert engine.supervisor.scheduler.groups["default"].failure == "no licence"
    assert "it can't boot: no licence" in caplog.text


def test_a_pid_outside_of_the_childs_group_is_not_signalled() -> None:
    """In a container, a pid has another meaning: no foreign process may get the signal."""
    ready_as_init = 'echo \'{"status":"ready","protocol":1,"pid":1}\''
    slow = f"{ready_as_init}; trap '' USR1; read -r line; sleep 1; echo '{{\"status\":\"ok\"}}'"
    with Engine(sh_child(slow), handshake=True, soft_timeout_signal="SIGUSR1") as engine:
        job = engine.begin(soft_timeout=0.1)
        answer(engine.outcome_of(job))
        assert engine.soft == [(job, False)]
        [child] = engine.supervisor.scheduler.groups["default"].children.values()
        assert [child.pid] == engine.pids
