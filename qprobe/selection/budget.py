"""What a user may type as a memory budget: a typed value, which becomes bytes once the inventory is known."""

from __future__ import annotations

import re
import reprlib
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


@dataclass(frozen=True)
class RelativeBudget:
    """A share of standard 4-bit on top of it, such as +10%. requested: as typed."""

    requested: str
    percent: Fraction

    def within(self, standard_4bit_bytes: int) -> Budget:
        """The budget in bytes, rounded down."""
        extra = int(self.percent * standard_4bit_bytes / 100)
        return Budget(self.requested, standard_4bit_bytes + extra)


@dataclass(frozen=True)
class ExtraBytes:
    """Bytes on top of standard 4-bit, such as +690MiB. requested: as typed."""

    requested: str
    extra_bytes: int

    def within(self, standard_4bit_bytes: int) -> Budget:
        """The budget in bytes."""
        return Budget(self.requested, standard_4bit_bytes + self.extra_bytes)


@dataclass(frozen=True)
class TotalBytes:
    """Bytes of the whole model, such as 7.3GiB. requested: as typed."""

    requested: str
    total_bytes: int

    def within(self, standard_4bit_bytes: int) -> Budget:
        """The budget in bytes; raises BudgetError if it is below `standard_4bit_bytes`."""
        if self.total_bytes < standard_4bit_bytes:
            asked = f"{self.requested!r} ({self.total_bytes:,} bytes)"
            raise BudgetError(below_standard(asked, standard_4bit_bytes))
        return Budget(self.requested, self.total_bytes)


AskedBudget = RelativeBudget | ExtraBytes | TotalBytes
"""A budget as it was asked for; `within` makes bytes of it once the inventory is known."""


def parse_budget(text: str) -> AskedBudget:
    """The budget that `text` asks for, see `_FORMS`; bytes are rounded down.

    KB, MB, GB are powers of 1000 and KiB, MiB, GiB of 1024, in any case.
    Raises BudgetError if it cannot be read.
    """
    plus, number, unit = _budget_parts(text)
    if unit == "%":
        return RelativeBudget(text.strip(), number)
    asked_bytes = int(number * _UNITS[unit])
    return ExtraBytes(text.strip(), asked_bytes) if plus else TotalBytes(text.strip(), asked_bytes)


def _budget_parts(text: str) -> tuple[bool, Fraction, str]:
    """(whether it is on top of standard 4-bit, number, unit in lower case) of a budget as typed."""
    match = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise BudgetError(f"Budget {reprlib.repr(text)} cannot be read. Write {_FORMS}.")
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
        f"Budget {budget} is below standard 4-bit, {standard_4bit_bytes:,} bytes, so no skip-list fits. "
        f"Pass --budget {standard_4bit_bytes} or more, or +10%."
    )
