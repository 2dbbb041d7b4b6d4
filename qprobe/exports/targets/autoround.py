"""AutoRound 0.16.1: its keywords, with what its own `ignore_layers` writes into `layer_config`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qprobe.exports.keys import Reader, module_readers
from qprobe.exports.matchers import finds
from qprobe.exports.target import Target, Written, written_as
from qprobe.exports.writing import experts, other_codes, text_only
from qprobe.manifest.records import Manifest


def rule(entry: str, name: str) -> bool:
    """AutoRound 0.16.1, compressors/layer_config_resolver.py and utils/common.py, `to_standard_regex`.

    For a key of `layer_config` that is anchored ("^...$"): its dots are plain, the rest is a regular
    expression. Any other key that is no module's exact name is searched anywhere.
    """
    return finds("search", entry.replace(".", r"\."), name)


def readers(manifest: Manifest) -> list[Reader]:
    """AutoRound on the transformers versions whose names differ."""
    return module_readers(manifest, rule, "AutoRound")


def write(manifest: Manifest, entries: Sequence[str]) -> Written:
    """A JSON object of the keywords."""
    as_16bit = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}
    data = {"scheme": "W4A16", "layer_config": dict.fromkeys(entries, as_16bit)}
    stacked = experts(
        manifest,
        "AutoRound may unstack them into linears and quantize those: add '.*experts.*' to layer_config.",
    )
    notes = (other_codes("W4A16 integers"), text_only("AutoRound"), *stacked)
    return Written(json.dumps(data, indent=2) + "\n", notes)


TARGET = Target(
    name="autoround",
    summary="keywords of AutoRound, with layer_config",
    readers=readers,
    write=write,
    lists=written_as(lambda name: f"^{name}$"),  # AutoRound escapes the dots itself
    own_codes="by signed gradient descent on its own calibration samples",
)
