"""llm-compressor 0.14.0: keywords of its QuantizationModifier or GPTQModifier."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qprobe.exports.keys import Reader, exact, module_readers
from qprobe.exports.matchers import finds
from qprobe.exports.target import Target, Written, written_as
from qprobe.exports.writing import experts, other_codes
from qprobe.manifest.records import Manifest


def rule(entry: str, name: str) -> bool:
    """compressed-tensors 0.20.0, utils/match.py, `match_name` and `_match_class`, for the `ignore` list.

    Whole name, or a regular expression after "re:" from its start; "Linear" is every linear.
    """
    if entry.startswith("re:"):
        return finds("match", entry.removeprefix("re:"), name)
    return entry == name or entry in ("Linear", "Module")


def readers(manifest: Manifest) -> list[Reader]:
    """llm-compressor on the transformers versions whose names differ."""
    return module_readers(manifest, rule, "llm-compressor")


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """A JSON object of the keywords."""
    data = {"targets": ["Linear"], "scheme": "W4A16", "ignore": list(entries)}
    stacked = experts(
        manifest,
        "llm-compressor may unstack them into linears and quantize those: add 're:.*experts.*' to ignore.",
    )
    return Written(json.dumps(data, indent=2) + "\n", (other_codes("W4A16 integers"), *stacked))


TARGET = Target(
    name="llm-compressor",
    summary="keywords of a modifier, with its ignore list",
    readers=readers,
    write=write,
    lists=written_as(str, lambda name: f"re:{exact(name)}"),
    own_codes="by the modifier that is given the list: QuantizationModifier rounds to nearest, "
    "GPTQModifier fits them to its own calibration samples",
)
