"""The protocol's messages, encoded and decoded. No process is started."""

from __future__ import annotations

import copy
import enum
import json
import pickle
import sys
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from celery_subproc_pool.errors import ChildTaskError, ProtocolFault, RequestEncodeError
from celery_subproc_pool.wire.json_lines import is_explained
from celery_subproc_pool.wire.lines import LineBuffer
from celery_subproc_pool.wire.messages import (
    Error,
    Ignore,
    Ok,
    Reject,
    Reply,
    Retry,
    Throttled,
    decode_reply,
    encode_request,
)
from celery_subproc_pool.wire.text import QUOTED_BYTES, quote
from celery_subproc_pool.worker.outcome import protocol_fault
from tests.support.strategies import unhurried

HUNDRED_YEARS = 100 * 365 * 86400

# -- replies

REPLIES = {
    "ok": (b'{"id":"x","status":"ok"}', Ok(id="x", result=None)),
    "ok with a result": (
        b'{"id":"x","status":"ok","result":{"a":[1,2.5,"\xc3\xa9",true,null]}}',
        Ok(id="x", result={"a": [1, 2.5, "é", True, None]}),
    ),
    "ok with null": (b'{"id":"x","status":"ok","result":null}', Ok(id="x", result=None)),
    "ok with a big integer": (
        b'{"status":"ok","result":' + b"9" * 40 + b"}",
        Ok(result=10**40 - 1),
    ),
    "ok with an escaped NUL": (rb'{"status":"ok","result":"\u0000"}', Ok(result="\0")),
    "ok with a surrogate pair": (rb'{"status":"ok","result":"\ud83d\ude00"}', Ok(result="😀")),
    "error": (b'{"id":"x","status":"error"}', Error(id="x")),
    "error with all": (
        b'{"id":"x","status":"error","message":"m","type":"T","traceback":"t"}',
        Error(id="x", message="m", type="T", traceback="t"),
    ),
    "error with nulls": (
        b'{"id":"x","status":"error","message":null,"type":null,"traceback":null}',
        Error(id="x"),
    ),
    "throttled": (b'{"id":"x","status":"throttled"}', Throttled(id="x")),
    "throttled for an integer": (
        b'{"id":"x","status":"throttled","retry_after_secs":5}',
        Throttled(id="x", retry_after_secs=5.0),
    ),
    "throttled for a fraction": (
        b'{"id":"x","status":"throttled","retry_after_secs":0.25}',
        Throttled(id="x", retry_after_secs=0.25),
    ),
    "throttled for no time": (
        b'{"id":"x","status":"throttled","retry_after_secs":0}',
        Throttled(id="x", retry_after_secs=0.0),
    ),
    "throttled for a hundred years": (
        b'{"status":"throttled","retry_after_secs":%d}' % HUNDRED_YEARS,
        Throttled(retry_after_secs=float(HUNDRED_YEARS)),
    ),
    "throttled with null": (
        b'{"id":"x","status":"throttled","retry_after_secs":null}',
        Throttled(id="x"),
    ),
    "retry": (b'{"id":"x","status":"retry"}', Retry(id="x")),
    "retry with all": (
        b'{"id":"x","status":"retry","countdown":1.5,"message":"m"}',
        Retry(id="x", countdown=1.5, message="m"),
    ),
    "retry with nulls": (
        b'{"id":"x","status":"retry","countdown":null,"message":null}',
        Retry(id="x"),
    ),
    "reject": (b'{"id":"x","status":"reject"}', Reject(id="x", requeue=False)),
    "reject with requeue": (
        b'{"id":"x","status":"reject","requeue":true}',
        Reject(id="x", requeue=True),
    ),
    "ignore": (b'{"id":"x","status":"ignore"}', Ignore(id="x")),
    "no id": (b'{"status":"ok"}', Ok()),
    "the id is null": (b'{"id":null,"status":"ok"}', Ok()),
    "the status is not first": (b'{"result":1,"id":"x","status":"ok"}', Ok(id="x", result=1)),
    "unknown fields": (
        b'{"new":{"deep":[{}]},"id":"x","status":"ignore","other":1e5,"third":"\xc3\xa9"}',
        Ignore(id="x"),
    ),
    "fields of another reply": (b'{"status":"ignore","result":1}', Ignore()),
    "a carriage return before the newline": (b'{"status":"ok"}\r', Ok()),
    "white space": (b' {\t"status" : "ok" } ', Ok()),
    "a field twice: the last counts": (
        b'{"id":"a","id":"b","status":"ok","result":1,"result":2}',
        Ok(id="b", result=2),
    ),
}


