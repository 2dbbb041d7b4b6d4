"""Experts in 4-bit in a model that transformers loads, each through a parametrization of bitsandbytes.

transformers converts linears only. Its loader is open to other quantizers, though: that of `quantizer.py`
rounds fused weights of experts as they are read, one at a time, and leaves linears to transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from qprobe.errors import ModelError
from qprobe.models.headers import read_headers

METHOD = "bitsandbytes_with_experts"
"""What transformers knows the quantizer here by, while it loads."""


def as_bitsandbytes(model: Any) -> None:
    """Lets `model`, loaded with `ExpertsConfig`, say what it is to others: one of bitsandbytes."""
    from transformers import BitsAndBytesConfig
    from transformers.utils.quantization_config import QuantizationMethod

    given = model.config.quantization_config
    plain = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=given.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=given.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=given.bnb_4bit_compute_dtype,
        llm_int8_skip_modules=given.llm_int8_skip_modules,
    )
    model.config.quantization_config = model.hf_quantizer.quantization_config = plain
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES


def put_state(model: nn.Module, name: str, state: dict[str, Any]) -> None:
    """Let the parameter `name`, which holds codes, be read by the packed quantization state `state`."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    replace_parameter_4bit_prequantized(module, leaf, state, getattr(module, leaf).device)


def read_states(model: nn.Module, folder: Path, names: Sequence[str]) -> None:
    """Put the quantization states in `folder` of the experts `names`, whose codes are in place.

    Raises ModelError for one that the files lack.
    """
    tensors = read_headers(folder)
    for name in names:
        keys = [x for x in tensors if x.startswith(f"{name}.")]
        if not keys:
            raise ModelError(f"{folder} has no quantization state of {name}. Quantize the model again.")
        parts = {x.removeprefix(f"{name}."): _read(folder / tensors[x].file, x) for x in keys}
        put_state(model, name, parts)


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


def four_bit_experts(model: nn.Module) -> dict[str, Any]:
    """The quantization state of each parameter in 4-bit that is no linear's, by name."""
    return dict(_four_bit_experts(model))


def _four_bit_experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    for name, module in model.named_modules():
        if not is_parametrized(module):
            continue
        lists: Any = module.parametrizations
        for leaf, steps in lists.items():
            for step in steps:
                if isinstance(step, Bnb4bitParametrization):
                    yield f"{name}.{leaf}", step.quant_state


def codes_of_experts(model: nn.Module, name: str) -> Tensor:
    """The packed codes of the parameter `name`, one of `four_bit_experts`."""
    parent, _, leaf = name.rpartition(".")
    lists: Any = model.get_submodule(parent).parametrizations
    return lists[leaf].original


def quantized(weight: Tensor, quant_type: str, double_quant: bool) -> tuple[Tensor, dict[str, Any]]:
    """(codes, packed quantization state) of a weight, rounded to nearest along its memory."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        weight.contiguous(), compress_statistics=double_quant, quant_type=quant_type, blocksize=64
    )
    return codes, state.as_dict(packed=True)


def replace_codes(model: nn.Module, name: str, codes: Tensor, state: Any) -> None:
    """Let `codes` and the quantization state `state` be the weight `name`, one of `four_bit_experts`."""
    parent, _, leaf = name.rpartition(".")
    lists: Any = model.get_submodule(parent).parametrizations
    (step,) = (x for x in lists[leaf] if hasattr(x, "quant_state"))
    state.dtype = step.quant_state.dtype
    lists[leaf].original.data = codes
    step.quant_state = state
