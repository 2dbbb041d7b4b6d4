"""How transformers reads an entry of a skip-list, version by version; pure functions with their sources.

A rule answers for one entry and one module name: does this entry keep this module in 16-bit? A list keeps
what any of its entries keeps; every tool joins its entries so. Those of other tools lie with their targets.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import version
from time import process_time
from typing import Any, Literal

import regex
from packaging.version import InvalidVersion, Version

from qprobe.errors import ManifestError

Rule = Callable[[str, str], bool]
_SECONDS = 0.5  # for one entry
_SENSIBLE = 20e-6  # more than a sensible entry takes for a name
_OF_A_LIST = 3.0  # seconds for all entries of a list, beyond what sensible ones take
_NO_COUNT = re.compile(r"(?<!\\)\{(?!\d*(?:,\d*)?\})")
How = Literal["match", "search", "fullmatch"]
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
    return finds("match", pattern, name)


def finds(how: How, pattern: str, name: str) -> bool:
    """Whether `re.match`, `re.search` or `re.fullmatch` finds `pattern` in `name`.

    Given up after a while, since a few patterns would take years; raises what `hits` explains. The tools use
    `re`, so that says what is a pattern; `regex`, which can be given a time, is kept from reading more into
    one: from fuzzy counts, {e<2}, and from classes of POSIX, [[:alpha:]].
    """
    return getattr(_compiled(pattern), how)(name, timeout=_SECONDS) is not None


@lru_cache(512)
def _compiled(pattern: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what `re` may read otherwise one day
        re.compile(pattern)
        plain = _NO_COUNT.sub(r"\\{", pattern) if "{" in pattern else pattern
        return regex.compile(plain.replace("[[:", r"[\[:"))


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
        return tuple(_within_time(rule, entry, names))
    except TimeoutError:
        raise ManifestError(
            f"The entry {shortened(entry)!r}, read as a regular expression, takes more than "
            f"{_SECONDS:g} s; write it without repetitions inside repetitions."
        ) from None
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ManifestError(
            f"The entry {shortened(entry)!r} is read as a regular expression and is none ({error}); correct "
            "it."
        ) from error


def _within_time(rule: Rule, entry: str, names: Iterable[str]) -> Iterator[str]:
    """Those of `names` that `entry` keeps; TimeoutError where all of them take too long together."""
    start = process_time()
    for count, name in enumerate(names, start=1):
        if rule(entry, name):
            yield name
        if process_time() - start > _SECONDS + count * _SENSIBLE:
            raise TimeoutError


def all_hits(rule: Rule, entries: Sequence[str], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """`hits` of each of `entries`. Raises ManifestError as it does, and where all take too long together."""
    found, spent = [], 0.0
    for entry in entries:
        start = process_time()
        found.append(hits(rule, entry, names))
        spent += max(0.0, process_time() - start - len(names) * _SENSIBLE)
        if spent > _OF_A_LIST:
            raise ManifestError(
                f"The entries up to {shortened(entry)!r}, read as regular expressions, take more than "
                f"{_OF_A_LIST:g} s; write them without repetitions inside repetitions."
            )
    return tuple(found)
