"""What wraps the body of a task sees how its coroutine ends: pydantic, Sentry, OpenTelemetry."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import celery
import pytest

from tests.support.basics import DEADLINE, wait_for
from tests.support.worker import HEADER, Project
from tests.support.workplace import Workplace, get

from .sink import http_sink
from .test_opentelemetry_external import example, spans

pytest.importorskip("sentry_sdk")
pytest.importorskip("opentelemetry.instrumentation.celery")
pytest.importorskip("pydantic")
pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("no_garbage_collection")]

POOL = ("-P", "celery_subproc_pool:Pool", "-c", "20")

# -- pydantic

PYDANTIC = """
from pydantic import BaseModel
class Order(BaseModel):
    number: int
class Receipt(BaseModel):
    number: int
    paid: bool
@app.task(name="aio.pay", pydantic=True)
async def pay(order: Order) -> Receipt:
    assert isinstance(order, Order)
    return Receipt(number=order.number, paid=True)
@app.task(name="aio.pay_again", pydantic=True, bind=True, autoretry_for=(KeyError,),
          retry_kwargs={"countdown": 0.3})
async def pay_again(self, order: Order) -> Receipt:
    if not self.request.retries:
        raise KeyError("not yet")
    return Receipt(number=order.number, paid=True)
"""


@pytest.mark.skipif(celery.VERSION < (5, 5), reason="Celery has no pydantic=True then")
@pytest.mark.parametrize("name", ["aio.pay", "aio.pay_again"])
def test_pydantic_gets_the_result_and_not_the_coroutine(tmp_path: Path, name: str) -> None:
    project = Project(tmp_path, code=PYDANTIC)
    with project.worker(*POOL):
        result = project.app.send_task(name, [{"number": 17}])
        assert result.get(timeout=DEADLINE, interval=0.02) == {"number": 17, "paid": True}


# -- Sentry

SENTRY_CODE = """
import asyncio
@app.task(name="aio.good", ignore_result=True)
async def good(seconds):
    await asyncio.sleep(seconds)
@app.task(name="aio.bad")
async def bad(word):
    await asyncio.sleep(0.01)
    raise ValueError(word)
"""


class SentryProject(Project):
    """A project that starts Sentry's client first."""

    def __init__(self, directory: Path, dsn: str) -> None:
        self._dsn = dsn
        super().__init__(directory, code=SENTRY_CODE)

    def _write(self, code: str, **facts: Any) -> None:
        init = f'import sentry_sdk\nsentry_sdk.init("{self._dsn}", traces_sample_rate=1.0)\n'
        (self.directory / "proj.py").write_text(init + HEADER.format(**facts) + code)


def test_sentry_sees_how_a_coroutine_ended_and_how_long_it_took(tmp_path: Path) -> None:
    with http_sink() as sink:
        project = SentryProject(tmp_path, sink.sentry_dsn)
        with project.worker(*POOL):
            for _ in range(5):
                project.app.send_task("aio.good", [0.3])
            failed = project.app.send_task("aio.bad", ["boom"])
            wait_for(lambda: len(sink.sentry_items("transaction")) == 6, "the transactions")
            wait_for(lambda: sink.sentry_items("event"), "the event")
        transactions = sink.sentry_items("transaction")
        [event] = sink.sentry_items("event")
    assert event["exception"]["values"][-1]["value"] == "boom"
    assert event["tags"]["celery_task_id"] == failed.id
    frames = event["exception"]["values"][-1]["stacktrace"]["frames"]
    assert frames[-1]["function"] == "bad"
    statuses = {}
    for transaction in transactions:
        # The body's own span is as long as the coroutine.
        if transaction["transaction"] == "aio.good":
            assert _seconds(transaction) >= 0.3
        statuses.setdefault(transaction["transaction"], []).append(
            transaction["contexts"]["trace"]["status"]
        )
    assert statuses == {"aio.good": ["ok"] * 5, "aio.bad": ["internal_error"]}


def _seconds(transaction: dict[str, Any]) -> float:
    from datetime import datetime

    begin, end = (
        datetime.fromisoformat(transaction[name].replace("Z", "+00:00"))
        for name in ("start_timestamp", "timestamp")
    )
    return (end - begin).total_seconds()


# -- OpenTelemetry

SPANS = """
import asyncio
@app.task(name="aio.spanned", bind=True)
async def spanned(self):
    tracer = trace.get_tracer("proj")
    with tracer.start_as_current_span("own " + self.request.id):
        await asyncio.sleep(0.05)
        with tracer.start_as_current_span("inner " + self.request.id):
            await asyncio.sleep(0.01)
"""


def test_spans_of_many_coroutines_are_not_mixed_up(tmp_path: Path, broker: str) -> None:
    settings = {"python": {"size": 1}}
    with closing(Workplace(tmp_path, broker, example() + SPANS, subproc_pool=settings)) as place:
        with place.project.worker(*POOL):
            results = [place.app.send_task("aio.spanned") for _ in range(10)]
            for result in results:
                get(result)
        found = spans(place)
    for result in results:
        [consumer] = [s for s in found if s.kind == "CONSUMER" and s.task_id == result.id]
        [own] = [s for s in found if s.name == f"own {result.id}"]
        [inner] = [s for s in found if s.name == f"inner {result.id}"]
        assert own.parent == consumer.span_id
        assert inner.parent == own.span_id
        assert {own.trace_id, inner.trace_id} == {consumer.trace_id}
