"""What a worker and its tracers tell each other, encoded and decoded. No process is started."""

from __future__ import annotations

import pytest

from celery_subproc_pool.errors import ProtocolFault
from celery_subproc_pool.wire.json_lines import encode
from celery_subproc_pool.wire.messages import CancelReason, Ok, encode_cancel
from celery_subproc_pool.wire.python import (
    Answer,
    Ask,
    Notice,
    Order,
    Released,
    TaskMessage,
    Traced,
    decode_notice,
    decode_of_asyncio_child,
    decode_of_tracer,
    decode_order,
    encode_abandon,
    encode_ask,
)


@pytest.mark.parametrize(
    "notice",
    [
        Notice(id="x", progress={"done": 1}),
        Notice(id="x", answer=Answer(reply=Ok(id="x", result=[1, None]), over=2.5)),
        Notice(id="x", answer=Answer(fault="it wrote rubbish")),
        Notice(id="x", probe="do.it"),
    ],
)
def test_a_tracer_reads_what_the_worker_writes(notice: Notice) -> None:
    assert decode_notice(encode(notice).rstrip(b"\n")) == notice


@pytest.mark.parametrize(
    "order",
    [
        Order(id="x", cancel=CancelReason.REVOKED),
        Order(id="x", payload=TaskMessage(task="aio.it", body="[]")),
    ],
)
def test_an_asyncio_child_reads_what_the_worker_writes(order: Order) -> None:
    assert decode_order(encode(order).rstrip(b"\n")) == order


def test_a_cancel_is_an_order() -> None:
    line = encode_cancel("x", CancelReason.SOFT_TIME_LIMIT)
    assert decode_order(line) == Order(id="x", cancel=CancelReason.SOFT_TIME_LIMIT)


@pytest.mark.parametrize("end", [Traced(id="x", result="1", runtime=0.5), Released(id="x")])
def test_the_worker_reads_how_a_coroutine_has_ended(end: Traced | Released) -> None:
    assert decode_of_asyncio_child(encode(end).rstrip(b"\n")) == end


@pytest.mark.parametrize("revoked", [True, False])
def test_a_tracer_is_told_that_a_job_has_ended_in_another_way(revoked: bool) -> None:
    line = encode_abandon("x", revoked)
    assert decode_notice(line.rstrip(b"\n")) == Notice(id="x", abandon=revoked)


def test_the_request_for_a_child_is_passed_on_as_it_is() -> None:
    request = b'{"id":"x","payload":{"args":[1.50]}}\n'
    ask = decode_of_tracer(encode_ask("x", request).rstrip(b"\n"))
    assert isinstance(ask, Ask)
    assert (ask.id, ask.line) == ("x", request)


@pytest.mark.parametrize("end", [Traced(id="x", result="1", runtime=0.5), Released(id="x")])
def test_the_worker_reads_how_a_trace_has_ended(end: Traced | Released) -> None:
    assert decode_of_tracer(encode(end).rstrip(b"\n")) == end


def test_what_no_tracer_writes_is_a_fault() -> None:
    with pytest.raises(ProtocolFault, match="Invalid value 'ok'"):
        decode_of_tracer(b'{"id":"x","status":"ok"}')
