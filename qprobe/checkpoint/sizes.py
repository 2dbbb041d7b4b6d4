"""Exact bytes of a model under one set of 4-bit layers: in its linears, and outside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qprobe.loading.inventory import measured_layers, parameter_name, why_uncovered
from qprobe.records import Inventory, Linear
from qprobe.registry.precisions import FP4, NF4, four_bit_bytes, packed_bytes

BUFFER = "a buffer that is saved with the model"
WHY_BIAS = "a bias; bitsandbytes converts weights only"
WHY_NORM = "a norm"
WHY_TABLE = "an embedding table, which multiplies nothing"
WHY_POSITIONS = "embeddings of positions or classes, which multiply nothing"
WHY_VECTOR = "a vector or scalar, no matrix"
WHY_CONV1D = "a Conv1D, which this tool leaves in 16-bit"
WHY_NO_LINEAR = "a parameter of no linear layer"


@dataclass(frozen=True)
class Outside:
    """One parameter or buffer outside the listed linears, and why it keeps its precision.

    bytes: as stored; 0 where its storage is counted under another name. elements: numbers in it, 0 likewise
    and for a buffer.
    """

    name: str
    bytes: int
    why: str
    elements: int

    @property
    def parameter_bytes(self) -> int:
        """The bytes that count as parameters: none of a buffer's."""
        return 0 if self.why == BUFFER else self.bytes


def everything_outside(model: nn.Module) -> tuple[Outside, ...]:
    """All that `model` holds beside the weights of `measured_layers(model)`, in module order.

    The bytes sum to the inventory's other_bytes.
    """
    layers = measured_layers(model)
    owners = {id(x.weight): name for name, x in layers.items()}
    listed = {parameter_name(name, x) for name, x in layers.items()}
    counted: dict[int, str] = {}
    found = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in listed:
            continue
        key = id(parameter)
        twin = owners.get(key) or counted.get(key)
        if twin is not None:
            found.append(
                Outside(name, 0, f"{_why(model, name, parameter)}; tied to {twin}, counted there", 0)
            )
            continue
        counted[key] = name
        found.append(Outside(name, _bytes(parameter), _why(model, name, parameter), parameter.numel()))
    return (*found, *_buffers(model))


def _buffers(model: nn.Module) -> list[Outside]:
    saved = set(model.state_dict(keep_vars=True))
    return [Outside(name, _bytes(b), BUFFER, 0) for name, b in model.named_buffers() if name in saved]


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def _why(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """Why this parameter stays as it is."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if "norm" in type(module).__name__.lower():
        return WHY_NORM
    if isinstance(module, nn.Embedding):
        return WHY_TABLE
    if "bias" in leaf:
        return WHY_BIAS
    multiplies = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    if not multiplies and parameter.numel() > 1 and ("embed" in leaf or leaf.endswith("_token")):
        return WHY_POSITIONS
    if parameter.dim() < 2:
        return WHY_VECTOR
    if type(module).__name__ == "Conv1D":  # of transformers (GPT-2): a linear with its weight transposed
        return WHY_CONV1D
    return why_uncovered(model, parent) or WHY_NO_LINEAR


@dataclass(frozen=True)
class Layout:
    """Which linears are in 4-bit, and how their block scales are stored.

    double_quant: block scales in 8 bit with fp32 scales of their own (True) or fp32 each (False); None where
        nothing is in 4-bit.
    note: a sentence a reader must see, or "".
    """

    name: str
    four_bit: frozenset[str]
    double_quant: bool | None
    blocksize: int = 64
    note: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Bytes:
    """parameter_bytes: 4-bit codes and every 16-bit parameter, as published figures count.

    total_bytes: those, the block scales of the 4-bit weights, and buffers saved with the model.
    """

    layers_4bit: int
    parameter_bytes: int
    total_bytes: int


def bytes_of(layers: Iterable[Linear], beside: Iterable[Outside], layout: Layout) -> Bytes:
    """Bytes of these linears and of what is beside them under `layout`."""
    count = parameters = total = 0
    for x in layers:
        if x.name in layout.four_bit:
            count += 1
            parameters += packed_bytes(x.shape)
            total += four_bit_bytes(x.shape, layout.blocksize, bool(layout.double_quant))
        else:
            parameters += x.bytes_16bit
            total += x.bytes_16bit
    for item in beside:
        parameters += item.parameter_bytes
        total += item.bytes
    return Bytes(count, parameters, total)


def standard_layouts(inventory: Inventory) -> tuple[Layout, ...]:
    """16-bit, and every linear but the fixed ones in NF4 or FP4.

    FP4 is what `load_in_4bit=True` alone gives in transformers, whose BitsAndBytesConfig defaults to FP4
    without double quantization; a code of FP4 takes 4 bits as one of NF4 does.
    """
    quantizable = frozenset(x.name for x in inventory.layers if not x.fixed)
    return (
        Layout("16-bit", frozenset(), None),
        Layout(NF4.name, quantizable, True),
        Layout(f"{NF4.name}-single", quantizable, False),
        Layout(
            FP4.name,
            quantizable,
            False,
            note="fp4 is what load_in_4bit=True alone gives: FP4 without double quantization, the default of "
            "transformers' BitsAndBytesConfig; with it, FP4 takes as many bytes as nf4.",
        ),
    )
