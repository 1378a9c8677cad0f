"""The fast path: jobs that succeed without Celery's tracer, where no code can see a trace."""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import celery
import pytest
from celery import Celery, Task, signals
from celery._state import get_current_task
from celery.app.task import Context
from celery.app.trace import (
    build_tracer,
    reset_worker_optimizations,
    setup_worker_optimizations,
)
from celery.fixups.django import DjangoWorkerFixup
from celery.loaders.app import AppLoader
from celery.loaders.base import BaseLoader
from celery.utils.dispatch import Signal
from celery.worker.request import Request
from kombu.message import Message
from kombu.serialization import dumps

from celery_subproc_pool import SubprocTask
from celery_subproc_pool.signals import child_request
from celery_subproc_pool.tracer.tasks import payload
from celery_subproc_pool.worker.fast_path import FastPath
from celery_subproc_pool.worker.requests import deserialized_body
from tests.support.basics import CHILDREN, DEADLINE, python_child, wait_for
from tests.support.worker import Project, Worker

# -- which jobs


class Hooked(SubprocTask):
    """Defined anew below, with one hook each."""

    abstract = True


class Called(SubprocTask):
    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class OwnLoader(AppLoader):  # type: ignore[misc]
    def on_task_init(self, task_id: str, task: Task) -> None: ...


def body(*args: Any) -> None:
    """Never run."""


def app_with(
    base: type[Task] = SubprocTask, task_cls: type[Task] | None = None, **conf: Any
) -> Celery:
    """Return an app with one task, whose results are ignored."""
    app = Celery(
        broker="memory://", backend="cache+memory://", set_as_current=False, task_cls=task_cls
    )
    app.conf.update(conf)
    app.task(base=base, name="it", ignore_result=True, shared=False)(body)
    app.finalize()
    return app


def arguments(app: Celery, *args: Any, **options: Any) -> tuple[Any, ...]:
    """Return what Celery gives the pool for a message."""
    task_id = str(uuid.uuid4())
    options.setdefault("ignore_result", True)
    message = app.amqp.as_task_v2(task_id, "it", args, {}, **options)
    content_type, encoding, body = dumps(message.body, "json")
    return "it", task_id, dict(message.headers), body, content_type, encoding


def fast_path(app: Celery) -> FastPath:
    return FastPath(app, "me@here")


def is_fast(app: Celery, *args: Any, stores_earlier: bool = False, **options: Any) -> bool:
    return fast_path(app).request_for(arguments(app, *args, **options), stores_earlier) is not None


def test_the_request_is_the_one_that_a_trace_would_make() -> None:
    app = app_with()
    given = arguments(app, 1, "two", headers={"tenant": "acme"}, eta=None, group_id="g")
    request = fast_path(app).request_for(given, False)
    assert request is not None
    assert not request.stores
    line = json.loads(request.line)
    sent = line["payload"]
    assert line["id"] == given[1]
    assert (sent["task"], sent["args"], sent["kwargs"]) == ("it", [1, "two"], {})
    assert sent["group"] == "g"
    assert sent["retries"] == sent["throttles"] == 0


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {"tenant": "acme"},
        {"subproc_throttles": 3},
        {"headers": {"of": "one's own"}},
        {"get": "a name of a `Context`'s method"},
    ],
)
def test_a_requests_own_headers_are_those_of_its_context(headers: dict[str, Any] | None) -> None:
    app = app_with()
    given = arguments(app, 1, headers=headers, time_limit=5, retries=2)
    given[2]["delivery_info"] = {"routing_key": "here", "redelivered": True}
    request = fast_path(app).request_for(given, False)
    assert request is not None
    context = Context(given[2], args=[1], kwargs={})
    assert request.context.headers == context.headers
    expected = payload("it", vars(context), context.headers or {}, [1], {})
    assert json.loads(request.line)["payload"] == json.loads(json.dumps(expected))


def test_what_comes_with_the_arguments_names_no_other_job() -> None:
    app = app_with()
    given = arguments(app)
    embedded = {"id": "another", "task": "other", "hostname": "elsewhere", "callbacks": None}
    request = fast_path(app).request_for(given, False, ([], {}, embedded))
    assert request is not None
    context = request.context
    assert (context.id, context.task, context.hostname) == (given[1], "it", "me@here")


def test_a_body_that_was_deserialized_before_is_not_again() -> None:
    app = app_with()
    given = (*arguments(app)[:3], b"...", "application/json", "utf-8")
    assert fast_path(app).request_for(given, False) is None
    request = fast_path(app).request_for(given, False, ([1], {"a": 2}, {}))
    assert request is not None
    sent = json.loads(request.line)["payload"]
    assert (sent["args"], sent["kwargs"]) == ([1], {"a": 2})


