"""How a config.json says that a model is in 4-bit, with what transformers takes where it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qprobe.records import FormatSpec


def is_four_bit(quantization: Mapping[str, Any]) -> bool:
    """True if this quantization_config makes transformers load with bitsandbytes in 4-bit."""
    is_bitsandbytes = quantization.get("quant_method", "bitsandbytes") == "bitsandbytes"
    return is_bitsandbytes and bool(quantization.get("load_in_4bit", quantization.get("_load_in_4bit")))


_READER = ": its experts are in 4-bit, so load it with qprobe.load_dynamic_4bit"


def refused_by_others(compute_dtype: str) -> str:
    """What a checkpoint with experts in 4-bit names as its dtype of computation.

    transformers looks it up in torch before anything is read (5.23, `BitsAndBytesConfig.__init__`), so that
    a plain from_pretrained, which would fill experts with random numbers, fails with these words.
    """
    return f"{compute_dtype}{_READER}"


def has_four_bit_experts(quantization: Mapping[str, Any]) -> bool:
    """True for the quantization_config of a checkpoint that only qprobe reads."""
    return str(quantization.get("bnb_4bit_compute_dtype", "")).endswith(_READER)


def model_dtype(config: Mapping[str, Any]) -> Literal["bfloat16", "float16"]:
    """The 16-bit dtype of the model of this config.json; bfloat16 where it names none or another."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return "float16" if dtype == "float16" else "bfloat16"


def four_bit_format(
    quantization: Mapping[str, Any], dtype: Literal["bfloat16", "float16"] = "bfloat16"
) -> FormatSpec:
    """The format of a quantization_config that `is_four_bit`, everything else being in `dtype`.

    Its name may be "fp4", which no manifest holds: a config that names no type means FP4, and one that does
    not speak of double quantization has none (transformers 5.23, utils/quantization_config.py,
    `BitsAndBytesConfig.__init__`).
    """
    return FormatSpec(
        name=str(quantization.get("bnb_4bit_quant_type", "fp4")),
        double_quant=bool(quantization.get("bnb_4bit_use_double_quant", False)),
        compute_dtype=dtype,
    )
