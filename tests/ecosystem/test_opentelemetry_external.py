"""OpenTelemetry's own instrumentation sees external tasks, and their children join its traces.

The project is set up by the example of docs/protocol.md, with another exporter.
"""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.basics import CHILDREN, wait_for
from tests.support.workplace import Workplace, get

pytest.importorskip("opentelemetry.sdk")
pytest.importorskip("opentelemetry.instrumentation.celery")
pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("no_garbage_collection")]

ROOT = Path(__file__).parents[2]

#: Each process has a file of its own, with a span on each line.
EXPORTER = """ConsoleSpanExporter(
    out=open(f"spans-{__import__('os').getpid()}", "a"),
    formatter=lambda span: span.to_json(indent=None) + "\\n",
)"""

TASKS = """
@app.task(base=SubprocTask, name="perl.quiet", ignore_result=True)
def quiet(*args): ...
class Spanned(SubprocTask):
    abstract = True
    def __call__(self, *args, **kwargs):
        with trace.get_tracer("proj").start_as_current_span("own " + self.request.id):
            return super().__call__(*args, **kwargs)
@app.task(base=Spanned, name="perl.spanned")
def spanned(*args): ...
@app.task(name="relay")
def relay(task_id):
    quiet.apply_async(["ok"], task_id=task_id)
"""

POOL = ("-P", "subproc")
#: How many jobs are in the tracer at a time.
AT_ONCE = 6


def example() -> str:
    """Return the code of the document's example, with the exporter of these tests."""
    text = (ROOT / "docs" / "protocol.md").read_text()
    code = text.partition("\n### Joining a trace\n")[2].split("```python\n")[1].split("```")[0]
    assert code.count("ConsoleSpanExporter()") == 1
    return code.replace("ConsoleSpanExporter()", EXPORTER)


@pytest.fixture
def work(tmp_path: Path, broker: str) -> Iterator[Workplace]:
    """Return a project with perl children and one tracer."""
    perl = {
        "argv": ["perl", str(CHILDREN / "join_trace.pl")],
        "tasks": ["perl.*", "perl.it"],
        "env": {"LOG": str(tmp_path / "seen")},
    }
    settings = {"children": {"perl": perl}, "tracers": {"size": 1}, "python": {"size": 1}}
    code = example() + TASKS
    with closing(Workplace(tmp_path, broker, code, subproc_pool=settings)) as workplace:
        yield workplace


class Span(NamedTuple):
    """A span that a process of the project has exported."""

    #: What, and the name of a task.
    name: str
    #: PRODUCER, CONSUMER or INTERNAL.
    kind: str
    #: The id of the task, if an instrumentation has made it.
    task_id: str | None
    trace_id: str
    span_id: str
    #: The span that it is a part of.
    parent: str | None
    status: str
    #: How the task ended.
    state: str | None
    #: The process.
    pid: int


def span(pid: int, line: str) -> Span:
    """Return what a process has exported on a line."""
    facts = json.loads(line)
    context, attributes, above = facts["context"], facts["attributes"], facts["parent_id"]
    return Span(
        facts["name"],
        facts["kind"].removeprefix("SpanKind."),
        attributes.get("messaging.message.id"),
        context["trace_id"].removeprefix("0x"),
        context["span_id"].removeprefix("0x"),
        above and above.removeprefix("0x"),
        facts["status"]["status_code"],
        attributes.get("celery.state"),
        pid,
    )


def spans(work: Workplace) -> list[Span]:
    """Return all that was exported, in the order of the ends in each process."""
    paths = work.log.parent.glob("spans-*")
    return [
        span(int(path.name.removeprefix("spans-")), line)
        for path in paths
        for line in path.read_text().splitlines()
    ]


def seen(work: Workplace) -> list[tuple[str, str, str]]:
    """Return what children were told: the id of a task, a trace and a span there."""
    path = work.log.parent / "seen"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        task_id, parent = line.split()
        _, trace_id, span_id, _ = parent.split("-")
        found.append((task_id, trace_id, span_id))
    return found


class Client:
    """A client with a span of its own, in which it sends a task."""

    def __init__(self) -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        self.headers = {"traceparent": f"00-{self.trace_id}-{self.span_id}-01"}


#: For each way in which a job ends: what the child is told, and the task's options; then the span's
#: status, and the task's state.
ENDS = {
    "succeeds": (["ok"], {}, "UNSET", "SUCCESS"),
    "fails": (["error"], {}, "ERROR", "FAILURE"),
    # The worker ends these. No code in the tracer knows how they ended.
    "is lost": (["exit"], {}, "UNSET", None),
    "is over its limit": (["ok", "/nowhere/gate"], {"time_limit": 1}, "UNSET", None),
}


