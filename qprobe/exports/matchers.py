"""How transformers reads an entry of a skip-list, version by version; pure functions with their sources.

A rule answers for one entry and one module name: does this entry keep this module in 16-bit? A list keeps
what any of its entries keeps; every tool joins its entries so. Those of other tools lie with their targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.metadata import version

import regex
from packaging.version import InvalidVersion, Version

from qprobe.errors import ManifestError

Rule = Callable[[str, str], bool]
_SECONDS = 0.5  # for one entry and one name; sensible ones take microseconds
_SHOWN = 200  # characters of an entry that a sentence repeats


def transformers_4(entry: str, name: str) -> bool:
    """transformers 4.51.3 to 4.57.6, integrations/bitsandbytes.py, `_replace_with_bnb_linear`.

    The entry is plain text: the module's last part, or the whole name, or any stretch of it before a dot.
    """
    return entry == name.rpartition(".")[2] or f"{entry}." in name or entry == name


def transformers_5_0(entry: str, name: str) -> bool:
    """transformers 5.0.0 to 5.20.0, quantizers/quantizers_utils.py, `should_convert_module`.

    The entry is a regular expression that may end anywhere in the name, or a bare ending of it.
    """
    return _begins(entry, name) or name.endswith(entry)


def transformers_5_21(entry: str, name: str) -> bool:
    """transformers 5.21.1 to 5.23.0, quantizers/quantizers_utils.py, `should_convert_module`.

    The entry is a regular expression that ends at a dot or at the end, or still a bare ending of the name.
    """
    return _begins(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(entry)


def _begins(pattern: str, name: str) -> bool:
    """As `re.match`, given up after a while: a few entries would take years. Raises what `hits` explains."""
    re.compile(pattern)  # transformers reads with this package, which is stricter
    return regex.match(pattern, name, timeout=_SECONDS) is not None


def transformers_rule(release: str | None) -> tuple[str, Rule]:
    """(label, rule) of transformers `release`; the current rule where it is None or no version."""
    current = ("transformers 5.21 or newer", transformers_5_21)
    try:
        parsed = Version(release or "")
    except InvalidVersion:
        return current
    if parsed.major < 5:
        return ("transformers 4", transformers_4)
    return current if parsed >= Version("5.21.0.dev0") else ("transformers 5.0 to 5.20", transformers_5_0)


def running_rule() -> Rule:
    """The rule of the transformers that is installed here, which need not be imported for it."""
    return transformers_rule(version("transformers"))[1]


def shortened(entry: str) -> str:
    """`entry` as a sentence shows it."""
    return entry if len(entry) <= _SHOWN else f"{entry[:_SHOWN]}..."


def hits(rule: Rule, entry: str, names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that `entry` keeps. Raises ManifestError if `entry` must be a pattern and is none."""
    try:
        return tuple(name for name in names if rule(entry, name))
    except TimeoutError:
        raise ManifestError(
            f"The entry {shortened(entry)!r}, read as a regular expression, takes more than "
            f"{_SECONDS:g} s for one name; write it without repetitions inside repetitions."
        ) from None
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ManifestError(
            f"The entry {shortened(entry)!r} is read as a regular expression and is none ({error}); correct "
            "it."
        ) from error
