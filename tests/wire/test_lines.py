"""What children write is cut into lines.

Lines of stdout are whole messages. Lines of stderr are for the log: bounded, and no fake records.
"""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_subproc_pool.wire.lines import LINE_BYTES, TAIL_LINES, LineBuffer, StderrLines
from celery_subproc_pool.wire.text import QUOTED_BYTES, quote
from tests.support.strategies import unhurried

MAX = 32

# -- stdout

#: Input, and the lines that it completes. Each is fed whole, byte by byte, and with more after it.
FRAMINGS = {
    "nothing": (b"", []),
    "one line": (b"one\n", [b"one"]),
    "two lines at once": (b"one\ntwo\n", [b"one", b"two"]),
    "an empty line": (b"\n", [b""]),
    "empty lines between": (b"\n\none\n\n", [b"", b"", b"one", b""]),
    "the carriage return stays": (b"one\r\n", [b"one\r"]),
    "other separators do not count": (
        b"a\x0bb\x0cc\x85\xe2\x80\xa8d\n",
        [b"a\x0bb\x0cc\x85\xe2\x80\xa8d"],
    ),
    "any bytes": (b"\x00\xff\xfe\n\x80\n", [b"\x00\xff\xfe", b"\x80"]),
    "exactly the maximum": (b"x" * MAX + b"\n", [b"x" * MAX]),
    "the maximum twice": (b"x" * MAX + b"\n" + b"y" * MAX + b"\n", [b"x" * MAX, b"y" * MAX]),
}

framings = pytest.mark.parametrize(("data", "lines"), FRAMINGS.values(), ids=FRAMINGS)


def one_by_one(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def fed(buffer: LineBuffer, pieces: list[bytes]) -> list[bytes]:
    return [line for piece in pieces for line in buffer.feed(piece)]


@framings
def test_lines_that_come_whole(data: bytes, lines: list[bytes]) -> None:
    buffer = LineBuffer(MAX)
    assert buffer.feed(data) == lines
    assert buffer.overlong is None
    assert buffer.take_open() == b""


@framings
def test_lines_that_come_byte_by_byte(data: bytes, lines: list[bytes]) -> None:
    buffer = LineBuffer(MAX)
    assert fed(buffer, one_by_one(data)) == lines
    assert buffer.overlong is None
    assert buffer.take_open() == b""


@framings
def test_lines_with_trailing_data(data: bytes, lines: list[bytes]) -> None:
    buffer = LineBuffer(MAX)
    assert buffer.feed(data + b"half") == lines
    assert buffer.feed(b" a line") == []
    assert buffer.feed(b"\n") == [b"half a line"]


def test_the_open_line_can_be_taken_once() -> None:
    buffer = LineBuffer(MAX)
    assert fed(buffer, [b"one\nha", b"lf"]) == [b"one"]
    assert buffer.has_open
    assert buffer.take_open() == b"half"
    assert not buffer.has_open
    assert buffer.take_open() == b""


@pytest.mark.parametrize("piece", [1, 7, 250, 1000])
def test_the_start_of_the_open_line_can_be_quoted(piece: int) -> None:
    buffer = LineBuffer(10_000)
    assert buffer.quote_open() == ""
    line = bytes(range(32, 127)) * 5
    for start in range(0, len(line), piece):
        buffer.feed(line[start : start + piece])
    assert buffer.quote_open() == quote(line)
    buffer.feed(b"\nhalf")
    assert buffer.quote_open() == "b'half'"
    buffer.feed(b"\n")
    assert buffer.quote_open() == ""
    assert buffer.feed(b"two\n") == [b"two"]


#: Input, the good lines before the overlong one, and the start of that one.
OVERLONG = {
    "one byte too many": (b"x" * (MAX + 1) + b"\n", [], b"x" * (MAX + 1)),
    "without an end": (b"x" * (MAX + 1), [], b"x" * (MAX + 1)),
    "after good lines": (
        b"one\ntwo\n" + b"x" * (MAX + 1) + b"\nthree\n",
        [b"one", b"two"],
        b"x" * (MAX + 1),
    ),
}


@pytest.mark.parametrize(("data", "lines", "start"), OVERLONG.values(), ids=OVERLONG)
@pytest.mark.parametrize("cut", [lambda data: [data], one_by_one], ids=["whole", "bytes"])
def test_nothing_is_kept_from_an_overlong_line_on(
    data: bytes, lines: list[bytes], start: bytes, cut: Any
) -> None:
    buffer = LineBuffer(MAX)
    assert fed(buffer, cut(data)) == lines
    assert buffer.overlong == start
    assert buffer.feed(b"more\n") == []
    assert buffer.overlong == start
    assert buffer.take_open() == b""


def test_only_the_start_of_an_overlong_line_is_kept() -> None:
    buffer = LineBuffer(MAX)
    assert buffer.feed(b"y" * 100_000) == []
    assert buffer.overlong == b"y" * QUOTED_BYTES


@unhurried
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=20))
def test_cutting_a_stream_anywhere_gives_the_same_lines(data: bytes, cuts: list[int]) -> None:
    data = data.replace(b"\x01", b"\n")
    whole, pieces = LineBuffer(MAX), LineBuffer(MAX)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    lines = fed(pieces, [data[start:end] for start, end in pairwise(edges)])
    assert lines == whole.feed(data)
    assert (pieces.overlong is None) == (whole.overlong is None)
    assert pieces.take_open() == whole.take_open()


