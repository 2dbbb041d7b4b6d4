"""Does a loaded model hold what is expected of it: every layer's class, dtype and quantization state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from qprobe.checkpoint.experts.four_bit import codes_of_experts, four_bit_experts
from qprobe.checkpoint.storage import stored_bytes
from qprobe.errors import VerificationError
from qprobe.loading.experts.weights import expert_weight, expert_weights, form_of
from qprobe.manifest.records import Manifest
from qprobe.records import FormatSpec, Uncovered
from qprobe.registry.precisions import NESTED_BLOCKSIZE, is_four_bit, packed_bytes
from qprobe.system.wording import counted, is_or_are

SHOWN = 5  # problems that an error message spells out


@dataclass(frozen=True)
class ExpectedLayer:
    """What the layer `name` must be; shape is that of its weight, see `qprobe.records.Linear`.

    in_float32: transformers keeps it so though all else is in 16-bit.
    """

    name: str
    shape: tuple[int, ...]
    precision: str
    in_float32: bool = False

    @property
    def is_four_bit(self) -> bool:
        return is_four_bit(self.precision)

    @property
    def is_experts(self) -> bool:
        return len(self.shape) == 3


def expected_layer(name: str, shape: tuple[int, ...], precision: str, nbytes: int) -> ExpectedLayer:
    """What the linear `name` must be; nbytes: of its weight, float32 where they are 4 per element."""
    return ExpectedLayer(name, shape, precision, in_float32=nbytes == 4 * prod(shape))


def expected_layers(manifest: Manifest) -> list[ExpectedLayer]:
    """What the manifest says of each linear, in its order."""
    return [expected_layer(x.name, x.shape, x.precision, x.bytes) for x in manifest.layers]


def verify(model: nn.Module, manifest: Manifest) -> None:
    """Raises VerificationError unless `model`, as loaded, is exactly what `manifest` lists.

    Both directions: every layer of the manifest has its class, dtype, shape and quantization state,
    no linear of the model is missing from the manifest, uncovered weights are untouched, and the
    stored bytes are those expected. For a model before adapters are put on it.
    """
    verify_layers(model, expected_layers(manifest), manifest.uncovered, manifest.format)
    stored = stored_bytes(model).total_bytes
    if stored != manifest.budget.total_bytes:
        raise VerificationError(
            f"The model stores {stored:,} B, but its manifest expected {manifest.budget.total_bytes:,} B, "
            f"though every layer is right. A tied weight was copied or another tensor changed its dtype; "
            f"load the model with load_dynamic_4bit."
        )


def verify_layers(
    model: nn.Module, expected: Sequence[ExpectedLayer], uncovered: Sequence[Uncovered], spec: FormatSpec
) -> None:
    """Raises VerificationError, naming layers, unless every layer is as expected and no other is linear."""
    problems = [
        *_unlike_expected(model, expected, spec),
        *_unexpected(model, {layer.name for layer in expected}),
        *_touched(model, uncovered),
    ]
    if problems:
        shown = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise VerificationError(
            f"{counted(len(problems), 'thing')} in the model {is_or_are(len(problems))} not what is "
            f"expected of its {counted(len(expected), 'layer')}: {shown}{more}. Load it with "
            f"load_dynamic_4bit, from the checkpoint and manifest of one scan."
        )


def _unlike_expected(model: nn.Module, expected: Sequence[ExpectedLayer], spec: FormatSpec) -> Iterator[str]:
    modules = dict(model.named_modules())
    for layer in expected:
        if layer.is_experts:
            problem = experts_problem(model, layer.name, layer.shape, layer.is_four_bit, spec)
            if problem is not None:
                yield f"{layer.name} {problem}"
            continue
        module = modules.get(layer.name)
        if module is None:
            yield f"{layer.name} is listed, but the model has no such module"
            continue
        is_four_bit = layer.is_four_bit
        problem = (
            _four_bit_problem(module, layer, spec) if is_four_bit else _kept_problem(module, layer, spec)
        )
        if problem is not None:
            yield f"{layer.name} {problem}"


def _kept_problem(module: nn.Module, layer: ExpectedLayer, spec: FormatSpec) -> str | None:
    """What is wrong with a layer that must be a plain linear in 16-bit."""
    if type(module) is not nn.Linear:
        return f"must stay in 16-bit but is a {type(module).__name__}"
    if type(module.weight) is not nn.Parameter:
        return f"must stay in 16-bit but holds a {type(module.weight).__name__}"
    wanted = torch.float32 if layer.in_float32 else getattr(torch, spec.compute_dtype)
    if module.weight.dtype != wanted:
        return f"is in {module.weight.dtype}, not in {wanted}"
    if tuple(module.weight.shape) != layer.shape:
        return f"has shape {tuple(module.weight.shape)}, not {layer.shape}"
    return None


def _four_bit_problem(module: nn.Module, layer: ExpectedLayer, spec: FormatSpec) -> str | None:
    """What is wrong with a layer that must be in 4-bit."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    if not isinstance(module, Linear4bit):
        return f"must be in 4-bit but is a {type(module).__name__}"
    weight: Any = module.weight
    if not isinstance(weight, Params4bit):
        return f"must be in 4-bit but holds a {type(weight).__name__} of {weight.dtype}"
    if weight.dtype != torch.uint8:
        return f"must be in 4-bit but holds {weight.dtype}"
    if weight.quant_state is None:
        return "has lost its quant_state"
    if weight.numel() != packed_bytes(layer.shape):
        return f"holds {weight.numel()} packed bytes, not {packed_bytes(layer.shape)}"
    if module.compute_dtype != getattr(torch, spec.compute_dtype):
        return f"computes in {module.compute_dtype}, not in torch.{spec.compute_dtype}"
    return state_problem(weight.quant_state, layer.shape, spec)


