"""What a user may type as a memory budget, in bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from qprobe.errors import BudgetError
from qprobe.records import Inventory

_FORMS = "+10% (of standard 4-bit), +690MiB (on top of it), or a total such as 7.3GiB or 7900000000"

_UNITS = {
    "": 1, "b": 1,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip

# At most 18 digits on either side: enough for any machine, and no number that takes long to read.
_PATTERN = re.compile(r"(\+?)\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(%|[a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """requested: as typed; limit_bytes: of the whole model, every parameter and persistent buffer."""

    requested: str
    limit_bytes: int


def parse_budget(text: str, standard_4bit_bytes: int) -> Budget:
    """The budget that `text` asks for, rounded down to a byte.

    "+10%" and "+690MiB" are counted from `standard_4bit_bytes`, "7.3GiB" and "7900000000" are totals;
    KB, MB, GB are powers of 1000 and KiB, MiB, GiB of 1024, in any case.
    Raises BudgetError if it cannot be read or is below `standard_4bit_bytes`.
    """
    plus, number, unit = _budget_parts(text)
    amount = number * standard_4bit_bytes / 100 if unit == "%" else number * _UNITS[unit]
    limit_bytes = int(amount) + (standard_4bit_bytes if plus else 0)
    if limit_bytes < standard_4bit_bytes:
        raise BudgetError(below_standard(f"{text!r} ({limit_bytes:,} bytes)", standard_4bit_bytes))
    return Budget(text.strip(), limit_bytes)


def check_budget(text: str) -> None:
    """Raises BudgetError if `text` is a budget of no model, as `parse_budget` does."""
    _budget_parts(text)


def _budget_parts(text: str) -> tuple[bool, Fraction, str]:
    """(whether it is on top of standard 4-bit, number, unit in lower case) of a budget as typed."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise BudgetError(f"Budget {text[:60]!r} cannot be read. Write {_FORMS}.")
    plus, number, unit = match[1] != "", Fraction(match[2]), match[3].lower()
    if unit == "%" and not plus:
        raise BudgetError(
            f"Budget {text!r} does not say what it is a share of. Write +{text.strip()} for that much more "
            "than standard 4-bit."
        )
    if unit != "%" and unit not in _UNITS:
        raise BudgetError(f"Budget {text!r} has the unknown unit {match[3]!r}. Write {_FORMS}.")
    if plus and not unit:  # whoever types +690 has hardly 690 bytes in mind
        raise BudgetError(
            f"Budget {text!r} has no unit. Write {text.strip()}MiB, {text.strip()}% of standard 4-bit, or "
            f"{text.strip()}B if bytes are meant."
        )
    return plus, number, unit


def all_fit(budget: Budget, inventory: Inventory) -> str | None:
    """A sentence where `budget` is so large that it excludes no layer of `inventory`; else None."""
    everything = inventory.total_bytes(frozenset(x.name for x in inventory.layers))
    if budget.limit_bytes < everything:
        return None
    return (
        f"All layers fit: the budget {budget.requested} ({budget.limit_bytes:,} bytes) has room for "
        f"every layer in 16-bit ({everything:,} bytes)."
    )


def parse_size(text: str) -> int:
    """The bytes that `text` names, "6GiB" or "6000000000". Raises BudgetError if it cannot be read."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None or match[1] or match[3].lower() not in _UNITS:
        raise BudgetError(f"Size {text[:60]!r} cannot be read. Write a number of bytes, or such as 6GiB.")
    return int(Fraction(match[2]) * _UNITS[match[3].lower()])


def below_standard(budget: str, standard_4bit_bytes: int) -> str:
    """The sentence for a budget that not even standard 4-bit fits."""
    return (
        f"Budget {budget} is below standard 4-bit, {standard_4bit_bytes:,} bytes, so no choice fits. "
        f"Pass --budget {standard_4bit_bytes} or more, or +10%."
    )