# -- stderr

LINES = {
    "one line": (b"one\n", ["one"]),
    "two lines": (b"one\ntwo\n", ["one", "two"]),
    "empty lines": (b"\n\n", ["", ""]),
    "blanks and tabs": (b"\ta  b \n", ["\ta  b "]),
    "the end of line of Windows": (b"one\r\n\r\n", ["one", ""]),
    "beyond ASCII": ("é😀\n".encode(), ["é😀"]),
    "invalid UTF-8": (b"a\xffb\xc3\n", [r"a\xffb\xc3"]),
    "a NUL": (b"a\x00b\n", [r"a\x00b"]),
    "an ANSI escape": (b"\x1b[31mred\x1b[0m\n", [r"\x1b[31mred\x1b[0m"]),
    "a carriage return that hides": (b"evil\rgood\n", [r"evil\rgood"]),
    "vertical tab and form feed": (b"a\x0bb\x0cc\n", [r"a\x0bb\x0cc"]),
    "DEL and C1": ("a\x7fb\x85c\x9bd\n".encode(), [r"a\x7fb\x85c\x9bd"]),
    "line and paragraph separators": ("a\u2028b\u2029c\n".encode(), [r"a\u2028b\u2029c"]),
}

lines_table = pytest.mark.parametrize(("data", "lines"), LINES.values(), ids=LINES)


@lines_table
def test_stderr_that_comes_whole(data: bytes, lines: list[str]) -> None:
    assert StderrLines().feed(data) == lines


@lines_table
def test_stderr_that_comes_byte_by_byte(data: bytes, lines: list[str]) -> None:
    stderr = StderrLines()
    fed = [line for at in range(len(data)) for line in stderr.feed(data[at : at + 1])]
    assert fed == lines


@lines_table
def test_stderr_with_trailing_data(data: bytes, lines: list[str]) -> None:
    stderr = StderrLines()
    assert stderr.feed(data + b"half") == lines
    assert stderr.feed(b" a line\n") == ["half a line"]


def test_the_end_completes_the_last_line() -> None:
    stderr = StderrLines()
    assert stderr.feed(b"one\nFatal: no") == ["one"]
    assert stderr.feed(b"") == ["Fatal: no"]
    assert list(stderr.tail) == ["one", "Fatal: no"]


def test_the_end_after_a_newline_adds_no_line() -> None:
    stderr = StderrLines()
    assert stderr.feed(b"one\n") == ["one"]
    assert stderr.feed(b"") == []
    assert stderr.feed(b"") == []


def test_the_tail_is_the_last_lines_oldest_first() -> None:
    stderr = StderrLines()
    stderr.feed(b"".join(b"%d\n" % number for number in range(8)))
    assert list(stderr.tail) == ["3", "4", "5", "6", "7"]
    assert len(stderr.tail) == TAIL_LINES
    stderr.feed(b"8\n")
    assert list(stderr.tail) == ["4", "5", "6", "7", "8"]


def test_a_line_of_stderr_that_is_too_long_comes_in_pieces() -> None:
    long = b"a" * LINE_BYTES + b"b" * LINE_BYTES + b"c" * 10
    whole = StderrLines().feed(long + b"\nnext\n")
    assert whole == ["a" * LINE_BYTES, "b" * LINE_BYTES, "c" * 10, "next"]

    stderr = StderrLines()
    assert stderr.feed(long) == ["a" * LINE_BYTES, "b" * LINE_BYTES]
    assert stderr.feed(b"\nnext\n") == ["c" * 10, "next"]


@pytest.mark.parametrize("chunk", [1, 1000, LINE_BYTES, 3 * LINE_BYTES + 1])
def test_no_byte_of_a_long_line_is_lost(chunk: int) -> None:
    data = bytes(97 + at % 26 for at in range(3 * LINE_BYTES + 5))
    stderr = StderrLines()
    lines = [
        line for at in range(0, len(data), chunk) for line in stderr.feed(data[at : at + chunk])
    ]
    lines += stderr.feed(b"")
    assert "".join(lines) == data.decode()
    assert max(map(len, lines)) == LINE_BYTES


def test_a_flood_without_newlines_takes_bounded_memory() -> None:
    stderr = StderrLines()
    chunk = b"x" * 65536
    tracemalloc.start(1)
    try:
        pieces = sum(len(stderr.feed(chunk)) for _ in range(1600))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pieces == 1600 * 65536 // LINE_BYTES
    assert len(stderr.tail) == TAIL_LINES
    assert peak < 2_000_000


@unhurried
@given(chunks=st.lists(st.binary(max_size=50), max_size=10))
def test_any_stderr_becomes_lines(chunks: list[bytes]) -> None:
    stderr = StderrLines()
    lines = [line for chunk in chunks for line in stderr.feed(chunk)] + stderr.feed(b"")
    assert all(len(line.splitlines()) <= 1 for line in lines)
    assert list(stderr.tail) == lines[-TAIL_LINES:]
