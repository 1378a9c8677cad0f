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
from celery import Celery, Task
from celery.exceptions import Ignore, Reject, Retry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_subproc_pool.errors import CallError
from celery_subproc_pool.python_child.codec import (
    End,
    call,
    decode_end,
    encode_call,
    encode_end,
    encode_task,
    name_of,
    recipe_of,
    task_arguments,
)
from celery_subproc_pool.wire.python import Returned, Traced, decode_request, decode_traced

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
OTHERS = (
    st.datetimes()
    | st.decimals(allow_nan=False)
    | st.binary()
    | st.uuids()
    | st.sets(st.integers())
    | st.text(st.characters(categories=["Cs"]), min_size=1)
    | st.dictionaries(st.integers(), st.text(), min_size=1)
)


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
def test_a_message_arrives_as_it_came(headers: Any, body: Any, content_encoding: str) -> None:
    headers.pop("args", None)
    headers.pop("kwargs", None)
    sent = ("a.task", "the id", {**headers, "args": (1,), "kwargs": {}}, body)
    name, task_id, request, received, *content = there_and_back(*sent, "text/x", content_encoding)
    assert (name, task_id, content) == ("a.task", "the id", ["text/x", content_encoding])
    assert request == headers
    # Text that is marked as such may come decoded: kombu takes either.
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


def test_a_body_that_was_deserialized_already() -> None:
    """As Celery has it for messages of its first protocol."""
    body = ([decimal.Decimal("1.5")], {"when": datetime.date(2026, 11, 23)}, {})
    assert there_and_back("a", "the id", {"id": "x"}, body, None, None)[3] == body


def test_a_memoryview_is_a_body_too() -> None:
    for headers in ({}, {"when": datetime.datetime(2026, 11, 23)}):
        found = there_and_back("a", "the id", headers, memoryview(b"\xff1"), "x", "binary")
        assert found[3] == b"\xff1"


def test_what_cannot_leave_the_process_is_an_error() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        encode_task("x", ("a", "x", {"lock": lambda: None}, "[]", "json", "utf-8"))


# -- ends


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
def test_a_success_keeps_its_words(app: Celery, text: str, runtime: float) -> None:
    assert end_of(app, End(False, (0, text, runtime))) == End(False, (0, text, runtime))


def test_a_success_may_have_words_that_utf8_lacks(app: Celery) -> None:
    assert end_of(app, End(False, (0, "\ud800", 0.1))).result[1] == "\\ud800"


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Refuses(Reject):
    """A project's own kind of Celery's exception."""


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
def test_an_exception_keeps_its_type_and_words(app: Celery, exc: Exception, escaped: bool) -> None:
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


def test_a_memory_error_does_not_reach_celery_which_would_end_the_worker(app: Celery) -> None:
    for escaped in (False, True):
        einfo = raised(MemoryError("none left"))
        end = end_of(app, End(escaped, einfo if escaped else (1, einfo, 0.5)))
        exc = (end.result if escaped else end.result[1]).exception
        assert not isinstance(exc, MemoryError)
        assert str(exc) == "the task ran out of memory: none left"


def test_an_odd_time_of_a_retry_stays_words(app: Celery) -> None:
    retry = Retry("why", when=datetime.timedelta(seconds=3))
    found = end_of(app, End(False, (1, raised(retry), None))).result[1].exception
    assert (found.message, found.when) == ("why", "datetime.timedelta(seconds=3)")


def test_celerys_own_exceptions_mean_the_same(app: Celery) -> None:
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
def test_an_exception_that_is_hard_to_send_arrives_curtailed(app: Celery, exc: Exception) -> None:
    line = encode_end(app, "the id", End(False, (1, raised(exc), None)))
    assert len(line) < 2_000_000
    found = end_of(app, End(False, (1, raised(exc), None))).result[1].exception
    assert isinstance(found, type(exc))


def test_a_class_that_the_worker_lacks_is_replaced_by_one_of_its_name(app: Celery) -> None:
    reply = decode_traced(
        b'{"id":"x","status":"traced",'
        b'"raised":{"type":"CardError","module":"billing","args":["no funds"]}}'
    )
    assert isinstance(reply, Traced)
    found = decode_end(app, reply).result[1].exception
    assert (type(found).__name__, found.args) == ("CardError", ("no funds",))


