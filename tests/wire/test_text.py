"""Text that children write is made safe for a log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_subproc_pool.wire.text import printable, quote, visible
from tests.support.strategies import unhurried


@unhurried
@given(text=st.text())
def test_printable_text_is_one_line_without_control_characters(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert "\x1b" not in shown
    assert all(character == "\t" or ord(character) >= 32 for character in shown)


@unhurried
@given(text=st.text())
def test_visible_text_has_no_invisible_character(text: str) -> None:
    assert visible(text).isprintable()


@pytest.mark.parametrize(
    ("text", "printed", "seen"),
    [
        ("a b\tc", "a b\tc", r"a b\tc"),
        ("é\xa0\x1b", "é\xa0\\x1b", r"é\xa0\x1b"),
        ("a\u2028", r"a\u2028", r"a\u2028"),
    ],
)
def test_printable_escapes_less_than_visible(text: str, printed: str, seen: str) -> None:
    assert printable(text) == printed
    assert visible(text) == seen


def test_a_quotation_is_the_start_only() -> None:
    assert quote(b"") == "b''"
    assert quote(b"a\n\x1b\xff") == r"b'a\n\x1b\xff'"
    assert quote(b"x" * 200) == repr(b"x" * 200)
    assert quote(b"x" * 200 + b"y") == f"{b'x' * 200!r}... (201 bytes)"
    assert quote(b"x" * 200, 500) == f"{b'x' * 200!r}... (500 bytes)"
    assert quote(b"x", 1) == "b'x'"