@pytest.mark.parametrize(("line", "reply"), REPLIES.values(), ids=REPLIES)
def test_a_reply_is_decoded(line: bytes, reply: Reply) -> None:
    decoded = decode_reply(line)
    assert type(decoded) is type(reply)
    assert decoded == reply


def test_a_requeue_of_null_counts_as_false() -> None:
    reply = decode_reply(b'{"id":"x","status":"reject","requeue":null}')
    assert isinstance(reply, Reject)
    assert not reply.requeue


#: Lines that are no reply, and a part of the reason.
UNUSABLE = {
    "empty": (b"", "truncated"),
    "blank": (b" \t", "truncated"),
    "text": (b"Loading model...", "malformed"),
    "an unknown status": (b'{"status":"nope"}', "nope"),
    "a status in capitals": (b'{"status":"OK"}', "OK"),
    "no status": (b'{"id":"x"}', "status"),
    "a status of null": (b'{"status":null}', "status"),
    "a status that is a number": (b'{"status":1}', "status"),
    "two different statuses": (b'{"status":"error","status":"ok"}', "status"),
    "an id that is a number": (b'{"id":5,"status":"ok"}', "id"),
    "an id that is an array": (b'{"id":["x"],"status":"ok"}', "id"),
    "an array": (b"[]", "array"),
    "an array of a reply": (b'[{"status":"ok"}]', "array"),
    "a string": (b'"ok"', "str"),
    "an integer": (b"17", "int"),
    "a fraction": (b"1.5", "float"),
    "true": (b"true", "bool"),
    "null": (b"null", "null"),
    "two objects": (b'{"status":"ok"}{"status":"ok"}', "trailing"),
    "words after the object": (b'{"status":"ok"} done', "trailing"),
    "half an object": (b'{"status":"ok"', "truncated"),
    "a trailing comma": (b'{"status":"ok",}', "malformed"),
    "single quotes": (b"{'status':'ok'}", "malformed"),
    "a byte order mark": (b'\xef\xbb\xbf{"status":"ok"}', "a byte order mark (U+FEFF)"),
    "invalid UTF-8": (b"\xff\xfe", "utf-8"),
    "invalid UTF-8 in a known field": (b'{"status":"ok","result":"\xff"}', "utf-8"),
    "invalid UTF-8 in an unknown field": (b'{"status":"ok","other":"\xff"}', "utf-8"),
    "invalid UTF-8 in an unknown name": (b'{"status":"ok","\xff":1}', "utf-8"),
    "an encoded surrogate": (b'{"status":"ok","other":"\xed\xa0\x80"}', "utf-8"),
    "UTF-16": ('{"status":"ok"}'.encode("utf-16-le"), "malformed"),
    "UTF-16 with its mark": (
        '\ufeff{"status":"ok"}'.encode("utf-16-le"),
        "the byte order mark of UTF-16",
    ),
    "UTF-16, the other way round": (
        '\ufeff{"status":"ok"}'.encode("utf-16-be"),
        "the byte order mark of UTF-16",
    ),
    "a NUL": (b"\x00", "malformed"),
    "a NUL in a string": (b'{"status":"ok","other":"\x00"}', "malformed"),
    "a NUL at the end": (b'{"status":"ok"}\x00', "trailing"),
    "a lone high surrogate": (rb'{"status":"ok","result":"\ud800"}', "line"),
    "a lone low surrogate": (rb'{"status":"ok","result":"\udc00"}', "line"),
    "a lone surrogate in an unknown field": (rb'{"status":"ok","other":"\ud800"}', "line"),
    "deep nesting": (b"[" * 100_000, "array"),
    "deep nesting in a known field": (b'{"status":"ok","result":' + b"[" * 100_000, "nested"),
    "deep nesting in an unknown field": (
        b'{"status":"ok","other":' + b"[" * 100_000,
        # Since then, what bounds it is the size of the stack.
        "truncated" if sys.version_info >= (3, 14) else "nested",
    ),
    "negative seconds": (b'{"status":"throttled","retry_after_secs":-1}', ">= 0"),
    "a negative countdown": (b'{"status":"retry","countdown":-0.5}', ">= 0"),
    "seconds without end": (b'{"status":"throttled","retry_after_secs":1e300}', "<="),
    "more than a hundred years": (b'{"status":"retry","countdown":%d}' % (HUNDRED_YEARS + 1), "<="),
    "seconds that overflow": (b'{"status":"throttled","retry_after_secs":1e999}', "range"),
    "infinite seconds": (b'{"status":"throttled","retry_after_secs":Infinity}', "malformed"),
    "seconds that are not a number": (
        b'{"status":"throttled","retry_after_secs":NaN}',
        "malformed",
    ),
    "seconds as a string": (b'{"status":"throttled","retry_after_secs":"5"}', "retry_after_secs"),
    "seconds as a bool": (b'{"status":"throttled","retry_after_secs":true}', "retry_after_secs"),
    "a requeue that is a number": (b'{"status":"reject","requeue":1}', "requeue"),
    "a message that is a number": (b'{"status":"error","message":5}', "message"),
    "a result that overflows": (b'{"status":"ok","result":1e999}', "about 1.8e308"),
    "an integer of 5000 digits": (b'{"status":"ok","result":' + b"9" * 5000 + b"}", "4300 digits"),
    "a status of 100,000 bytes": (b'{"status":"' + b"x" * 100_000 + b'"}', "status"),
    "a status that forges a line": (rb'{"status":"a\nERROR forged\u001b[2J"}', "status"),
    "an unknown field of 100,000 bytes": (b'{"' + b"k" * 100_000 + b'":1}', "status"),
}

