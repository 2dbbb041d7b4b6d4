"""Budgets as users type them."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe.errors import BudgetError
from qprobe.selection.budget import (
    Budget,
    ExtraBytes,
    RelativeBudget,
    TotalBytes,
    all_fit,
    parse_budget,
    parse_size,
)
from tests.runs.runs import inventory_of, linear

STANDARD = 7_178_803_270


@pytest.mark.parametrize(
    ("text", "limit_bytes"),
    [
        ("+10%", STANDARD + 717_880_327),
        ("+0%", STANDARD),
        ("+2.5 %", STANDARD + 179_470_081),  # 179,470,081.75 rounded down
        ("+690MiB", STANDARD + 690 * 2**20),
        ("+690mib", STANDARD + 690 * 2**20),
        ("+1GB", STANDARD + 10**9),
        (" + 0.5 GiB ", STANDARD + 2**29),
        ("7.3GiB", 7_838_315_315),  # 7.3 * 2**30 = 7,838,315,315.2
        ("7900000000", 7_900_000_000),
        (str(STANDARD), STANDARD),
        ("8TB", 8 * 10**12),
    ],
)
def test_every_form_means_its_bytes(text: str, limit_bytes: int):
    assert parse_budget(text).within(STANDARD) == Budget(text.strip(), limit_bytes)


def test_each_form_is_a_value_of_its_own():
    assert parse_budget("+12.5 %") == RelativeBudget("+12.5 %", Fraction(25, 2))
    assert parse_budget(" +690MiB") == ExtraBytes("+690MiB", 690 * 2**20)
    assert parse_budget("7.3GiB") == TotalBytes("7.3GiB", 7_838_315_315)


def test_decimals_are_exact():
    # In doubles 0.1 + 0.2 style errors would give 28 or 30 for some of these.
    assert parse_budget("+29%").within(100).limit_bytes == 129
    assert parse_budget("+0.29KB").within(0).limit_bytes == 290


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "ten",
        "-10%",
        "+-1GB",
        "nan",
        "inf",
        "1e9",
        "7.3",
        "7.3GiB extra",
        "+10%%",
        "٣GiB",
        "9" * 40,
        "7,3GiB",
    ],
)
def test_what_cannot_be_read_is_refused_with_the_forms(text: str):
    with pytest.raises(BudgetError):
        parse_budget(text).within(STANDARD)


def test_messages_say_what_to_write():
    with pytest.raises(BudgetError, match=r"Write \+10% for that much more"):
        parse_budget("10%")
    with pytest.raises(BudgetError, match=r"unknown unit 'Gi'.*\+690MiB"):
        parse_budget("7Gi")
    with pytest.raises(BudgetError, match=r"5,368,709,120 bytes.*7,178,803,270 bytes.*--budget 7178803270"):
        parse_budget("5GiB").within(STANDARD)


@given(st.text(max_size=20))
def test_any_text_gives_a_budget_or_a_budget_error(text: str):
    try:
        assert parse_budget(text).within(1000).limit_bytes >= 1000
    except BudgetError as error:
        assert "Write" in str(error) or "Pass" in str(error)


@pytest.mark.parametrize(
    ("text", "wanted"), [("6GiB", 6 * 2**30), ("1.5 kb", 1500), (" 73728 ", 73728), ("0.3b", 0)]
)
def test_a_size_is_read_in_the_units_of_a_budget(text, wanted):
    assert parse_size(text) == wanted


@pytest.mark.parametrize("text", ["", "+1GiB", "10%", "6 Gigs", "-1", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(BudgetError, match="cannot be read"):
        parse_size(text)


def test_more_of_what_is_asked_back():
    # +690 is hardly meant to be 690 bytes; +690B says so.
    with pytest.raises(BudgetError, match=r"Write \+690MiB, \+690% of standard 4-bit, or \+690B if bytes"):
        parse_budget("+690")
    assert parse_budget("+690B").within(STANDARD).limit_bytes == STANDARD + 690


def test_a_budget_that_excludes_nothing_says_so():
    inventory = inventory_of(linear("a"), linear("b"))  # 8,192 bytes each in 16-bit, 1,000 around them
    standard = inventory.standard_4bit_bytes
    assert all_fit(parse_budget("17383").within(standard), inventory) is None
    said = all_fit(parse_budget("17384").within(standard), inventory)
    assert said is not None and "every layer in 16-bit (17,384 bytes)" in said
