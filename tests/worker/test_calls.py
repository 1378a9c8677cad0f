"""A pool's callers other than Celery's consumer: any callable, as `BasePool.apply_async` promises.

With CSP_TEST_POOL=prefork in the environment, the tests that are not about the pool itself run on
prefork: that is how it was seen what they must expect.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.app.trace import fast_trace_task, trace_task, trace_task_ret
from celery.worker.request import Request

from celery_subproc_pool.worker.requests import is_tracer
from tests.support import callables
from tests.support.basics import DEADLINE, python_child, wait_for
from tests.support.running import POOL, ours
from tests.support.worker import Project, Worker

CODE = """
app.conf.include = ["ordinary_tasks", "callables"]
"""


class Caller:
    """A worker whose pool is asked by a remote control command to call things."""

    def __init__(self, project: Project, worker: Worker) -> None:
        self.project = project
        self.worker = worker

    def command(self, name: str, **arguments: Any) -> None:
        replies = self.project.app.control.broadcast(
            name,
            arguments,
            destination=[self.project.node],
            reply=True,
            timeout=DEADLINE,
            limit=1,
        )
        assert "ok" in replies[0][self.project.node], replies

    def call(self, path: Path, target: str, *args: Any, **options: Any) -> None:
        self.command("call", path=str(path), target=target, args=args, **options)

    def get(self, path: Path, target: str, *args: Any, **options: Any) -> list[Any]:
        """Call it; return what its end was, less what a test looks at by itself."""
        self.call(path, target, *args, **options)
        return self.end_of(path)

    def end_of(self, path: Path) -> list[Any]:
        def ends() -> list[list[Any]]:
            return [what for what in callables.told(path) if what[0] in ("result", "error")]

        [end] = wait_for(ends, "the end of a call")
        return end

    def serves(self) -> bool:
        """Whether the worker does an ordinary task."""
        return bool(self.project.app.send_task("add", (2, 3)).get(timeout=DEADLINE) == 5)


@pytest.fixture(scope="module")
def shared_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    project = Project(tmp_path_factory.mktemp("calls"), code=CODE)
    with project.worker("-P", POOL, "-c", "2") as worker:
        yield Caller(project, worker)


@pytest.fixture
def it(shared_worker: Caller) -> Caller:
    return shared_worker


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "told"


# -- results


@pytest.mark.parametrize(
    "value", [None, True, 5, 2**70, 1.5, "ü\n\u2028", [1, [None]], {"a": {"b": [1.5]}}]
)
def test_what_json_holds_comes_back_as_it_is(it: Caller, path: Path, value: Any) -> None:
    assert it.get(path, "same", value) == ["result", type(value).__name__, repr(value)]


@ours
@pytest.mark.parametrize(
    ("target", "args", "kind", "words"),
    [
        ("echo", (1,), "dict", "{'args': [1], 'kwargs': {}}"),
        ("large_number", (), "str", "'<Unrepresentable"),
        ("same", ("\ud800",), "str", repr("'\\ud800'")),
        ("circle", (), "str", "'[[...]]'"),
        ("a_lambda", (), "str", "'<function a_lambda.<locals>.<lambda>"),
        ("unspeakable", (), "str", "'<Unrepresentable"),
        ("long_text", (2**25,), "str", "\"'xxxx"),
    ],
    ids=["a tuple", "a large number", "half a surrogate", "circle", "lambda", "no words", "long"],
)
def test_what_json_does_not_hold_comes_back_as_words(
    it: Caller, path: Path, target: str, args: Any, kind: str, words: str
) -> None:
    _, found, text = it.get(path, target, *args)
    assert (found, text[: len(words)]) == (kind, words)
    assert it.serves()


def test_five_megabytes_come_back(it: Caller, path: Path) -> None:
    assert it.get(path, "long_text", 5_000_000)[2].startswith("'xxx")


def test_arguments_arrive_as_they_are(it: Caller, path: Path) -> None:
    _, _, text = it.get(path, "kinds")
    assert text == repr(["(1, (2,), datetime.date(2026, 11, 25), {3})", "{'key': b'\\xff'}"])


@pytest.mark.parametrize("target", ["an object", "a method", "a builtin", "what answers oddly"])
def test_anything_callable_is_called(it: Caller, path: Path, target: str) -> None:
    assert it.get(path, target) == ["result", "int", "42"]


def test_a_process_of_the_pool_calls_it_and_is_named(it: Caller, path: Path) -> None:
    _, _, pid = it.get(path, "pid")
    [accepted] = [what for what in callables.told(path) if what[0] == "accepted"]
    assert accepted == ["accepted", int(pid)]
    assert int(pid) in {child.pid for child in it.worker.children()}


# -- failures


def test_what_it_raises_is_told(it: Caller, path: Path) -> None:
    _, kind, text, traceback = it.get(path, "fail", "value")
    assert (kind, text) == ("ValueError", "('no such', 5)")
    assert "callables.py" in traceback
    assert it.serves()


@ours
@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [("memory", "TaskMemoryError", "none"), ("odd", "Odd", "unlocked _thread.lock")],
)
def test_what_it_raises_may_be_odd(
    it: Caller, path: Path, kind: str, name: str, words: str
) -> None:
    _, found, text, _ = it.get(path, "fail", kind)
    assert found == name
    assert words in text
    assert it.serves()


def test_a_process_that_ends_is_told(it: Caller, path: Path, tmp_path: Path) -> None:
    _, kind, text, _ = it.get(path, "die", int(signal.SIGKILL))
    assert kind == "WorkerLostError"
    assert "signal 9" in text
    _, kind, text, _ = it.get(tmp_path / "another", "leave", 3)
    # The latter: billiard's newest.
    assert kind in {"WorkerLostError", "SystemExit"}
    assert "3" in text
    assert it.serves()


@ours
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("a lambda", "as the callable can't be pickled"),
        ("a circular wrapper", "as the callable can't be pickled"),
        ("a lock", "callables.echo can't be sent to a Python child, as args[1] can't be"),
        ("a named lock", "as kwargs['lock'] can't be pickled: TypeError: cannot pickle"),
        ("only in the worker", "the Python child can't load only_here.function and its arguments"),
    ],
)
def test_what_cannot_be_pickled_fails_alone(
    it: Caller, path: Path, target: str, words: str
) -> None:
    _, kind, text, _ = it.get(path, target)
    assert kind == "CallError"
    assert words in text
    assert it.serves()


@ours
def test_what_is_not_callable_fails_alone(it: Caller, path: Path) -> None:
    assert it.get(path, "nothing")[1:3] == ["TypeError", "'NoneType' object is not callable"]
    assert it.serves()


@ours
@pytest.mark.parametrize("limits", [{}, {"soft_timeout": 30.0, "timeout": 30.0}])
def test_nobody_need_listen(it: Caller, path: Path, tmp_path: Path, limits: Any) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    gate.touch()
    it.call(path, "wait", str(begun), str(gate), silent="None", **limits)
    wait_for(begun.exists, "its begin")
    assert it.serves()


@ours
def test_the_log_tells_of_failures_that_nobody_else_is_told_of(it: Caller, path: Path) -> None:
    for target, args, silent, words in (
        ("fail", ("value",), "at all", "callables.fail["),
        ("a lock", (), "None", "callables.echo["),
    ):
        it.call(path, target, *args, silent=silent)
        wait_for(lambda words=words: words in it.worker.log, "the log")
    assert "] failed, and its caller gave no error_callback:\nTraceback" in it.worker.log
    assert "ValueError: ('no such', 5)" in it.worker.log
    assert "CallError: callables.echo can't be sent" in it.worker.log
    assert it.serves()


# -- limits and ends


def test_a_soft_limit(it: Caller, path: Path, tmp_path: Path) -> None:
    begun, gate = str(tmp_path / "begun"), str(tmp_path / "gate")
    end = it.get(path, "wait_until_told", begun, gate, soft_timeout=1.0)
    assert end == ["result", "str", "'told'"]
    assert ["timeout", True, 1.0] in callables.told(path)


def test_a_soft_limit_that_it_does_not_catch(it: Caller, path: Path, tmp_path: Path) -> None:
    begun, gate = str(tmp_path / "begun"), str(tmp_path / "gate")
    assert it.get(path, "wait", begun, gate, soft_timeout=1.0)[1] == "SoftTimeLimitExceeded"
    assert it.serves()


def test_a_hard_limit(it: Caller, path: Path, tmp_path: Path) -> None:
    end = it.get(path, "wait", str(tmp_path / "begun"), str(tmp_path / "gate"), timeout=1.0)
    assert end[1] == "TimeLimitExceeded"
    wait_for(lambda: ["timeout", False, 1.0] in callables.told(path), "the callback")
    assert it.serves()


@ours
@pytest.mark.parametrize("limit", ["timeout", "soft_timeout"])
@pytest.mark.parametrize("value", ["soon", -1.0, [1]])
def test_a_limit_that_is_none(it: Caller, path: Path, limit: str, value: Any) -> None:
    _, kind, text, _ = it.get(path, "pid", **{limit: value})
    assert kind == "ValueError"
    assert f"{limit}: expected a number of seconds, got {value!r}" in text
    assert it.serves()


@ours
def test_a_call_is_terminated(it: Caller, path: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    it.call(path, "wait", str(begun), str(tmp_path / "gate"))
    wait_for(begun.exists, "its begin")
    it.command("end", path=str(path))
    assert it.end_of(path)[1:3] == ["Terminated", "-15"]
    assert it.serves()


def test_calls_and_tasks_share_the_processes(it: Caller, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    paths = [tmp_path / f"told {number}" for number in range(2)]
    for number, path in enumerate(paths):
        it.call(path, "wait", str(tmp_path / f"begun {number}"), str(gate))
    sent = it.project.app.send_task("add", (2, 3))
    gate.touch()
    assert [it.end_of(path)[2] for path in paths] == ["'done'"] * 2
    assert sent.get(timeout=DEADLINE) == 5


@ours
def test_the_pool_waits_for_a_call_when_the_worker_stops(tmp_path: Path) -> None:
    path, begun, gate = tmp_path / "told", tmp_path / "begun", tmp_path / "gate"
    project = Project(tmp_path, code=CODE)
    with project.worker("-P", POOL, "-c", "1") as worker:
        it = Caller(project, worker)
        it.call(path, "wait", str(begun), str(gate))
        wait_for(begun.exists, "its begin")
        worker.process.terminate()
        wait_for(lambda: "Warm shutdown" in worker.log, "the shutdown")
        gate.touch()
        assert worker.process.wait(DEADLINE) == 0
        assert it.end_of(path) == ["result", "str", "'done'"]


@ours
def test_without_python_children_it_fails_and_says_what_to_configure(tmp_path: Path) -> None:
    path = tmp_path / "told"
    obeys = {"argv": python_child("obeys"), "tasks": ["do.it", "*"]}
    conf = {"subproc_pool": {"children": {"obeys": obeys}}}
    project = Project(tmp_path, conf=conf, code=CODE)
    with project.worker("-P", POOL, "-c", "1") as worker:
        it = Caller(project, worker)
        _, kind, text, _ = it.get(path, "pid")
        assert kind == "CallError"
        assert "callables.pid is a callable and not a task" in text
        assert "subproc_pool.children.<name>.tasks" in text
        result = project.app.send_task("do.it", ([["own", "pid", {}]],))
        assert result.get(timeout=DEADLINE)


# -- what is a task


@functools.wraps(fast_trace_task)
def instrumented(*args: Any, **kwargs: Any) -> Any:
    return fast_trace_task(*args, **kwargs)


def bare_wrapper(*args: Any, **kwargs: Any) -> Any:
    return fast_trace_task(*args, **kwargs)


class Hears(Request):
    """A request without a message."""

    def __init__(self) -> None: ...

    id = "the id"  # type: ignore[assignment]


MESSAGE = ("a.task", "the id", {}, b"[]", "json", "utf-8")


@pytest.mark.parametrize(
    ("target", "arguments", "callback", "expected"),
    [
        (fast_trace_task, MESSAGE, None, True),
        (trace_task_ret, MESSAGE, None, True),
        (instrumented, MESSAGE, None, True),
        (bare_wrapper, MESSAGE, Hears().on_failure, True),
        (bare_wrapper, MESSAGE, None, False),
        (bare_wrapper, ("another", "call"), Hears().on_failure, False),
        (bare_wrapper, ("a.task", "another id", {}, b"[]", "", ""), Hears().on_failure, False),
        (trace_task, MESSAGE, None, False),
        (callables.circular_wrapper(), MESSAGE, None, False),
        (None, (), None, False),
    ],
)
def test_what_traces_a_task(
    target: Any, arguments: tuple[Any, ...], callback: Any, expected: bool
) -> None:
    assert is_tracer(target, arguments, callback) is expected
