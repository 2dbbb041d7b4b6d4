"""What several writers share: BitsAndBytesConfig's keywords, a Python snippet, YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qprobe.manifest.records import Manifest


class Written(NamedTuple):
    """What a writer made: the text, and sentences for its user."""

    text: str
    notes: tuple[str, ...]


def where_notes(manifest: Manifest) -> tuple[str, ...]:
    """What to put in the place of a model name that is none on the hub; nothing where it is one."""
    if "/" in manifest.model.id:
        return ()
    return (f"{manifest.model.id!r} is no name on the hub: write the folder of the 16-bit weights instead.",)


# How the tools that do not round to nearest choose their codes, as each documents it.
OWN_CODES = {
    "llm-compressor": "by the modifier that is given the list: QuantizationModifier rounds to nearest, "
    "GPTQModifier fits them to its own calibration samples",
    "gptqmodel": "by GPTQ on its own calibration samples",
    "autoround": "by signed gradient descent on its own calibration samples",
    "llama.cpp": "with scales of its own for each block, weighted by an importance matrix if it is given one",
}


def rounding_notes(manifest: Manifest, tool: str) -> tuple[str, ...]:
    """What `tool`, which makes the 4-bit weights itself, loses of calibrated ones; nothing for plain NF4."""
    if not manifest.format.is_calibrated:
        return ()
    figure = "The KL in the manifest is that of calibrated NF4."
    if tool in OWN_CODES:
        return (
            f"The calibrated weights are not carried over: the tool chooses 4-bit codes of its own, "
            f"{OWN_CODES[tool]}. {figure}",
        )
    return (
        "The tool makes the 4-bit weights from 16-bit ones itself and rounds to nearest: to keep the "
        f"calibration, load the checkpoint that `qprobe quantize` writes. {figure}",
    )


def bits_and_bytes(manifest: Manifest, entries: Sequence[str]) -> dict[str, Any]:
    """Keywords of transformers' BitsAndBytesConfig, in JSON values, that load the manifest's model."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": manifest.format.quant_type,
        "bnb_4bit_use_double_quant": manifest.format.double_quant,
        "bnb_4bit_compute_dtype": manifest.format.compute_dtype,
        "llm_int8_skip_modules": list(entries),
    }


def snippet(manifest: Manifest, entries: Sequence[str], imports: Sequence[str], load: str) -> str:
    """Python that builds the quantization config and loads the model.

    load: the last statement, with {model} and {dtype} to be filled in.
    """
    config = bits_and_bytes(manifest, entries)
    dtype = f"torch.{manifest.format.compute_dtype}"
    skip = "".join(f"    {json.dumps(entry)},\n" for entry in config.pop("llm_int8_skip_modules"))
    keywords = "".join(f"    {key}={value!r},\n" for key, value in config.items())
    return (
        "import torch\n"
        + "".join(f"{line}\n" for line in imports)
        + "from transformers import BitsAndBytesConfig\n\n"
        + f"skip_modules = [\n{skip}]\n"
        + f"quantization = BitsAndBytesConfig(\n{keywords}    llm_int8_skip_modules=skip_modules,\n)\n"
        + load.format(model=json.dumps(manifest.model.id), dtype=dtype)
    )


def yaml(values: Mapping[str, Any], indent: str = "") -> str:
    """`values` (strings, numbers, booleans, lists of strings, mappings) as block YAML.

    Strings are written as JSON does, which YAML's double quotes read the same.
    """
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}:\n{yaml(value, indent + '  ')}")
        elif isinstance(value, list):
            lines.append(f"{indent}{key}:\n" + "".join(f"{indent}  - {json.dumps(x)}\n" for x in value))
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
    return "".join(lines)
