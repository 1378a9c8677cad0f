"""One tracer without a worker: the test writes what a worker would, and reads the replies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError
from kombu.serialization import dumps

from celery_subproc_pool.python_child import codec
from celery_subproc_pool.wire import python
from celery_subproc_pool.wire.json_lines import encode
from celery_subproc_pool.wire.messages import Ok, Retry, Throttled
from celery_subproc_pool.wire.python import Answer, Ask, Boot, Exchange, Notice, Released, Traced
from tests.support.basics import DEADLINE, wait_for
from tests.support.traced import CODE
from tests.support.worker import TRACER, Project

#: The backend notes what is stored.
BACKEND = """
import folder_broker
class Backend(folder_broker.Backend):
    def store_result(self, task_id, result, state, *args, **kwargs):
        note("stored", task_id, state, str(result).replace(" ", ""))
        return super().store_result(task_id, result, state, *args, **kwargs)
    def get_state(self, task_id):
        note("asked for", task_id)
        raise OSError("the backend is away")
app.conf.result_backend = app.conf.result_backend.replace("folder_broker:", "proj:")
@app.task(base=SubprocTask, name="do.it")
def it(*args): ...
"""


class Tracer:
    """A tracer that runs.

    Arguments:
        directory: for its project.
        code: more of the project's module.
    """

    def __init__(self, directory: Path, code: str = "") -> None:
        notes = directory / "notes"
        notes.touch()
        project = Project(directory, code=CODE.format(notes=str(notes)) + BACKEND + code)
        self._notes, self._app = notes, project.app
        self.process = subprocess.Popen(
            [sys.executable, "-m", TRACER],
            cwd=directory,
            env=project.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        path = [str(directory), *project.environment()["PYTHONPATH"].split(":"), *sys.path]
        boot = Boot(hostname="me@here", app="proj", path=path, tasks={"do.it": "proj"}, traces=True)
        self.write(encode(boot))
        assert self.process.stdout is not None
        #: The handshake.
        self.ready = self.process.stdout.readline()

    def write(self, *lines: bytes) -> None:
        """Let it read these at a time."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(lines))

    def task(self, task_id: str, name: str = "do.it", *args: Any, traced: bool = True) -> bytes:
        """Return the line that begins a trace; or has it run the body of the task itself."""
        message = self._app.amqp.as_task_v2(task_id, name, args, {})
        content_type, encoding, body = dumps(message.body, "json")
        # A header that the client has added.
        headers = {**message.headers, "tenant": "acme"}
        arguments = name, task_id, headers, body, content_type, encoding
        if traced:
            return codec.encode_task(task_id, arguments, Exchange(pid=1))
        return codec.encode_task(task_id, arguments)

    def read(self) -> Any:
        """Return the next message that it writes."""
        assert self.process.stdout is not None
        return python.decode_of_tracer(self.process.stdout.readline().rstrip(b"\n"))

    def begin(self, task_id: str, *args: Any) -> Ask:
        """Begin a trace, and return what it asks."""
        self.write(self.task(task_id, "do.it", *args))
        ask = self.read()
        assert isinstance(ask, Ask)
        assert ask.id == task_id
        return ask

    def end(self, task_id: str, result: Any = "done") -> Traced:
        """Answer as the child would, and return the end of the trace."""
        self.write(answered(task_id, result))
        end = self.read()
        assert isinstance(end, Traced)
        assert end.id == task_id
        return end

    def lives(self) -> bool:
        """Return whether it traces a job."""
        self.begin("last")
        return self.end("last").result == "'done'"

    def noted(self, *first: str) -> list[list[str]]:
        notes = [line.split() for line in self._notes.read_text().splitlines()]
        return [words[len(first) :] for words in notes if words[: len(first)] == [*first]]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(DEADLINE)
        finally:
            self.process.kill()
            self.process.stdout.close()


def answered(task_id: str, result: Any = "done") -> bytes:
    return encode(Notice(id=task_id, answer=Answer(reply=Ok(result=result))))


def progress(task_id: str, number: int) -> bytes:
    return encode(Notice(id=task_id, progress={"n": number}))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Tracer]]:
    """Return what starts a tracer."""
    running: list[Tracer] = []

    def start(code: str = "") -> Tracer:
        running.append(Tracer(tmp_path, code))
        return running[-1]

    yield start
    for each in running:
        each.close()


# -- what it announces

