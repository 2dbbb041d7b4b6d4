"""Foreign text as a terminal may be shown it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe.system.wording import lasting, shortened, visible


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0.0 s"), (12.34, "12.3 s"), (99.94, "99.9 s"), (100.0, "1 min 40 s"), (245.4, "4 min 5 s"),
        (3599.4, "59 min 59 s"), (3599.6, "1 h 0 min"), (3600, "1 h 0 min"), (12_000, "3 h 20 min"),
        (2 * 86_400 - 31, "47 h 59 min"), (2 * 86_400 - 29, "2 days 0 h"), (19_315_073.6, "223 days 13 h"),
        (1e9, "11,574 days 2 h"),
    ],
)  # fmt: skip
def test_a_time_is_told_in_units_of_its_length(seconds: float, said: str):
    assert lasting(seconds) == said


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
