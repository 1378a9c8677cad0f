"""A child's stderr as lines of a log: complete, bounded, and unable to forge other records."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_subproc_pool.stderr import LINE_BYTES, TAIL_LINES, StderrLines, printable

#: How fast the machine is must not matter.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

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
def test_lines_that_come_whole(data: bytes, lines: list[str]) -> None:
    assert StderrLines().feed(data) == lines


@lines_table
def test_lines_that_come_byte_by_byte(data: bytes, lines: list[str]) -> None:
    stderr = StderrLines()
    fed = [line for at in range(len(data)) for line in stderr.feed(data[at : at + 1])]
    assert fed == lines


@lines_table
def test_lines_with_trailing_data(data: bytes, lines: list[str]) -> None:
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


def test_a_line_that_is_too_long_comes_in_pieces() -> None:
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
@given(text=st.text())
def test_what_is_printable_is_one_line_without_control_characters(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert "\x1b" not in shown
    assert all(character == "\t" or ord(character) >= 32 for character in shown)


@unhurried
@given(chunks=st.lists(st.binary(max_size=50), max_size=10))
def test_any_bytes_become_lines(chunks: list[bytes]) -> None:
    stderr = StderrLines()
    lines = [line for chunk in chunks for line in stderr.feed(chunk)] + stderr.feed(b"")
    assert all(len(line.splitlines()) <= 1 for line in lines)
    assert list(stderr.tail) == lines[-TAIL_LINES:]
