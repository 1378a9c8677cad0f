"""Calls of callables that are not tasks, to a Python child and back, without a process."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from celery_subproc_pool.errors import CallError
from celery_subproc_pool.python_child.calls import (
    call,
    decode_returned,
    encode_call,
    encode_returned,
    name_of,
)
from celery_subproc_pool.wire.python import Returned, decode_request, decode_traced
from tests.support.strategies import JSON, OTHERS, unhurried


def collect(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def called(target: Any, *args: Any, **kwargs: Any) -> Any:
    line = encode_call("the id", target, args, kwargs)
    assert line.count(b"\n") == 1
    return call(decode_request(line[:-1]))


def returned(value: Any) -> Any:
    reply = decode_traced(encode_returned("the id", value)[:-1])
    assert isinstance(reply, Returned)
    assert reply.id == "the id"
    return decode_returned(reply)


# -- the request


@unhurried
@given(values=JSON | OTHERS)
def test_a_callable_gets_its_arguments_unchanged(values: Any) -> None:
    assert called(collect, values, 1, more=values) == ((values, 1), {"more": values})


def test_the_error_names_what_cannot_be_pickled() -> None:
    for arguments, words in (
        ((lambda: None,), "as the callable can't be pickled"),
        ((collect, 1, (lambda: None)), r"as args\[1\] can't be pickled"),
    ):
        with pytest.raises(CallError, match=words):
            called(*arguments)
    with pytest.raises(CallError, match=r"as kwargs\['key'\] can't be pickled"):
        called(collect, key=lambda: None)


class FailsOnce:
    """Can't be pickled the first time."""

    def __init__(self) -> None:
        self.times = 0

    def __reduce__(self) -> Any:
        self.times += 1
        if self.times == 1:
            raise ValueError("not now")
        return FailsOnce, ()


def test_an_argument_that_fails_only_once_is_still_an_error() -> None:
    with pytest.raises(CallError, match="as all of it together can't be pickled: ValueError: not"):
        called(collect, FailsOnce())


def test_a_callable_that_the_child_cannot_load_is_an_error() -> None:
    line = encode_call("the id", collect, (), {}).replace(b"the id", b"other")
    request = decode_request(line[:-1])
    assert request.payload.call is not None
    broken = request.payload.call.replace(b"collect", b"nothing")
    payload = type(request.payload)(task="a name", call=broken)
    with pytest.raises(CallError, match="the Python child can't load a name and its arguments: "):
        call(type(request)(id="the id", payload=payload))


def test_names_of_callables_are_one_line_of_ascii() -> None:
    assert name_of(collect) == f"{__name__}.collect"
    assert name_of([].append) == "None.list.append"
    assert name_of(None) == "builtins.NoneType"
    odd = type("Odd\n\x1b", (), {"__module__": "ü"})()
    assert name_of(odd) == "\\xfc.Odd\\n\\x1b"


# -- the reply


@unhurried
@given(value=JSON)
def test_what_json_holds_is_returned_unchanged(value: Any) -> None:
    if "inf" not in repr(value):
        assert returned(value) == value


@unhurried
@given(value=OTHERS)
def test_anything_else_is_returned_as_its_repr(value: Any) -> None:
    assert returned(value) == repr(value).encode("utf-8", "backslashreplace").decode()


def test_a_tuple_is_returned_as_a_list() -> None:
    assert returned((1, (2,))) == [1, [2]]


def test_a_value_too_long_for_a_line_is_returned_as_the_start_of_its_repr() -> None:
    assert len(encode_returned("the id", "x" * 2**25)) < 2**21


def test_a_value_that_refers_to_itself_is_returned_as_its_repr() -> None:
    circle: list[Any] = []
    circle.append(circle)
    assert returned(circle) == "[[...]]"
