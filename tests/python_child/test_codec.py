"""Task messages on their way to a Python child and back, without a process."""

from __future__ import annotations

import datetime
import decimal
import pickle
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry
from hypothesis import given
from hypothesis import strategies as st

from celery_subproc_pool.python_child.codec import (
    End,
    decode_end,
    encode_end,
    encode_task,
    task_arguments,
)
from celery_subproc_pool.wire.python import Returned, Traced, decode_request, decode_traced
from tests.support.strategies import JSON, OTHERS, unhurried


@pytest.fixture(scope="module")
def app() -> Iterator[Celery]:
    with Celery("messages", backend="cache+memory://", set_as_current=False) as app:
        yield app


def there_and_back(*arguments: Any) -> tuple[Any, ...]:
    line = encode_task("the id", arguments)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return task_arguments(decode_request(line[:-1]))


@unhurried
@given(headers=st.dictionaries(st.text(), JSON | OTHERS, max_size=5), body=st.text() | st.binary())
@pytest.mark.parametrize("content_encoding", ["utf-8", "binary"])
def test_a_task_message_arrives_unchanged(headers: Any, body: Any, content_encoding: str) -> None:
    headers.pop("args", None)
    headers.pop("kwargs", None)
    sent = ("a.task", "the id", {**headers, "args": (1,), "kwargs": {}}, body)
    name, task_id, request, received, *content = there_and_back(*sent, "text/x", content_encoding)
    assert (name, task_id, content) == ("a.task", "the id", ["text/x", content_encoding])
    assert request == headers
    # A body marked as utf-8 may arrive as str: kombu takes either.
    assert received in (
        body,
        body.decode() if is_text(body) and content_encoding != "binary" else body,
    )
    if content_encoding == "binary":
        assert type(received) is type(body)


def is_text(body: Any) -> bool:
    try:
        return isinstance(body, bytes) and body.decode() is not None
    except UnicodeDecodeError:
        return False


def test_a_body_that_is_already_deserialized_arrives_unchanged() -> None:
    """Celery passes such a body for messages of its first protocol."""
    body = ([decimal.Decimal("1.5")], {"when": datetime.date(2026, 11, 23)}, {})
    assert there_and_back("a", "the id", {"id": "x"}, body, None, None)[3] == body


def test_a_memoryview_body_arrives_as_bytes() -> None:
    for headers in ({}, {"when": datetime.datetime(2026, 11, 23)}):
        found = there_and_back("a", "the id", headers, memoryview(b"\xff1"), "x", "binary")
        assert found[3] == b"\xff1"


def test_a_request_that_cannot_be_pickled_is_an_error() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        encode_task("x", ("a", "x", {"lock": lambda: None}, "[]", "json", "utf-8"))


# -- the reply


def end_of(app: Celery, end: End) -> End:
    reply = decode_traced(encode_end(app, "the id", end)[:-1])
    assert isinstance(reply, (Traced, Returned))
    assert reply.id == "the id"
    return decode_end(app, reply)


def raised(exc: BaseException, internal: bool = False) -> ExceptionInfo:
    try:
        raise exc
    except BaseException:
        return ExceptionInfo(internal=internal)


@unhurried
@given(text=st.text(), runtime=st.floats(0, 1e6))
def test_a_success_keeps_its_text_and_runtime(app: Celery, text: str, runtime: float) -> None:
    assert end_of(app, End(False, (0, text, runtime))) == End(False, (0, text, runtime))