def test_a_body_that_a_receiver_may_have_changed_is_read_anew() -> None:
    app = app_with()
    _, _, headers, text, content_type, encoding = arguments(app, 1)
    message = Message(
        body=text,
        content_type=content_type,
        content_encoding=encoding,
        headers=headers,
        accept={content_type},
    )
    request = Request(message, app=app, hostname="me@here", task=app.tasks["it"])
    assert deserialized_body(request.on_failure)[0] == [1]

    def receiver(request: Any = None, **_: Any) -> None:
        request.message.payload[1]["more"] = 1

    signals.task_received.connect(receiver, weak=False)
    try:
        assert deserialized_body(request.on_failure) is None
    finally:
        signals.task_received.disconnect(receiver)


@pytest.mark.parametrize("what", ["callbacks", "chain", "chord"])
def test_what_follows_a_job_is_sent_by_its_tracer(what: str) -> None:
    assert not is_fast(app_with(), **{what: [{"task": "next"}]})


@pytest.mark.parametrize(
    ("conf", "options", "stored"),
    [
        ({}, {"ignore_result": True}, False),
        ({}, {"ignore_result": False}, True),
        ({"result_backend": "disabled://"}, {"ignore_result": False}, False),
    ],
)
def test_whether_a_result_is_stored(
    conf: dict[str, Any], options: dict[str, Any], stored: bool
) -> None:
    app = app_with(**conf)
    app.tasks["it"].ignore_result = False
    request = fast_path(app).request_for(arguments(app, **options), False)
    assert request is not None
    assert request.stores == stored


def test_since_celery_5_7_the_request_says_whether_its_result_is_ignored() -> None:
    app = app_with()
    request = fast_path(app).request_for(arguments(app, ignore_result=False), False)
    assert request is not None
    assert request.stores == (celery.VERSION >= (5, 7))


@pytest.mark.parametrize("ignored", [True, False])
def test_states_before_the_last_are_stored_by_a_tracer(ignored: bool) -> None:
    app = app_with()
    app.tasks["it"].ignore_result = ignored
    assert is_fast(app, ignore_result=ignored, stores_earlier=True) == ignored


@pytest.mark.parametrize("hook", ["before_start", "on_success", "after_return"])
def test_hooks_are_called_by_a_tracer(hook: str) -> None:
    base = type("Base", (Hooked,), {hook: lambda self, *args: None, "abstract": True})
    assert not is_fast(app_with(base))


def test_a_task_that_wraps_its_call_is_traced() -> None:
    assert not is_fast(app_with(Called))


def test_a_call_of_the_apps_class_is_traced() -> None:
    app = app_with(task_cls=type("Own", (Task,), {"__call__": Called.__call__, "abstract": True}))
    assert not is_fast(app)
    assert is_fast(app_with(task_cls=type("Own", (Task,), {"abstract": True})))


class Wrapper:
    """Looks like what it wraps, as wrapt's objects do."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    @property
    def __class__(self) -> Any:
        return type(self.wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)


def wrapped(function: Any) -> Any:
    """Wrap with `functools.wraps`, as most packages do."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("wrap", [wrapped, Wrapper])
