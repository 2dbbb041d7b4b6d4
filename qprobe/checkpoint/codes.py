"""Calibrated weights in a loaded model, and such a model as a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qprobe.checkpoint.verify import ExpectedLayer
from qprobe.errors import ManifestError
from qprobe.formats.codes_file import CodesReader, open_codes
from qprobe.formats.nf4 import StoredNf4

# Of the energy of a weight as loaded: calibration moves it by a few percent, another model's weight by 200 %.
MOST_CHANGE = 0.5


def put_calibrated(model: nn.Module, codes: Path, expected: Sequence[ExpectedLayer]) -> None:
    """Replace the 4-bit weights of `model`, loaded in NF4, by those in `codes`, where it holds them.

    A layer that the file does not hold is one that calibration left as it was.
    Raises ManifestError if a weight in the file is another layer's or another model's.
    """
    with open_codes(codes) as file:
        for promise in expected:
            if promise.precision == "nf4" and promise.name in file.layers:
                _put(model.get_submodule(promise.name), promise.name, file)


def _put(module: Any, name: str, file: CodesReader) -> None:
    from bitsandbytes.nn.modules import Params4bit

    before = module.weight
    codes, state = file.raw(name)
    weight = Params4bit.from_prequantized(
        codes, state, requires_grad=False, device=before.device, module=module
    )
    weight.quant_state.dtype = before.quant_state.dtype
    _check_same_weight(name, before, weight, file.path)
    module.weight = weight


def _check_same_weight(name: str, before: Any, after: Any, path: Path) -> None:
    """Raises ManifestError unless both 4-bit parameters are of one 16-bit weight."""
    shapes = [tuple(one.quant_state.shape) for one in (before, after)]
    if shapes[0] == shapes[1]:
        was, now = (StoredNf4(one.data, one.quant_state).packed().unpack().float() for one in (before, after))
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
