"""``celery_subproc_pool.serve`` in real processes, over their pipes.

The child programs import a copy of ``serve.py``, as users do on another interpreter than the
worker's. Set ``SERVE_PYTHON`` to test the file on such an interpreter.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEADLINE = 20.0
PYTHON = os.environ.get("SERVE_PYTHON", sys.executable)
SERVE = Path(__file__).parents[1] / "celery_subproc_pool" / "serve.py"
PREAMBLE = "from serve import serve, Throttled, Retry, Reject, Ignore\n"

Request = dict[str, Any]
Spawn = Callable[[str], "Child"]


class Child:
    """One child process, and the part of its output that is not read yet."""

    def __init__(self, program: Path) -> None:
        environment = dict(os.environ, PYTHONIOENCODING="utf-8")
        environment.pop("PYTHONUNBUFFERED", None)
        self.process = subprocess.Popen(
            [PYTHON, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.unread = b""

    def ask(self, request: Request) -> Any:
        """Send one request and return the reply, with stdin left open."""
        self.stdin.write(line(request))
        self.stdin.flush()
        return json.loads(self._read_line())

    def finish(self, *requests: Request | bytes) -> Ended:
        """Send the rest of the requests, close stdin, and wait for the end."""
        text = b"".join(r if isinstance(r, bytes) else line(r) for r in requests)
        out, err = self.process.communicate(text, timeout=DEADLINE)
        return Ended(self.process.returncode, out, err.decode("utf-8"))

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=DEADLINE)
        for stream in (self.stdin, self.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def _read_line(self) -> bytes:
        deadline = time.monotonic() + DEADLINE
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            while b"\n" not in self.unread:
                ready = selector.select(deadline - time.monotonic())
                assert ready, "no reply in time"
                chunk = os.read(self.stdout.fileno(), 65536)
                assert chunk, "stdout was closed"
                self.unread += chunk
        reply, _, self.unread = self.unread.partition(b"\n")
        return reply


class Ended:
    """A child that has ended: its status, its stdout as bytes, its stderr."""

    def __init__(self, status: int, stdout: bytes, stderr: str) -> None:
        self.status, self.stdout, self.stderr = status, stdout, stderr

    @property
    def replies(self) -> list[dict[str, Any]]:
        assert self.stdout == b"" or self.stdout.endswith(b"\n")
        return [json.loads(reply.decode("utf-8")) for reply in self.stdout.splitlines()]


def line(request: Request) -> bytes:
    return json.dumps(request, ensure_ascii=False).encode("utf-8") + b"\n"


def call(task: str, *args: Any, **kwargs: Any) -> Request:
    """Return a request as the pool sends it."""
    return {
        "id": "id-of-" + task,
        "payload": {"task": task, "args": list(args), "kwargs": kwargs, "retries": 0},
    }


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    children = []

    def start(source: str) -> Child:
        shutil.copy(str(SERVE), str(tmp_path / "serve.py"))
        program = tmp_path / "child.py"
        program.write_text("# -*- coding: utf-8 -*-\n" + PREAMBLE + source, encoding="utf-8")
        children.append(Child(program))
        return children[-1]

    yield start
    for child in children:
        child.kill()


def body(statements: str) -> str:
    """Return a child program that serves one task, ``work``, with these statements."""
    indented = "".join(f"    {statement}\n" for statement in statements.splitlines())
    return f"import os, sys, json\ndef work(*args, **kwargs):\n{indented}serve({{'work': work}})\n"


# -- requests and results


def test_calls_the_function_with_the_tasks_arguments(spawn: Spawn) -> None:
    child = spawn("serve({'add': lambda a, b=0: a + b, 'none': lambda: None})")
    assert child.ask(call("add", 1, b=2)) == {"id": "id-of-add", "status": "ok", "result": 3}
    assert child.ask(call("none")) == {"id": "id-of-none", "status": "ok"}
    assert child.finish().status == 0


def test_one_function_gets_the_whole_payload(spawn: Spawn) -> None:
    request = call("anything", 1, key="value")
    ended = spawn("serve(lambda payload: payload)").finish(request)
    assert ended.replies == [{"id": request["id"], "status": "ok", "result": request["payload"]}]


def test_a_payload_without_arguments_calls_without_arguments(spawn: Spawn) -> None:
    request = {"id": "1", "payload": {"task": "work", "args": None}}
    ended = spawn(body("return [list(args), kwargs]")).finish(request)
    assert ended.replies == [{"id": "1", "status": "ok", "result": [[], {}]}]


def test_answers_each_request_before_it_sees_the_next(spawn: Spawn) -> None:
    child = spawn("import os\nserve({'pid': os.getpid})")
    pids = {child.ask(call("pid"))["result"] for _ in range(50)}
    assert pids == {child.process.pid}


def test_answers_requests_that_came_together_in_order(spawn: Spawn) -> None:
    requests = [call("work", number) for number in range(100)]
    ended = spawn(body("return args[0]")).finish(*requests)
    assert [reply["result"] for reply in ended.replies] == list(range(100))


def test_five_megabytes_each_way(spawn: Spawn) -> None:
    text = "ü" * 2500000
    ended = spawn(body("return args[0][::-1]")).finish(call("work", text), call("work", "end"))
    assert [reply["result"] for reply in ended.replies] == [text, "dne"]


@pytest.mark.parametrize("text", ["Grüße, 世界", "🐝", "a\nb\r\n\u2028\x00", '"\\/', ""])
def test_text_survives(spawn: Spawn, text: str) -> None:
    request = dict(call("work", text), id="id " + text)
    ended = spawn(body("return args[0]")).finish(request)
    assert ended.replies == [{"id": "id " + text, "status": "ok", "result": text}]


def test_the_locale_does_not_matter(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    ended = spawn(body("return args[0] + 'ß'")).finish(call("work", "世"))
    assert ended.replies[0]["result"] == "世ß"


def test_escaped_text_is_read_too(spawn: Spawn) -> None:
    raw = b'{"payload":{"args":["\\ud83d\\udc1d"],"task":"work"},"new_field":1,"id":"\\u0031"}\n'
    ended = spawn(body("return args[0]")).finish(raw)
    assert ended.replies == [{"id": "1", "status": "ok", "result": "🐝"}]


# -- how a job may end


@pytest.mark.parametrize(
    ("statement", "reply"),
    [
        ("raise Throttled", {"status": "throttled"}),
        ("raise Throttled()", {"status": "throttled"}),
        ("raise Throttled(0.5)", {"status": "throttled", "retry_after_secs": 0.5}),
        ("raise Throttled(seconds=0)", {"status": "throttled", "retry_after_secs": 0}),
        ("raise Retry", {"status": "retry"}),
        ("raise Retry(3)", {"status": "retry", "countdown": 3}),
        (
            "raise Retry(countdown=3, message='busy')",
            {"status": "retry", "countdown": 3, "message": "busy"},
        ),
        ("raise Reject", {"status": "reject", "requeue": False}),
        ("raise Reject(requeue=True)", {"status": "reject", "requeue": True}),
        ("raise Ignore", {"status": "ignore"}),
        ("raise Ignore()", {"status": "ignore"}),
    ],
)
def test_outcomes(spawn: Spawn, statement: str, reply: Request) -> None:
    child = spawn(body("if args: return 'still here'\n" + statement))
    assert child.ask(call("work")) == dict(reply, id="id-of-work")
    assert child.ask(call("work", 1))["result"] == "still here"


@pytest.mark.parametrize(
    ("statement", "kind", "message"),
    [
        ("raise ValueError('no such customer')", "ValueError", "no such customer"),
        ("json.loads('x')", "json.decoder.JSONDecodeError", "Expecting value"),
        ("class Odd(Exception): pass\nraise Odd()", "work.<locals>.Odd", ""),
        ("raise GeneratorExit('stop')", "GeneratorExit", "stop"),
        ("raise ValueError('\\udc80')", "ValueError", "\\udc80"),
        ("raise Throttled(-1)", "ValueError", "seconds must be between 0 and 3153600000, not -1"),
        ("raise Throttled(1e99)", "ValueError", "seconds must be between 0 and 3153600000"),
        ("raise Retry(float('nan'))", "ValueError", "countdown must be between 0 and "),
        (
            "class Mute(Exception):\n    def __str__(self): return 1 / 0\nraise Mute()",
            "work.<locals>.Mute",
            "its message can't be shown: ZeroDivisionError",
        ),
        ("work.missing()", "AttributeError", "missing"),
    ],
)
def test_an_exception_is_an_error_reply(
    spawn: Spawn, statement: str, kind: str, message: str
) -> None:
    child = spawn(body("if args: return 'still here'\n" + statement))
    reply = child.ask(call("work"))
    assert (reply["id"], reply["status"], reply["type"]) == ("id-of-work", "error", kind)
    assert message in reply["message"]
    assert child.ask(call("work", 1))["result"] == "still here"


def test_a_traceback_shows_the_jobs_frames_only(spawn: Spawn) -> None:
    reply = spawn(body("return 1 / 0")).finish(call("work")).replies[0]
    assert reply["traceback"].startswith("Traceback (most recent call last):\n")
    assert "child.py" in reply["traceback"]
    assert "serve.py" not in reply["traceback"]
    assert reply["traceback"].endswith("ZeroDivisionError: division by zero\n")


def test_wrong_arguments_are_an_error_reply(spawn: Spawn) -> None:
    reply = spawn("serve({'add': lambda a, b: a + b})").finish(call("add", 1)).replies[0]
    assert (reply["status"], reply["type"]) == ("error", "TypeError")
    assert "serve.py" not in reply["traceback"]


def test_an_unknown_task_is_an_error_reply_that_says_what_is_served(spawn: Spawn) -> None:
    reply = spawn("serve({'b': print, 'a': print})").finish(call("c")).replies[0]
    assert reply["status"] == "error"
    assert reply["message"] == "no task 'c' here; this child serves a, b"


@pytest.mark.parametrize(
    ("result", "names"),
    [
        ("object()", "object"),
        ("{1, 2}", "set"),
        ("b'bytes'", "bytes"),
        ("float('nan')", "float"),
        ("[float('inf')]", "list"),
        ("{(1, 2): 3}", "dict"),
        ("'\\udc80'", "str"),
    ],
)
def test_a_result_that_json_cannot_hold(spawn: Spawn, result: str, names: str) -> None:
    child = spawn(body("if args: return 'still here'\nreturn " + result))
    reply = child.ask(call("work"))
    assert reply["status"] == "error"
    assert reply["message"].startswith(f"JSON can't hold the result, {names}: ")
    assert child.ask(call("work", 1))["result"] == "still here"


def test_a_result_that_holds_itself(spawn: Spawn) -> None:
    reply = spawn(body("loop = []\nloop.append(loop)\nreturn loop")).finish(call("work")).replies[0]
    assert reply["message"].startswith("JSON can't hold the result, list: ")


# -- the wire is protected


@pytest.mark.parametrize(
    "statement",
    [
        "print('stray')",
        "sys.stdout.write('stray')",
        "os.write(1, b'stray')",
        "os.system('echo stray')",
        "sys.__stdout__.write('stray')",
        "__import__('subprocess').check_call(['echo', 'stray'])",
        "print('stray', file=sys.stderr)",
    ],
)
def test_output_goes_to_stderr(spawn: Spawn, statement: str) -> None:
    ended = spawn(body(statement)).finish(call("work"), call("work"))
    assert [reply["status"] for reply in ended.replies] == ["ok", "ok"]
    assert ended.stderr.count("stray") == 2
    assert ended.status == 0


def test_what_a_job_printed_is_out_before_its_reply(spawn: Spawn) -> None:
    child = spawn(body("print('stray')"))
    child.ask(call("work"))
    assert child.process.stderr is not None
    os.set_blocking(child.process.stderr.fileno(), False)
    assert child.process.stderr.read() == b"stray\n"


def test_a_print_before_serve_does_not_break_the_wire(spawn: Spawn) -> None:
    ended = spawn("print('booting')\n" + body("return 1")).finish(call("work"))
    assert [reply["result"] for reply in ended.replies] == [1]
    assert "booting" in ended.stderr


@pytest.mark.parametrize("statement", ["return sys.stdin.read()", "return os.read(0, 10).decode()"])
def test_stdin_is_empty(spawn: Spawn, statement: str) -> None:
    ended = spawn(body(statement)).finish(call("work"), call("work"))
    assert [reply["result"] for reply in ended.replies] == ["", ""]


def test_input_raises_and_eats_no_request(spawn: Spawn) -> None:
    ended = spawn(body("input('name? ')")).finish(call("work"), call("work"))
    assert [reply["type"] for reply in ended.replies] == ["EOFError", "EOFError"]


def test_a_subprocess_gets_no_wire(spawn: Spawn) -> None:
    script = "import subprocess\nreturn subprocess.check_output(['ls', '/proc/self/fd']).decode()"
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    names = spawn(body(script)).finish(call("work")).replies[0]["result"].split()
    assert len(names) == 4  # 0, 1, 2 and the directory that ls reads


def test_streams_that_the_child_closed_do_not_matter(spawn: Spawn) -> None:
    ended = spawn(body("sys.stdout.close()\nsys.stderr = None")).finish(call("work"), call("work"))
    assert [reply["status"] for reply in ended.replies] == ["ok", "ok"]


# -- the end


def test_returns_at_the_end_of_stdin(spawn: Spawn) -> None:
    child = spawn(body("return 1") + "print('cleaning up')\nsys.exit(7)\n")
    child.ask(call("work"))
    ended = child.finish()
    assert (ended.status, ended.stdout, ended.stderr) == (7, b"", "cleaning up\n")


def test_no_request_at_all(spawn: Spawn) -> None:
    ended = spawn(body("return 1")).finish()
    assert (ended.status, ended.stdout, ended.stderr) == (0, b"", "")


def test_a_last_line_without_its_newline_is_answered(spawn: Spawn) -> None:
    ended = spawn(body("return 1")).finish(line(call("work")).rstrip(b"\n"))
    assert [reply["result"] for reply in ended.replies] == [1]


@pytest.mark.parametrize(
    ("statement", "status"),
    [("sys.exit(3)", 3), ("raise SystemExit", 0), ("raise KeyboardInterrupt", None)],
)
def test_a_job_may_end_the_process(spawn: Spawn, statement: str, status: int | None) -> None:
    ended = spawn(body(statement)).finish(call("work"), call("work"))
    assert ended.stdout == b""
    if status is None:  # Python's own choice: by status or by signal, says the version
        assert ended.status in (1, 130, -signal.SIGINT)
    else:
        assert ended.status == status


def test_ctrl_c_does_not_end_the_child(spawn: Spawn) -> None:
    child = spawn(body("return 1"))
    child.ask(call("work"))
    child.process.send_signal(signal.SIGINT)
    assert child.ask(call("work"))["result"] == 1


def test_the_child_ends_quietly_when_the_worker_is_gone(spawn: Spawn) -> None:
    child = spawn(body("return 1"))
    child.ask(call("work"))
    child.stdout.close()
    assert child.process.stderr is not None
    os.write(child.stdin.fileno(), line(call("work")))
    assert child.process.wait(DEADLINE) == 0
    assert child.process.stderr.read() == b""


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\n",
        b"\n",
        b"[1]\n",
        b"null\n",
        b'{"payload":{}}\n',
        b'{"id":"1"}\n',
        b'{"id":1,"payload":{}}\n',
        b'{"id":"1","payload":[]}\n',
        b'{"id":"1","payload":{"task":"wo',
        b'{"id":"\xff","payload":{}}\n',
        b"[" * 100000 + b"\n",
    ],
)
def test_an_unreadable_request_ends_the_child(spawn: Spawn, raw: bytes) -> None:
    ended = spawn(body("return 1")).finish(call("work"), raw)
    assert [reply["result"] for reply in ended.replies] == [1]
    assert ended.status == 2
    assert ended.stderr.startswith("serve: not a request (")
    assert repr(raw[:200]) in ended.stderr


def test_serve_refuses_an_argument_that_it_cannot_call(spawn: Spawn) -> None:
    ended = spawn("serve('work')").finish()
    assert ended.status == 1
    assert "serve() takes a function or a mapping" in ended.stderr


def test_it_can_be_imported_from_the_package() -> None:
    from celery_subproc_pool.serve import serve

    assert callable(serve)