@pytest.mark.parametrize("what", ["call", "celerys call", "tracer", "builder", "loader"])
def test_who_wraps_what_a_trace_calls_sees_it(
    what: str, wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_with()
    task = app.tasks["it"]
    task.__trace__ = build_tracer("it", task, app=app)
    assert is_fast(app)
    target, name = {
        "call": (type(task), "__call__"),
        "celerys call": (Task, "__call__"),
        "tracer": (task, "__trace__"),
        "builder": (celery.app.trace, "build_tracer"),
        "loader": (BaseLoader, "on_task_init"),
    }[what]
    monkeypatch.setattr(target, name, wrap(getattr(target, name)))
    assert not is_fast(app)


def test_the_call_of_a_running_worker_is_celerys_own() -> None:
    app = app_with()
    setup_worker_optimizations(app, "me@here")
    try:
        assert Task.__call__.__module__ == "celery.app.trace"
        assert is_fast(app)
    finally:
        reset_worker_optimizations(app)


@pytest.mark.parametrize(
    "signal",
    [signals.task_prerun, signals.task_postrun, signals.task_success, child_request],
    ids=lambda signal: signal.name,
)
def test_signals_are_sent_by_a_tracer(signal: Signal) -> None:
    app = app_with()

    def receiver(**_: Any) -> None: ...

    # Not weak: when a weak receiver dies, Celery before 5.7 forgets what existing tracers call.
    signal.connect(receiver, weak=False)
    try:
        assert not is_fast(app)
    finally:
        signal.disconnect(receiver)
    assert is_fast(app)


def test_djangos_receivers_have_nothing_to_close_after_an_external_task() -> None:
    app = app_with()
    found = fast_path(app)
    # Without Django, which is not installed here.
    fixup = object.__new__(DjangoWorkerFixup)
    watched = {
        signals.task_prerun: fixup.on_task_prerun,
        signals.task_postrun: fixup.on_task_postrun,
        signals.worker_process_init: fixup.on_worker_process_init,
    }
    for signal, receiver in watched.items():
        signal.connect(receiver)
    try:
        assert found.request_for(arguments(app)) is not None
    finally:
        for signal, receiver in watched.items():
            signal.disconnect(receiver)


def test_who_begins_to_watch_in_a_process_that_traces_is_heard() -> None:
    app = app_with()
    found = fast_path(app)

    def receiver(**_: Any) -> None: ...

    signals.worker_process_init.connect(receiver, weak=False)
    try:
        assert found.request_for(arguments(app)) is None
        found.tracers_are_silent = True
        assert found.request_for(arguments(app)) is not None
    finally:
        signals.worker_process_init.disconnect(receiver)


def test_a_loader_of_ones_own_is_called_by_a_tracer() -> None:
    app = Celery(loader=OwnLoader, broker="memory://", set_as_current=False)
    app.task(base=SubprocTask, name="it", ignore_result=True, shared=False)(body)
    app.finalize()
    assert not is_fast(app)


def test_duplicates_are_sought_by_a_tracer() -> None:
    assert not is_fast(app_with(worker_deduplicate_successful_tasks=True))


def test_a_reloaded_task_is_looked_at_anew() -> None:
    app = app_with()
    found = fast_path(app)
    assert found.request_for(arguments(app), False) is not None
    app.tasks.unregister("it")
    app.task(base=Called, name="it", ignore_result=True, shared=False)(body)
    assert found.request_for(arguments(app), False) is None


def test_what_cannot_be_read_is_for_the_tracer_to_say() -> None:
    app = app_with()
    name, task_id, headers, _, _, encoding = arguments(app)
    found = fast_path(app)
    pickled = (name, task_id, headers, b"...", "application/x-python-serialize", encoding)
    assert found.request_for(pickled, False) is None
    bodies: list[Any] = [((object(),), {}, {}), (5, {}, {}), ({"a": 1}, {}, {}), ([], ["a"], {})]
    # With these keywords, it can't call the task.
    bodies += [([], {"self": 1}, {}), ([], {3: 4}, {})]
    for body in bodies:
        assert found.request_for((name, task_id, headers, body, None, None), False) is None


def test_the_log_record_is_the_tracers(caplog: pytest.LogCaptureFixture) -> None:
    """For formatters that look at the current task, and for handlers that look at `data`."""
    caplog.set_level(logging.INFO, "celery.app.trace")
    app = app_with()
    found = fast_path(app)
    given = arguments(app, 1, shadow="another name", argsrepr="", kwargsrepr="")
    request = found.request_for(given, False)
    assert request is not None
    seen = []

    def look(record: logging.LogRecord) -> bool:
        seen.append(get_current_task().request.id)
        return True

    caplog.handler.addFilter(look)
    try:
        assert found.succeed(request, {"a": 1}, 2.5) == (0, "{'a': 1}", 2.5)
    finally:
        caplog.handler.removeFilter(look)
    [record] = caplog.records
    assert record.getMessage() == f"Task another name[{given[1]}] succeeded in 2.5s: {{'a': 1}}"
    assert record.data["args"] == "[1]"  # type: ignore[attr-defined]
    assert seen == [given[1]]
    assert get_current_task() is None


# -- what becomes of them

CODE = """
from celery import signals
from celery_subproc_pool import SubprocTask
from celery_subproc_pool.worker.requests import deserialized_body
def note(signal):
    def receive(sender=None, request=None, **kwargs):
        with open({path!r}, "a") as file:
            file.write(f"{{signal}} {{kwargs.get('task_id') or request.id}}\\n")
    getattr(signals, signal).connect(receive, weak=False)
for signal in ("task_failure", "task_retry", "task_revoked", "task_rejected"):
    note(signal)
@app.task(base=SubprocTask, name="do.ignored", ignore_result=True, max_retries=1)
def ignored(*args): ...
@app.task(base=SubprocTask, name="do.again", ignore_result=True, max_retries=1,
          autoretry_for=(Exception,), default_retry_delay=0)
def again(*args): ...
@app.task(base=SubprocTask, name="do.late", ignore_result=True, acks_late=True)
def late(*args): ...
"""


class Place(NamedTuple):
    """A worker whose jobs leave no results: its log says how they ended."""

    project: Project
    worker: Worker
    notes: Path

    def send(self, *steps: list[Any], name: str = "do.ignored", **options: Any) -> str:
        result = self.project.app.send_task(name, [list(steps)], ignore_result=True, **options)
        return str(result.id)

    def says(self, pattern: str) -> Any:
        return wait_for(lambda: re.search(pattern, self.worker.log, re.DOTALL), repr(pattern))

    def noted(self, signal: str, task_id: str) -> bool:
        return f"{signal} {task_id}" in self.notes.read_text().splitlines()


@pytest.fixture(scope="module")
def shared_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    path = tmp_path_factory.mktemp("fast_path")
    notes = path / "notes"
    notes.touch()
    children = {
        "obeys": {
            "argv": python_child("obeys"),
            "tasks": ["do.*"],
            "soft_timeout_signal": "SIGUSR2",
        }
    }
    project = Project(
        path, conf={"subproc_pool": {"children": children}}, code=CODE.format(path=str(notes))
    )
    with project.worker("-P", "subproc", "-c", "2") as worker:
        yield Place(project, worker, notes)


def test_success_is_told_without_a_tracer(shared_worker: Place) -> None:
    place = shared_worker
    before = place.worker.stats()["groups"]["tracers"]["jobs"]
    for _ in range(10):
        last = place.send(["reply", {"result": [1, "two"]}])
    place.says(rf"Task do\.ignored\[{last}\] succeeded in [\d.e-]+s: \[1, 'two'\]")
    assert place.worker.stats()["groups"]["tracers"]["jobs"] == before


def test_the_runtime_is_that_of_the_child(shared_worker: Place, tmp_path: Path) -> None:
    place = shared_worker
    gate = tmp_path / "gate"
    job = place.send(["touch", str(tmp_path / "begun")], ["wait", str(gate)], ["reply", {}])
    wait_for((tmp_path / "begun").exists, "its begin")
    wait_for(partial(_has_run_for, place, job, 0.3), "some time in the child")
    gate.touch()
    found = place.says(rf"do\.ignored\[{job}\] succeeded in (\d+\.\d+)s")
    assert float(found[1]) >= 0.3


def _has_run_for(place: Place, job: str, seconds: float) -> bool:
    replies = place.project.app.control.inspect([place.project.node], timeout=20)
    [rows] = replies._request("subproc").values()
    tasks = [row["task"] for row in rows if row["task"]]
    return any(task["id"] == job and task["seconds"] >= seconds for task in tasks)


@pytest.mark.parametrize(
    ("steps", "says", "signal"),
    [
        ([["reply", {"status": "error"}]], r"\[ID\] raised unexpected: Child", "task_failure"),
        ([["write", "no JSON"]], r"\[ID\] raised unexpected: ProtocolFault", "task_failure"),
        ([["exit", 3]], r"WorkerLostError.*exitcode 3", "task_failure"),
        (
            [["reply", {"status": "retry", "countdown": 600}]],
            r"\[ID\] retry: Retry in 600",
            "task_retry",
        ),
        ([["throttle", 1, 600]], r"\[ID\] retry: Retry in 600", "task_retry"),
    ],
    ids=["error", "fault", "lost", "retry", "throttled"],
)
def test_every_other_end_is_traced(
    shared_worker: Place, steps: list[Any], says: str, signal: str
) -> None:
    place = shared_worker
    job = place.send(*steps)
    place.says(says.replace("ID", job))
    wait_for(partial(place.noted, signal, job), f"the signal {signal}")


def test_a_retry_has_its_count(shared_worker: Place, tmp_path: Path) -> None:
    place = shared_worker
    job = place.send(
        ["append", str(tmp_path / "runs")], ["reply", {"status": "retry", "countdown": 0}]
    )
    place.says(rf"do\.ignored\[{job}\] raised unexpected: ChildTaskError")
    assert (tmp_path / "runs").read_text() == "run\n" * 2, "max_retries is 1"


def test_throttling_uses_up_no_retry(shared_worker: Place) -> None:
    place = shared_worker
    job = place.send(["throttle", 3, 0])
    place.says(rf"\[{job}\] succeeded in [^\n]*: {{'throttles': 3, 'retries': 0}}")


def test_autoretry(shared_worker: Place, tmp_path: Path) -> None:
    place = shared_worker
    path = str(tmp_path / "runs")
    job = place.send(["append", path], ["reply", {"status": "error"}], name="do.again")
    place.says(rf"do\.again\[{job}\] raised unexpected: ChildTaskError")
    assert Path(path).read_text() == "run\n" * 2


def test_time_limits(shared_worker: Place, tmp_path: Path) -> None:
    place = shared_worker
    job = place.send(["wait", "/nowhere"], time_limit=0.3)
    place.says(rf"Hard time limit \(0\.3s\) exceeded for do\.ignored\[{job}\]")
    wait_for(partial(place.noted, "task_failure", job), "the signal")


def test_a_revoke(shared_worker: Place, tmp_path: Path) -> None:
    place = shared_worker
    begun = tmp_path / "begun"
    job = place.send(["touch", str(begun)], ["wait", "/nowhere"], name="do.late")
    wait_for(begun.exists, "its begin")
    place.project.app.control.revoke(job, terminate=True, destination=[place.project.node])
    wait_for(partial(place.noted, "task_revoked", job), "the signal")


def test_a_link_is_followed(shared_worker: Place, tmp_path: Path) -> None:
    place = shared_worker
    path = str(tmp_path / "next")
    step = place.project.app.signature(
        "do.ignored", ([["touch", path], ["reply", {}]],), immutable=True
    )
    place.send(["reply", {}], link=step)
    wait_for(Path(path).exists, "the next one")


FAILING = """
import folder_broker
class Backend(folder_broker.Backend):
    def store_result(self, task_id, result, state, *args, **kwargs):
        if state == "SUCCESS" and result == "refused":
            raise ValueError("the backend refuses it")
        return super().store_result(task_id, result, state, *args, **kwargs)
app.conf.result_backend = app.conf.result_backend.replace("folder_broker:", "proj:")
"""


def test_a_result_that_cannot_be_stored_fails_the_job_as_ever(tmp_path: Path) -> None:
    children = {"obeys": {"argv": python_child("obeys"), "tasks": ["do.it"]}}
    project = Project(tmp_path, conf={"subproc_pool": {"children": children}}, code=FAILING)
    with project.worker("-P", "subproc", "-c", "1") as worker:
        result = project.app.send_task("do.it", [[["reply", {"result": "refused"}]]])
        with pytest.raises(ValueError, match="the backend refuses it"):
            result.get(timeout=DEADLINE, interval=0.02)
        result = project.app.send_task("do.it", [[["reply", {"result": "stored"}]]])
        assert result.get(timeout=DEADLINE, interval=0.02) == "stored"
        # Celery is told after the result was stored.
        line = rf"\[{result.id}\] succeeded in [\d.e-]+s: 'stored'"
        wait_for(lambda: re.search(line, worker.log), "the line")


def test_progress_is_stored_where_nobody_else_watches(tmp_path: Path) -> None:
    perl = {"argv": ["perl", str(CHILDREN / "follow.pl")], "tasks": [], "handshake": True}
    project = Project(tmp_path, conf={"subproc_pool": {"children": {"perl": perl}}})
    with project.worker("-P", "subproc", "-c", "1"):
        result = project.app.send_task("perl.follow", [1, str(tmp_path)])
        wait_for(lambda: result.state == "PROGRESS", "its progress")
        assert result.info == {"done": 1, "of": 1}
        (tmp_path / "1").touch()
        assert result.get(timeout=DEADLINE, interval=0.02) == 1


def test_a_warm_shutdown_waits_for_it(tmp_path: Path) -> None:
    children = {"obeys": {"argv": python_child("obeys"), "tasks": ["do.*"]}}
    code = CODE.format(path=str(tmp_path / "notes"))
    project = Project(tmp_path, conf={"subproc_pool": {"children": children}}, code=code)
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with project.worker("-P", "subproc", "-c", "1") as worker:
        place = Place(project, worker, tmp_path / "notes")
        job = place.send(["touch", str(begun)], ["wait", str(gate)], ["reply", {"status": "error"}])
        wait_for(begun.exists, "its begin")
        worker.process.terminate()
        place.says("Warm shutdown")
        gate.touch()
        assert worker.process.wait(30) == 0
        place.says(rf"\[{job}\] raised unexpected: ChildTaskError")
