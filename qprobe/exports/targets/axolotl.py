"""axolotl 0.19.0: YAML whose `bnb_config_kwargs` goes into its BitsAndBytesConfig (loaders/model.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from qprobe.exports.keys import transformers_readers
from qprobe.exports.target import Target, Written
from qprobe.exports.targets.peft import target_pattern
from qprobe.exports.writing import bits_and_bytes, where_notes, yaml_text
from qprobe.manifest.records import Manifest
from qprobe.options import DEFAULT_ADAPT


def write(manifest: Manifest, entries: Sequence[str], adapt: str = DEFAULT_ADAPT) -> Written:
    """Lines of its configuration."""
    config = bits_and_bytes(manifest, entries)
    del config["load_in_4bit"], config["bnb_4bit_compute_dtype"]  # axolotl sets both from the lines below
    half = {"bfloat16": "bf16", "float16": "fp16"}[manifest.format.compute_dtype]
    values = {
        "base_model": manifest.model.id,
        "adapter": "qlora",
        "load_in_4bit": True,
        half: True,
        "bnb_config_kwargs": config,
        "lora_target_modules": target_pattern(manifest, adapt),
    }
    return Written(
        yaml_text(values),
        ("Add these lines to your configuration, in place of the same keys.", *where_notes(manifest)),
    )


def adapting(adapt: str) -> Target:
    """The target with adapters where `adapt` says, see `qprobe.models.adapting`."""
    return replace(TARGET, write=partial(write, adapt=adapt))


TARGET = Target(
    name="axolotl",
    summary="YAML: bnb_config_kwargs and lora_target_modules",
    readers=transformers_readers,
    write=write,
    adapting=adapting,
)