def test_a_success_may_have_text_that_utf8_lacks(app: Celery) -> None:
    assert end_of(app, End(False, (0, "\ud800", 0.1))).result[1] == "\\ud800"


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Refuses(Reject):
    """A project's class that derives from an exception of Celery's."""


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize(
    "exc",
    [
        ValueError("a", 1, [None]),
        KeyError("k"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        OSError(2, "gone"),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_an_exception_keeps_its_type_and_text(app: Celery, exc: Exception, escaped: bool) -> None:
    einfo = raised(exc)
    end = end_of(app, End(escaped, einfo if escaped else (1, einfo, 0.5)))
    assert end.escaped == escaped
    found = end.result if escaped else end.result[1]
    assert isinstance(
        found.exception, type(exc) if not isinstance(exc, UnicodeError) else Exception
    )
    assert found.traceback == einfo.traceback
    if not isinstance(exc, UnicodeError):
        assert str(found.exception) == str(exc)
        assert repr(found.exception) == repr(exc)
    assert einfo.traceback in str(found.exception.__cause__)


def test_a_memory_error_becomes_an_error_that_does_not_end_the_worker(app: Celery) -> None:
    for escaped in (False, True):
        einfo = raised(MemoryError("none left"))
        end = end_of(app, End(escaped, einfo if escaped else (1, einfo, 0.5)))
        exc = (end.result if escaped else end.result[1]).exception
        assert not isinstance(exc, MemoryError)
        assert str(exc) == "the task ran out of memory: none left"


def test_an_odd_time_of_a_retry_becomes_its_repr(app: Celery) -> None:
    retry = Retry("why", when=datetime.timedelta(seconds=3))
    found = end_of(app, End(False, (1, raised(retry), None))).result[1].exception
    assert (found.message, found.when) == ("why", "datetime.timedelta(seconds=3)")


def test_celerys_own_exceptions_keep_their_meaning(app: Celery) -> None:
    retry = Retry("why", ValueError("cause"), 30)
    found = end_of(app, End(False, (1, raised(retry), None))).result[1].exception
    assert isinstance(found, Retry)
    assert (found.message, repr(found.exc), found.when) == ("why", "ValueError('cause')", 30)
    when = datetime.datetime(2026, 11, 23, tzinfo=datetime.timezone.utc)
    found = end_of(app, End(False, (1, raised(Retry(when=when)), None))).result[1].exception
    assert (found.exc, found.when) == (None, when)
    found = end_of(app, End(False, (1, raised(Retry(exc="in words")), None))).result[1].exception
    assert found.excs == "in words"
    for reject in (Reject("no", requeue=True), Refuses("no", requeue=True)):
        info = end_of(app, End(False, (1, raised(reject, internal=True), None))).result[1]
        assert isinstance(info.exception, Reject)
        assert (info.exception.reason, info.exception.requeue) == ("no", True)
        assert info.internal
    found = end_of(app, End(False, (1, raised(Ignore()), None))).result[1].exception
    assert isinstance(found, Ignore)


@pytest.mark.parametrize(
    "exc", [Odd(uuid.uuid4()), ValueError("x" * 5_000_000), ValueError("\ud800")]
)
def test_an_exception_that_is_hard_to_send_arrives_shortened(app: Celery, exc: Exception) -> None:
    line = encode_end(app, "the id", End(False, (1, raised(exc), None)))
    assert len(line) < 2_000_000
    found = end_of(app, End(False, (1, raised(exc), None))).result[1].exception
    assert isinstance(found, type(exc))


def test_an_exception_class_that_the_worker_lacks_is_made_by_name(app: Celery) -> None:
    reply = decode_traced(
        b'{"id":"x","status":"traced",'
        b'"raised":{"type":"CardError","module":"billing","args":["no funds"]}}'
    )
    assert isinstance(reply, Traced)
    found = decode_end(app, reply).result[1].exception
    assert (type(found).__name__, found.args) == ("CardError", ("no funds",))


def test_a_name_that_is_no_exception_class_is_refused(app: Celery) -> None:
    reply = decode_traced(
        b'{"id":"x","status":"traced","raised":{"type":"getcwd","module":"os","args":[]}}'
    )
    assert isinstance(reply, Traced)
    assert "Expected an exception class" in str(decode_end(app, reply).result[1].exception)


def test_the_value_of_a_call_is_marked_as_returned(app: Celery) -> None:
    assert end_of(app, End(False, [1, "two"], returned=True)) == End(False, [1, "two"], True)
