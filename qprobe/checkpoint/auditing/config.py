"""What the config of a checkpoint says of 4-bit: its format and the entries of its list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qprobe.errors import ModelError
from qprobe.exports.config_format import four_bit_format, is_four_bit, model_dtype
from qprobe.exports.languages import LIST_KEYS
from qprobe.manifest.records import Manifest
from qprobe.records import FormatSpec


def format_of(config: Mapping[str, Any], manifest: Manifest | None) -> FormatSpec:
    """The format that the config names, or else the manifest's, or else the usual one."""
    quantization = quantization_of(config)
    if quantization is None:
        return manifest.format if manifest is not None else FormatSpec()
    return four_bit_format(quantization, model_dtype(config))


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The bitsandbytes 4-bit config; None if there is no quantization. Raises ModelError for another."""
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ModelError("quantization_config in config.json is no JSON object; copy the checkpoint again.")
    method = found.get("quant_method", "bitsandbytes")
    if not is_four_bit(found):
        how = " without load_in_4bit" if method == "bitsandbytes" else ""
        raise ModelError(
            f"The checkpoint is quantized by {method!r}{how}; audit reads 4-bit checkpoints of bitsandbytes."
        )
    return found


def entries_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    quantization = quantization_of(config)
    found = None if quantization is None else quantization.get(LIST_KEYS[0])
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise ModelError(f"{LIST_KEYS[0]} in config.json is no list of names; write the list again.")
    return tuple(found)