RECEIVER = """
from celery_subproc_pool.signals import child_request
@signals.worker_process_init.connect(weak=False)
def watch(**_):
    {signal}.connect(lambda **_: None, weak=False)
"""
HOOK = """
class Hooked(SubprocTask):
    abstract = True
    def on_success(self, *args): ...
app.tasks.unregister("do.it")
app.task(base=Hooked, name="do.it", shared=False)(it.run)
"""


@pytest.mark.parametrize(
    ("code", "silent"),
    [
        ("", True),
        (RECEIVER.format(signal="signals.task_failure"), True),
        (RECEIVER.format(signal="signals.task_prerun"), False),
        (RECEIVER.format(signal="child_request"), False),
        (HOOK, False),
    ],
    ids=["nobody", "failures", "a receiver", "of requests", "a hook"],
)
def test_it_says_whether_somebody_watches(
    run: Callable[..., Tracer], code: str, silent: bool
) -> None:
    tracer = run(code)
    assert (b'"silent"' in tracer.ready) == silent
    assert b'"multiplex"' in tracer.ready


# -- traces


def test_traces_end_in_any_order(run: Callable[..., Tracer]) -> None:
    tracer = run()
    names = [str(number) for number in range(5)]
    for name in names:
        tracer.begin(name)
    for name in reversed(names):
        assert tracer.end(name, name).result == f"'{name}'"
    assert [task_id for task_id, *_ in tracer.noted("stored")] == names[::-1]


def test_an_answer_that_is_there_already_is_taken_at_once(run: Callable[..., Tracer]) -> None:
    tracer = run()
    tracer.write(tracer.task("x"), answered("x"))
    assert isinstance(tracer.read(), Ask)
    assert isinstance(tracer.read(), Traced)


def test_progress_that_is_not_the_latest_is_not_stored(run: Callable[..., Tracer]) -> None:
    tracer = run()
    tracer.begin("x")
    tracer.write(progress("x", 1), progress("x", 2))
    wait_for(lambda: tracer.noted("stored"), "the progress")
    tracer.write(progress("x", 3), answered("x"))
    assert isinstance(tracer.read(), Traced)
    assert tracer.noted("stored") == [["x", "PROGRESS", "{'n':2}"], ["x", "SUCCESS", "done"]]


ADDS = """
from celery_subproc_pool.signals import child_request
@child_request.connect(weak=False)
def add(headers, **_):
    headers["added"] = "for the child"
@signals.before_task_publish.connect(weak=False)
def on_publish(headers, **_):
    note("sent", headers["id"], *sorted({"added", "tenant", "subproc_throttles"} & headers.keys()))
"""


@pytest.mark.parametrize(
    ("reply", "throttles"),
    [(Throttled(retry_after_secs=1), ["subproc_throttles"]), (Retry(countdown=1), [])],
    ids=["throttled", "retry"],
)
def test_the_message_of_a_retry_lacks_what_a_receiver_adds_for_the_child(
    run: Callable[..., Tracer], reply: Retry | Throttled, throttles: list[str]
) -> None:
    tracer = run(ADDS)
    headers = json.loads(tracer.begin("x").line)["payload"]["headers"]
    assert headers == {"tenant": "acme", "added": "for the child"}
    tracer.write(encode(Notice(id="x", answer=Answer(reply=reply))))
    assert isinstance(tracer.read(), Traced)
    assert tracer.noted("sent") == [["x", *throttles, "tenant"]]


UNWINDS = """
class Unwinds(SubprocTask):
    abstract = True
    def __call__(self, *args):
        try:
            return super().__call__(*args)
        except Exception as exc:
            note("taken for a failure", repr(exc))
        finally:
            note("unwound", self.request.id)
    def on_failure(self, *args):
        note("failed")
    def after_return(self, *args):
        note("returned")
app.tasks.unregister("do.it")
app.task(base=Unwinds, name="do.it", shared=False)(it.run)
"""


@pytest.mark.parametrize("revoked", [True, False])
def test_an_abandoned_trace_is_unwound_and_stores_no_end(
    run: Callable[..., Tracer], revoked: bool
) -> None:
    tracer = run(UNWINDS)
    tracer.begin("x")
    tracer.write(progress("x", 1))
    wait_for(lambda: tracer.noted("stored"), "the progress")
    tracer.write(python.encode_abandon("x", revoked))
    assert tracer.read() == Released(id="x")
    states = [words[0] for words in tracer.noted("stored", "x")]
    assert states == (["PROGRESS", "REVOKED"] if revoked else ["PROGRESS"])
    assert tracer.noted("unwound") == [["x"]]
    assert not tracer.noted("taken")
    assert not tracer.noted("failed")
    assert not tracer.noted("returned")


