"""What several targets write: BitsAndBytesConfig's keywords, a Python snippet, YAML, and notes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import yaml

from qprobe.manifest.records import Manifest


def where_notes(manifest: Manifest) -> tuple[str, ...]:
    """What to put in the place of a model name that is none on the hub; nothing where it is one."""
    if "/" in manifest.model.id:
        return ()
    return (f"{manifest.model.id!r} is no name on the hub: write the folder of the 16-bit weights instead.",)


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


def yaml_text(values: Mapping[str, Any]) -> str:
    """`values` as block YAML, in their order, each string on one line; nothing in it is not seen."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=inf)
    if text.replace("\n", "").isprintable():
        return text
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=False, width=inf)


def other_codes(codes: str) -> str:
    """That the tool puts `codes` in the place of NF4."""
    return (
        f"NF4 is bitsandbytes' own; here the 4-bit layers get {codes} instead, so measure again what it "
        "costs."
    )


def experts(manifest: Manifest, tool: str) -> tuple[str, ...]:
    """A note on stacked experts with what `tool`, a sentence, does to them; nothing without such."""
    names = [x.name for x in manifest.layers if x.is_experts]
    names += [x.name for x in manifest.uncovered if ".experts." in x.name]
    if not names:
        return ()
    return (
        f"{len(names)} stacked expert weights, such as {names[0]}, are no linears, so they stay in 16-bit "
        f"and the list cannot name them. {tool}",
    )


def text_only(tool: str) -> str:
    """That `tool` quantizes the decoder only."""
    return f"{tool} quantizes the decoder's layers only, unless told otherwise; the other names do no harm."
