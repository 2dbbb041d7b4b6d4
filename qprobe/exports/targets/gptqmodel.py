"""GPTQModel 7.7.0: keywords of its QuantizeConfig."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qprobe.exports.keys import Reader, exact, module_readers
from qprobe.exports.matchers import finds
from qprobe.exports.target import Target, Written, written_as
from qprobe.exports.writing import experts, other_codes, text_only
from qprobe.manifest.records import Manifest


def rule(entry: str, name: str) -> bool:
    """GPTQModel 7.7.0, quantization/config.py, `_resolve_dynamic_override`, for the keys of `dynamic`.

    Only keys that start with "-:" leave a module alone; what follows is a regular expression from the start.
    """
    return entry.startswith("-:") and finds("match", entry.removeprefix("-:"), name)


def readers(manifest: Manifest) -> list[Reader]:
    """GPTQModel on the transformers versions whose names differ."""
    return module_readers(manifest, rule, "GPTQModel")


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """A JSON object of the keywords."""
    data = {"bits": 4, "dynamic": {entry: {} for entry in entries}}
    stacked = experts(
        manifest,
        "GPTQModel may unstack them into linears and quantize those: add '-:.*experts.*' to dynamic.",
    )
    notes = (other_codes("GPTQ integers"), text_only("GPTQModel"), *stacked)
    return Written(json.dumps(data, indent=2) + "\n", notes)


TARGET = Target(
    name="gptqmodel",
    summary="keywords of QuantizeConfig, with dynamic",
    readers=readers,
    write=write,
    lists=written_as(lambda name: f"-:{exact(name)}"),
    own_codes="by GPTQ on its own calibration samples",
)