SWALLOWS = """
class Swallows(SubprocTask):
    abstract = True
    def __call__(self, *args):
        try:
            return super().__call__(*args)
        except:
            return "swallowed"
app.tasks.unregister("do.it")
app.task(base=Swallows, name="do.it", shared=False)(it.run)
"""


def test_revoked_stays_revoked_if_a_task_swallows_the_abandonment(
    run: Callable[..., Tracer],
) -> None:
    tracer = run(SWALLOWS)
    tracer.begin("x")
    tracer.write(python.encode_abandon("x", True))
    assert tracer.read() == Released(id="x")
    assert [words[0] for words in tracer.noted("stored", "x")] == ["SUCCESS", "REVOKED"]


def test_what_comes_too_late_is_ignored(run: Callable[..., Tracer]) -> None:
    tracer = run()
    tracer.begin("x")
    abandon = python.encode_abandon("x", False)
    tracer.write(abandon, answered("x"), progress("x", 1), abandon)
    assert tracer.read() == Released(id="x")
    assert tracer.lives()
    assert tracer.noted("stored", "x") == []


def test_a_task_of_celerys_own_runs_there(run: Callable[..., Tracer]) -> None:
    tracer = run()
    tracer.write(tracer.task("x", "celery.accumulate", 1, 2, traced=False))
    assert tracer.read().result == "(1, 2)"


def test_a_probe_is_answered_when_the_backend_was_asked(run: Callable[..., Tracer]) -> None:
    tracer = run()
    tracer.write(encode(Notice(id="x", probe="do.it")))
    assert tracer.read() == Released(id="x")
    assert tracer.noted("asked", "for") == [["x"]]
    assert tracer.lives()


# -- hooks that do what they should not

HOOKS = """
class Odd(SubprocTask):
    abstract = True
    def before_start(self, task_id, args, kwargs):
        if args:
            exec(args[0])
app.tasks.unregister("do.it")
app.task(base=Odd, name="do.it", shared=False)(it.run)
"""


@pytest.mark.parametrize("statement", ["raise SystemExit(3)", "raise KeyboardInterrupt"])
def test_what_ends_a_process_ends_one_trace(run: Callable[..., Tracer], statement: str) -> None:
    tracer = run(HOOKS)
    tracer.begin("other")
    tracer.write(tracer.task("x", "do.it", statement))
    end = tracer.read()
    assert isinstance(end, Traced)
    assert end.escaped
    assert end.raised is not None
    assert end.raised.type == WorkerLostError.__name__
    assert tracer.end("other").result == "'done'"


def test_the_copy_of_a_hook_that_forks_answers_nothing_and_takes_nothing(
    run: Callable[..., Tracer],
) -> None:
    tracer = run(HOOKS)
    tracer.begin("x", "if not os.fork(): note('copy', os.getpid())")
    [[copy]] = wait_for(lambda: tracer.noted("copy"), "the copy")
    children = Path(f"/proc/{tracer.process.pid}/task/{tracer.process.pid}/children")
    stat = Path(f"/proc/{copy}/stat")
    assert copy in children.read_text().split()
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", "its exit")
    assert tracer.end("x").result == "'done'"
    assert tracer.lives()


# -- its end


def test_the_end_of_stdin_ends_it(run: Callable[..., Tracer]) -> None:
    tracer = run("signals.worker_process_shutdown.connect(lambda **_: note('over'), weak=False)\n")
    tracer.begin("x")
    tracer.close()
    assert tracer.process.returncode == 0
    assert tracer.noted("over") == [[]]


def test_sigterm_ends_it_between_traces(run: Callable[..., Tracer]) -> None:
    tracer = run()
    tracer.begin("x")
    tracer.process.send_signal(signal.SIGTERM)
    assert tracer.process.wait(DEADLINE) == 0


def test_sigterm_in_a_hook_waits_until_the_trace_gives_up_the_processor(
    run: Callable[..., Tracer], tmp_path: Path
) -> None:
    tracer = run(HOOKS)
    gate = tmp_path / "gate"
    hook = (
        f"note('begun')\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nnote('ended')"
    )
    tracer.write(tracer.task("x", "do.it", hook))
    wait_for(lambda: tracer.noted("begun"), "the hook")
    tracer.process.send_signal(signal.SIGTERM)
    gate.touch()
    assert isinstance(tracer.read(), Ask)
    assert tracer.process.wait(DEADLINE) == 0
    assert tracer.noted("ended") == [[]]