def test_what_is_no_exception_is_not_made(app: Celery) -> None:
    reply = decode_traced(
        b'{"id":"x","status":"traced","raised":{"type":"getcwd","module":"os","args":[]}}'
    )
    assert isinstance(reply, Traced)
    assert "Expected an exception class" in str(decode_end(app, reply).result[1].exception)


# -- callables that are no tasks


def collect(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def called(target: Any, *args: Any, **kwargs: Any) -> Any:
    line = encode_call("the id", target, args, kwargs)
    assert line.count(b"\n") == 1
    return call(decode_request(line[:-1]))


@unhurried
@given(values=st.lists(JSON | OTHERS, max_size=3))
def test_a_callable_gets_its_arguments_as_they_are(values: list[Any]) -> None:
    assert called(collect, *values, more=values) == (tuple(values), {"more": values})


def test_a_callable_that_cannot_be_pickled_is_blamed() -> None:
    for arguments, words in (
        ((lambda: None,), "as the callable can't be pickled"),
        ((collect, 1, (lambda: None)), r"as args\[1\] can't be pickled"),
    ):
        with pytest.raises(CallError, match=words):
            called(*arguments)
    with pytest.raises(CallError, match=r"as kwargs\['key'\] can't be pickled"):
        called(collect, key=lambda: None)


class OnlyOnce:
    """Of all times that it is pickled, fails the first."""

    def __init__(self) -> None:
        self.times = 0

    def __reduce__(self) -> Any:
        self.times += 1
        if self.times == 1:
            raise ValueError("not now")
        return OnlyOnce, ()


def test_what_is_hard_to_blame_is_an_error_too() -> None:
    with pytest.raises(CallError, match="as all of it together can't be pickled: ValueError: not"):
        called(collect, OnlyOnce())


def test_names_of_callables_are_one_line_of_ascii() -> None:
    assert name_of(collect) == f"{__name__}.collect"
    assert name_of([].append) == "None.list.append"
    assert name_of(None) == "builtins.NoneType"
    odd = type("Odd\n\x1b", (), {"__module__": "ü"})()
    assert name_of(odd) == "\\xfc.Odd\\n\\x1b"


@unhurried
@given(value=JSON)
def test_what_json_holds_is_returned_as_it_is(app: Celery, value: Any) -> None:
    if value not in (float("inf"), float("-inf")) and "inf" not in repr(value):
        assert end_of(app, End(False, value, returned=True)) == End(False, value, returned=True)


@unhurried
@given(value=OTHERS)
def test_anything_else_is_returned_as_words(app: Celery, value: Any) -> None:
    found = end_of(app, End(False, value, returned=True)).result
    assert found == repr(value).encode("utf-8", "backslashreplace").decode()


def test_a_tuple_is_returned_as_a_list(app: Celery) -> None:
    assert end_of(app, End(False, (1, (2,)), returned=True)).result == [1, [2]]


def test_what_is_too_long_for_a_line_is_returned_as_the_start_of_its_words(app: Celery) -> None:
    line = encode_end(app, "the id", End(False, "x" * 2**25, returned=True))
    assert len(line) < 2**21
    circle: list[Any] = []
    circle.append(circle)
    assert end_of(app, End(False, circle, returned=True)).result == "[[...]]"


# -- recipes


def test_only_what_can_be_made_anew_has_a_recipe(app: Celery) -> None:
    from tests.support import embedded_tasks

    app.task(embedded_tasks.plain, name="recipes.plain", bind=True)
    app.register_task(embedded_tasks.PlainClass())

    @app.task(name="recipes.closure")
    def closure() -> None: ...

    class Local(Task):
        name = "recipes.local"

    app.register_task(Local())
    app.finalize()
    with_recipe = {name for name, task in app.tasks.items() if recipe_of(task) is not None}
    assert {"recipes.plain", "plain.class"} <= with_recipe
    assert not {"recipes.closure", "recipes.local"} & with_recipe