@pytest.mark.parametrize("name", ["perl.it", "perl.quiet"])
def test_an_external_task_is_one_span_and_its_child_joins_it(work: Workplace, name: str) -> None:
    clients = {}
    with work.project.worker(*POOL, "-c", "1") as worker:
        [tracer] = [process.pid for process in worker.tracers()]
        for how, (args, options, *_) in ENDS.items():
            client = Client()
            result = work.app.send_task(name, args, headers=client.headers, **options)
            clients[result.id] = how, client
        wait_for(lambda: f"exceeded for {name}[{result.id}]" in worker.log, "the last end")
        assert worker.stop() == 0
    found = {each.task_id: each for each in spans(work)}
    assert len(found) == len(spans(work)) == len(ENDS)
    for task_id, (how, client) in clients.items():
        own = found[task_id]
        assert (own.name, own.kind, own.pid) == (f"run/{name}", "CONSUMER", tracer)
        assert (own.trace_id, own.parent) == (client.trace_id, client.span_id)
        assert (own.status, own.state) == ENDS[how][2:]
    told = [(each.task_id, each.trace_id, each.span_id) for each in map(found.get, clients)]
    assert seen(work) == told
    assert "detach context" not in worker.log


def test_a_task_that_is_sent_again_stays_in_its_trace(work: Workplace) -> None:
    client = Client()
    with work.project.worker(*POOL, "-c", "1") as worker:
        get(work.app.send_task("perl.it", ["throttled"], headers=client.headers))
        assert worker.stop() == 0
    [again] = [each for each in spans(work) if each.kind == "PRODUCER"]
    first, second = [each for each in spans(work) if each.kind == "CONSUMER"]
    assert {again.trace_id, first.trace_id, second.trace_id} == {client.trace_id}
    assert (first.state, first.status) == ("RETRY", "UNSET")
    assert [first.parent, again.parent, second.parent] == [
        client.span_id,
        first.span_id,
        again.span_id,
    ]
    assert [span_id for _, _, span_id in seen(work)] == [first.span_id, second.span_id]


def test_a_trace_leads_from_a_python_task_to_a_child_of_another_language(work: Workplace) -> None:
    with work.project.worker(*POOL, "-c", "2") as worker:
        task_id = str(uuid.uuid4())
        work.app.send_task("relay", [task_id])
        wait_for(lambda: f"perl.quiet[{task_id}] succeeded" in worker.log, "its end")
        assert worker.stop() == 0
    found = {each.name: each for each in spans(work)}
    relay, sent, run = (
        found[name] for name in ("run/relay", "apply_async/perl.quiet", "run/perl.quiet")
    )
    assert [relay.parent, sent.parent, run.parent] == [None, relay.span_id, sent.span_id]
    assert relay.pid == sent.pid != run.pid
    assert seen(work) == [(task_id, relay.trace_id, run.span_id)]


def test_spans_of_jobs_that_one_tracer_has_at_a_time_do_not_mix(
    work: Workplace, tmp_path: Path
) -> None:
    clients = {}
    gate = tmp_path / "gate"
    with work.project.worker(*POOL, "-c", str(AT_ONCE)) as worker:
        for number in range(AT_ONCE):
            # Without a client's span, the parent is the current one: there must be none.
            client = Client() if number % 2 else None
            headers = client.headers if client else {}
            result = work.app.send_task("perl.spanned", ["ok", str(gate)], headers=headers)
            clients[result] = client
        wait_for(lambda: len(seen(work)) == AT_ONCE, "all jobs in children")
        gate.touch()
        for result in clients:
            get(result)
        assert worker.stop() == 0
    found = spans(work)
    runs = {each.task_id: each for each in found if each.kind == "CONSUMER"}
    own = {each.name.removeprefix("own "): each for each in found if each.kind == "INTERNAL"}
    assert len(found) == len(runs) + len(own) == 2 * AT_ONCE
    assert len({each.trace_id for each in runs.values()}) == AT_ONCE
    for result, client in clients.items():
        run = runs[result.id]
        if client is None:
            assert run.parent is None
        else:
            assert (run.trace_id, run.parent) == (client.trace_id, client.span_id)
        assert own[result.id].parent == run.span_id
    told = [(task_id, each.trace_id, each.span_id) for task_id, each in own.items()]
    assert sorted(seen(work)) == sorted(told)
