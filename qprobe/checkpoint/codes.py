"""4-bit weights put into a loaded model, and kept there as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qprobe.checkpoint.experts import four_bit
from qprobe.checkpoint.verify import ExpectedLayer
from qprobe.errors import ManifestError
from qprobe.formats.codes_file import CodesReader, open_codes
from qprobe.formats.nf4 import StoredNf4

# Of the energy of a weight as loaded: calibration moves it by a few percent, another model's weight by 200 %.
MOST_CHANGE = 0.5


def keep_codes_as_stored(model: nn.Module) -> None:
    """Turns off bitsandbytes' repacking on CPUs with AVX512-BF16.

    On its first forward there a 4-bit layer rewrites its codes and rounds its block scales to bf16, so
    that the model no longer holds what was verified; layers whose in_features are no multiple of the
    blocksize, or whose out_features are none of 32, fail. Without it the layer dequantizes, as elsewhere.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def put_calibrated(model: nn.Module, codes: Path, expected: Sequence[ExpectedLayer]) -> None:
    """Replace the 4-bit weights of `model`, loaded in NF4, by those in `codes`, where it holds them.

    A layer that the file does not hold is one that calibration left as it was.
    Raises ManifestError if a weight in the file is another layer's or another model's.
    """
    with open_codes(codes) as file:
        for layer in expected:
            if layer.is_four_bit and layer.name in file.layers:
                if layer.is_experts:
                    _put_experts(model, layer.name, file)
                else:
                    _put(model.get_submodule(layer.name), layer.name, file)


def _put_experts(model: nn.Module, name: str, file: CodesReader) -> None:
    before = StoredNf4(four_bit.codes_of_experts(model, name), four_bit.four_bit_experts(model)[name])
    after = file.stored(name, before.codes.device)
    _check_same_weight(name, before, after, file.path)
    four_bit.replace_codes(model, name, after.codes, after.state)


def _put(module: Any, name: str, file: CodesReader) -> None:
    before = module.weight
    codes, state = file.raw(name)
    weight = _as_stored(module, codes, state)
    was, now = (StoredNf4(one.data, one.quant_state) for one in (before, weight))
    _check_same_weight(name, was, now, file.path)
    module.weight = weight


def put_stored(module: Any, stored: StoredNf4) -> None:
    """`stored` as the weight of the 4-bit layer `module`, in the place of the one that it has."""
    module.weight = _as_stored(module, stored.codes, stored.state.as_dict(packed=True))


def _as_stored(module: Any, codes: Tensor, state: dict[str, Tensor]) -> Any:
    """Codes and quantization state as the parameter of the 4-bit layer `module`."""
    from bitsandbytes.nn.modules import Params4bit

    before = module.weight
    weight = Params4bit.from_prequantized(
        codes, state, requires_grad=False, device=before.device, module=module
    )
    weight.quant_state.dtype = before.quant_state.dtype
    return weight


def _check_same_weight(name: str, before: StoredNf4, after: StoredNf4, path: Path) -> None:
    """Raises ManifestError unless both 4-bit weights are of one 16-bit weight."""
    shapes = [tuple(one.state.shape) for one in (before, after)]
    if shapes[0] == shapes[1]:
        was, now = (one.packed().unpack().float() for one in (before, after))
        change = float(torch.linalg.vector_norm(now - was) / torch.linalg.vector_norm(was)) ** 2
        is_empty = not bool(torch.isfinite(was).all()) or not bool(was.any() or now.any())
        if change <= MOST_CHANGE or is_empty:  # nothing can be told of zeros and of what is not finite
            return
        what = f"differs from the model's own by {change:.0%}"
    else:
        what = f"has shape {shapes[1]}, not {shapes[0]}"
    raise ManifestError(
        f"The calibrated weight of {name} in {path} {what}, so it is of another model. Pass the 16-bit model "
        "that was scanned, or scan this one."
    )
