"""Foreign text as a terminal may be shown it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe.system.wording import shortened, visible


def test_shortened_keeps_both_ends():
    assert shortened("abcdefghij", 5) == "ab…ij"
    assert shortened("abc", 5) == "abc"


@given(text=st.text(max_size=50), width=st.integers(1, 40))
def test_shortened_is_never_longer_than_asked(text: str, width: int):
    assert len(shortened(text, width)) == min(len(text), width)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),  # clears the screen
        ("\x9b2J", r"\x9b2J"),  # the same in one character
        ("a\u202etxt.exe", r"a\u202etxt.exe"),  # writes on from right to left
        ("a\nError: b\r\x00", r"a\nError: b\r\x00"),
        ("\udcff", r"\udcff"),  # of a file name that is no UTF-8
        ("image\u3000一\xa0é", "image\u3000一\xa0é"),
    ],
)
def test_what_is_not_seen_is_escaped(text: str, shown: str):
    assert visible(text) == shown


@given(text=st.text(alphabet=st.characters()))
def test_what_is_shown_can_be_printed_and_keeps_what_could(text: str):
    shown = visible(text)
    shown.encode()
    assert visible(shown) == shown and (shown == text or not text.isprintable())