def experts_problem(
    model: nn.Module, name: str, shape: tuple[int, ...], is_four_bit: bool, spec: FormatSpec
) -> str | None:
    """What is wrong with a fused weight of experts of this shape, (experts, out_features, in_features)."""
    parent, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return "is listed, but the model has no such module"
    if form_of(module) is None:
        return f"is of a {type(module).__name__}, which is no module of experts"
    experts, out_features, in_features = shape
    is_transposed = expert_weight(module, leaf).transposed
    stored = (experts, in_features, out_features) if is_transposed else shape
    state = four_bit_experts(model).get(name)
    if not is_four_bit:
        weight = module._parameters.get(leaf)
        if state is not None or weight is None:
            return "must stay in 16-bit but is in 4-bit" if state else "is listed, but is no parameter"
        if weight.dtype != getattr(torch, spec.compute_dtype):
            return f"is in {weight.dtype}, not in torch.{spec.compute_dtype}"
        return None if tuple(weight.shape) == stored else f"has shape {tuple(weight.shape)}, not {stored}"
    if state is None:
        return "must be in 4-bit but has no parametrization of bitsandbytes"
    codes = codes_of_experts(model, name)
    if codes.dtype != torch.uint8 or codes.numel() != packed_bytes(shape):
        return f"holds {codes.numel()} codes of {codes.dtype}, not {packed_bytes(shape)} packed bytes"
    return state_problem(state, stored, spec)


def state_problem(state: Any, shape: tuple[int, ...], spec: FormatSpec) -> str | None:
    """What is wrong with the quantization state of a 4-bit weight that is stored in `shape`."""
    if getattr(state, "packing_format_for_cpu", False):
        return "was repacked by bitsandbytes for this CPU, which rounds its absmax to bf16"
    wanted = {
        "quant_type": spec.quant_type,
        "blocksize": spec.blocksize,
        "nested": spec.double_quant,
        "shape": shape,
        "dtype": getattr(torch, spec.compute_dtype),
    }
    found = {key: getattr(state, key) for key in wanted}
    found["shape"] = tuple(found["shape"])
    for key, value in wanted.items():
        if found[key] != value:
            return f"has a quantization state with {key} {found[key]}, not {value}"
    absmax = torch.uint8 if spec.double_quant else torch.float32
    if state.absmax.dtype != absmax:
        return f"has its absmax in {state.absmax.dtype}, not in {absmax}"
    if spec.double_quant and state.state2.blocksize != NESTED_BLOCKSIZE:
        return f"has nested blocks of {state.state2.blocksize}, not {NESTED_BLOCKSIZE}"
    return None


def _unexpected(model: nn.Module, names: set[str]) -> Iterator[str]:
    """Linears of which nothing is expected, though 4-bit loading converts or converted them."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    inside_attention = {
        id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()
    }
    for name in [*four_bit_experts(model), *expert_weights(model)]:
        if name not in names:
            yield f"{name} is a weight of experts but not listed"
    for name, module in model.named_modules():
        if name in names:
            continue
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            yield f"{name} is a {type(module).__name__} but not listed"
        elif type(module) is nn.Linear and id(module) not in inside_attention:
            yield f"{name} is a linear but not listed"


def _touched(model: nn.Module, uncovered: Sequence[Uncovered]) -> Iterator[str]:
    """Weights that 4-bit loading must leave alone but that are gone or changed."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for weight in uncovered:
        parameter = parameters.get(weight.name)
        if parameter is None:
            yield f"{weight.name} must be left alone, but the model has no such parameter"
        elif not parameter.dtype.is_floating_point or parameter.nbytes != weight.bytes:
            found = f"{parameter.nbytes} B of {parameter.dtype}"
            yield f"{weight.name} must be left alone in {weight.bytes} B, but is {found}"