#: The quotation, with up to four characters for each byte, and room for the reason.
LONGEST_MESSAGE = 4 * QUOTED_BYTES + 1000


def is_one_safe_line(text: str) -> bool:
    return text.isprintable() and len(text.splitlines()) == 1


@pytest.mark.parametrize(("line", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_line_is_a_fault_that_quotes_its_start(line: bytes, reason: str) -> None:
    with pytest.raises(ProtocolFault) as caught:
        decode_reply(line)
    message = str(caught.value)
    assert reason in message
    assert message.endswith(f"in the line {quote(line)}")
    assert len(message) <= LONGEST_MESSAGE
    assert is_one_safe_line(message)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = [
    "id", "status", "result", "message", "type", "traceback",
    "retry_after_secs", "countdown", "requeue", "unknown",
]  # fmt: skip
STATUSES = ["ok", "error", "throttled", "retry", "reject", "ignore"]
ALMOST_REPLIES = st.builds(
    lambda status, rest: json.dumps({"status": status, **rest}).encode(),
    st.sampled_from(STATUSES),
    st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=4),
)
DAMAGED_REPLIES = st.builds(
    lambda line, at, junk: line[: at % len(line)] + junk + line[at % len(line) + 1 :],
    ALMOST_REPLIES,
    st.integers(0, 200),
    st.binary(max_size=2),
)


def reply_or_fault(line: bytes) -> Reply | ProtocolFault:
    try:
        return decode_reply(line)
    except ProtocolFault as fault:
        return fault


@unhurried
@given(line=st.binary() | ALMOST_REPLIES | DAMAGED_REPLIES)
@example(line=b'{"status":"\xf0\x9f\x98"}')
def test_any_line_is_a_reply_or_a_fault(line: bytes) -> None:
    decoded = reply_or_fault(line)
    if isinstance(decoded, ProtocolFault):
        assert len(str(decoded)) <= LONGEST_MESSAGE
        assert is_one_safe_line(str(decoded))
    else:
        assert isinstance(decoded, (Ok, Error, Throttled, Retry, Reject, Ignore))
        assert decoded.id is None or isinstance(decoded.id, str)


@unhurried
@given(
    chunks=st.lists(
        st.binary(max_size=60) | ALMOST_REPLIES.map(lambda line: line + b"\n") | st.just(b"\n"),
        max_size=8,
    )
)
def test_any_stream_gives_replies_or_faults(chunks: list[bytes]) -> None:
    buffer = LineBuffer(64)
    for line in (line for chunk in chunks for line in buffer.feed(chunk)):
        assert len(line) <= 64
        assert b"\n" not in line
        assert isinstance(reply_or_fault(line), (Reply, ProtocolFault))


# -- requests


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


MOMENT = datetime(2024, 1, 2, 3, 4, 5, 678000)
ZONED = MOMENT.replace(tzinfo=timezone(timedelta(hours=2)))

#: Values in Python, and in the request.
WRITTEN = {
    "None": (None, b"null"),
    "a bool": (True, b"true"),
    "a datetime": (MOMENT, b'"2024-01-02T03:04:05.678000"'),
    "a datetime in UTC": (MOMENT.replace(tzinfo=timezone.utc), b'"2024-01-02T03:04:05.678000Z"'),
    "a datetime with a zone": (ZONED, b'"2024-01-02T03:04:05.678000+02:00"'),
    "a date": (date(2024, 1, 2), b'"2024-01-02"'),
    "a time": (time(3, 4, 5), b'"03:04:05"'),
    "a UUID": (UUID(int=1), b'"00000000-0000-0000-0000-000000000001"'),
    "a Decimal": (Decimal("1.50"), b'"1.50"'),
    "bytes": (b"\x00\xff", b'"AP8="'),
    "a set": ({1}, b"[1]"),
    "a frozenset": (frozenset({"a"}), b'["a"]'),
    "a tuple": ((1, (2,)), b"[1,[2]]"),
    "an enum": (Colour.RED, b'"red"'),
    "an integer enum": (Level.HIGH, b"3"),
    "not a number": (float("nan"), b"null"),
    "infinity": (float("inf"), b"null"),
    "more than 64 bits": (2**64, b"18446744073709551616"),
    "a big integer": (10**40, b"1" + b"0" * 40),
    "a big negative integer": (-(10**40), b"-1" + b"0" * 40),
    "text beyond ASCII": ("é😀", '"é😀"'.encode()),
    "text with newlines": ("a\nb\r\x00", rb'"a\nb\r\u0000"'),
    "text with Unicode's line ends": (
        "a\u2028b\u2029c\x85\xa0\u201d",
        rb'"a\u2028b\u2029c\u0085' + '\xa0\u201d"'.encode(),
    ),
    "line ends in a key": ({"\u2028": "\\\x85"}, rb'{"\u2028":"\\\u0085"}'),
    "a key that is a number": ({1: 2}, b'{"1":2}'),
    "a key that is a date": ({date(2024, 1, 2): 1}, b'{"2024-01-02":1}'),
}


@pytest.mark.parametrize(("value", "written"), WRITTEN.values(), ids=WRITTEN)
def test_a_value_is_written(value: Any, written: bytes) -> None:
    line = encode_request("x", {"args": (value,)})
    assert line == b'{"id":"x","payload":{"args":[' + written + b"]}}\n"


def test_a_request_is_byte_for_byte_what_the_protocol_says() -> None:
    payload = {"task": "billing.charge", "args": (17,), "kwargs": {"currency": "EUR"}}
    assert encode_request("x", payload) == (
        b'{"id":"x","payload":{"task":"billing.charge","args":[17],"kwargs":{"currency":"EUR"}}}\n'
    )
    assert encode_request("x", {}) == b'{"id":"x","payload":{}}\n'


@unhurried
@given(value=JSON_VALUES)
def test_a_request_is_one_line_whatever_the_text(value: Any) -> None:
    line = encode_request("a\nb", {"args": [value, "\u2028\x85"], "a\nb": "\n"})
    assert line.endswith(b"}\n")
    # Also for readers that take other characters for the end of a line.
    assert len(line.decode().splitlines()) == 1
    request = json.loads(line)
    assert request["id"] == "a\nb"
    assert request["payload"]["args"][1] == "\u2028\x85"


def endless() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


#: Payloads that can't be written, and the part that the message names.
BLAME = {
    "a positional argument": ({"args": [1, object()]}, "args[1]"),
    "a tuple's second": ({"args": (1, object(), 2)}, "args[1]"),
    "deep in an argument": ({"args": [1, {"a": [object()]}]}, "args[1]"),
    "in a set": ({"args": [{object()}]}, "args[0]"),
    "a keyword argument": ({"args": [1], "kwargs": {"a": 1, "x": object()}}, "kwargs['x']"),
    "deep in a keyword argument": ({"kwargs": {"x": {"y": (object(),)}}}, "kwargs['x']"),
    "a header": ({"args": [], "kwargs": {}, "headers": {"h": object()}}, "headers['h']"),
    "another field": ({"args": [], "eta": object()}, "eta"),
    "the first of two": ({"args": [object()], "kwargs": {"x": object()}}, "args[0]"),
    "a key that has no JSON form": ({"kwargs": {("a", 1): 2}}, "kwargs[('a', 1)]"),
    "a key of None": ({"headers": {None: 2}}, "headers[None]"),
    "such a key inside": ({"args": [{(): 2}]}, "args[0]"),
    "a lone surrogate": ({"args": ["\ud800"]}, "args[0]"),
    "a lone surrogate as a key": ({"kwargs": {"\ud800": 1}}, r"kwargs['\ud800']"),
    "an integer of 5000 digits": ({"args": [10**5000]}, "args[0]"),
    "a list that holds itself": ({"args": [endless()]}, "args[0]"),
    "an exception": ({"args": [ValueError("x")]}, "args[0]"),
    "a function": ({"kwargs": {"x": print}}, "kwargs['x']"),
    "a complex number": ({"args": [1j]}, "args[0]"),
    "a name of the payload itself": ({(1,): 1}, "the payload"),
}


@pytest.mark.parametrize(("payload", "blamed"), BLAME.values(), ids=BLAME)
def test_the_error_names_what_cannot_be_written(payload: dict[Any, Any], blamed: str) -> None:
    with pytest.raises(RequestEncodeError) as caught:
        encode_request("x", payload)
    message = str(caught.value)
    assert message.startswith(f"{blamed} can't be sent to the child as JSON: ")
    assert caught.value.__cause__ is not None


def test_an_id_that_cannot_be_written_is_an_error_too() -> None:
    with pytest.raises(RequestEncodeError, match="the payload can't be sent"):
        encode_request("\ud800", {"args": [1]})


# -- the error that a reply becomes


def test_a_child_error_tells_type_and_message() -> None:
    error = ChildTaskError("no such card", "CardError")
    assert str(error) == "CardError: no such card"
    assert repr(error) == "ChildTaskError('CardError: no such card')"
    assert (error.message, error.type) == ("no such card", "CardError")
    assert error.__cause__ is None


def test_a_child_error_without_a_type_is_its_message() -> None:
    error = ChildTaskError("no such card")
    assert str(error) == "no such card"
    assert repr(error) == "ChildTaskError('no such card')"


def test_a_child_error_shows_the_childs_traceback_as_its_cause() -> None:
    error = ChildTaskError("m", "T", "at a.rb:1\nat b.rb:2\n")
    assert str(error.__cause__) == "\nat a.rb:1\nat b.rb:2"


def test_a_child_error_is_rebuilt_from_its_arguments_as_its_text() -> None:
    """Celery's JSON results keep only the arguments."""
    error = ChildTaskError("m", "T", "t")
    again = ChildTaskError(*error.args)
    assert str(again) == str(error)
    assert (again.message, again.type, again.traceback) == ("T: m", None, None)


@pytest.mark.parametrize("told", [("m",), ("m", "T"), ("m", None, "t"), ("m", "T", "t")])
def test_a_pickled_child_error_is_complete(told: tuple[Any, ...]) -> None:
    error = ChildTaskError(*told)
    error.note = "one's own"  # type: ignore[attr-defined]
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (again.message, again.type, again.traceback) == (*told, None, None)[:3]
        assert (str(again), again.args) == (str(error), error.args)
        assert str(again.__cause__) == str(error.__cause__)
        assert again.note == "one's own"


@pytest.mark.parametrize(
    ("line", "explained"),
    [
        (b"Loading...", False),
        (b'{"status":"nope"}', False),
        (b'{"status":"ok","result":-1e400}', True),
        (b'{"status":"ok","result":' + b"9" * 4301 + b"}", True),
        (b'{"status":"progress","meta":{"a":[1e309]}}', True),
        (b'\xef\xbb\xbf{"status":"ok"}', True),
        (b'{"status":"ok","result":"\\ud83d"}', True),
    ],
)
def test_stray_output_is_named_as_the_cause_only_without_a_hint(
    line: bytes, explained: bool
) -> None:
    with pytest.raises(ProtocolFault) as caught:
        decode_reply(line)
    assert is_explained(str(caught.value)) == explained
    advice = "it must print everything else to stderr" in str(
        protocol_fault(str(caught.value), None)
    )
    assert advice != explained


def test_the_largest_numbers_are_taken() -> None:
    digits = "9" * 4300
    assert decode_reply(f'{{"status":"ok","result":{digits}}}'.encode()) == Ok(result=int(digits))
    assert decode_reply(b'{"status":"ok","result":1.7e308}') == Ok(result=1.7e308)


def test_half_of_a_pair_of_surrogates_is_named() -> None:
    """JavaScript writes it for a text that was cut inside an emoji."""
    with pytest.raises(ProtocolFault, match="half of a pair of surrogates"):
        decode_reply(b'{"id":"x","status":"ok","result":"\\ud83d"}')
