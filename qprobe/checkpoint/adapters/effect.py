"""Whether a checkpoint holds what an adapter adds to its base: measured, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qprobe.checkpoint.adapters.lora import Adapter, Fit, Pair, read_adapter
from qprobe.checkpoint.load import codes_of
from qprobe.checkpoint.plain import load_plainly
from qprobe.checkpoint.ready import is_four_bit
from qprobe.errors import ModelError
from qprobe.formats.codes_file import CodesReader, open_codes
from qprobe.formats.nf4 import Nf4, StoredNf4
from qprobe.loading.device import pick_device
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.reference import reference_of
from qprobe.loading.skeleton import Skeleton, skeleton_of
from qprobe.loading.source import resolve
from qprobe.manifest.read import read_manifest
from qprobe.records import FormatSpec
from qprobe.system.devices import AskedDevice
from qprobe.system.wording import counted, named

MANIFEST_FILE = "skiplist.json"  # of the adapter's base, beside what `finetune` wrote
HALF = 0.5  # of what is added: less than this came back from rounding as it was, or was never added


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer of an adapter, and what the checkpoint holds of it.

    state: "took effect", "no effect", "rounded away" where weights of this form hold little more of it, or
    why it can have none, see `qprobe.checkpoint.adapters.lora.Fit`.
    arrived: the share of what the adapter adds that the checkpoint's weight holds; None where none can.
    """

    layer: str
    state: str
    arrived: float | None = None


@dataclass(frozen=True)
class Arrived:
    """How much of what an adapter adds is in the stored weights, summed over layers.

    along: sum of (stored - before) * added; energy: sum of added². Rounding noise of either sign cancels in
    `along`, but where a step of the grid is wider than what is added, rounding brings the old value back.
    """

    along: float = 0.0
    energy: float = 0.0

    @property
    def share(self) -> float:
        """1 where all of it arrived, 0 where rounding undid it."""
        return self.along / self.energy if self.energy else 0.0

    def __add__(self, other: Arrived) -> Arrived:
        return Arrived(self.along + other.along, self.energy + other.energy)


def arrived(before: Tensor, stored: Tensor, added: Tensor) -> Arrived:
    """How much of `added` lies between the weights `before` and `stored`, all of one shape."""
    change = (stored.float() - before.float()).flatten().double()
    wanted = added.flatten().double()
    return Arrived(float(change @ wanted), float(wanted @ wanted))


def weight_of(module: Any) -> Tensor:
    """(out_features, in_features): what a linear, in 16-bit or 4-bit, computes with."""
    if is_four_bit(module):
        return StoredNf4(module.weight.data, module.weight.quant_state).packed().unpack()
    return module.weight.data.clone()


@quiet_models()
def adapter_effect(
    folder: Path, adapter: Path, model: str | None, device: AskedDevice, trusts_code: bool, spec: FormatSpec
) -> tuple[AdaptedLayer, ...]:
    """For each layer of `adapter` whether the checkpoint in `folder` holds what it adds to its base.

    Both models are loaded, the base's files mapped. model: where the base's 16-bit weights are; None for the
    model that the adapter names. spec: of the checkpoint's 4-bit layers. A 4-bit layer is held against the
    base's weight in 4-bit, calibrated where the adapter's folder has a manifest that says so.
    Raises RunError for what is no adapter, ModelError for a base that cannot be had.
    """
    found = read_adapter(adapter)
    skeleton = skeleton_of(resolve(str(folder), trusts_code), spec.compute_dtype)
    fits = found.fits(skeleton.model)
    base = _base(found, model, trusts_code, skeleton)
    merged, _ = load_plainly(skeleton, pick_device(device))
    with ExitStack() as stack:
        codes = _codes(found, stack)
        return tuple(
            _effect(name, fits[name], _forms(found, name), base, merged, spec, codes) for name in found.layers
        )


def _base(adapter: Adapter, model: str | None, trusts_code: bool, skeleton: Skeleton) -> nn.Module:
    """The 16-bit model that `adapter` was trained on, on the host."""
    name = model or adapter.config.get("base_model_name_or_path")
    if not isinstance(name, str):
        raise ModelError(f"{adapter.folder} does not name its base. Pass --model with its 16-bit weights.")
    wanted = skeleton_of(resolve(name, trusts_code), skeleton.dtype)
    if wanted.fingerprint != skeleton.fingerprint:
        raise ModelError(
            f"{name} is a {wanted.architecture} of other names or shapes than the checkpoint. Pass --model "
            "with the 16-bit weights that the adapter was trained on."
        )
    return reference_of(wanted, AskedDevice("cpu"), on_host=True).model


def _codes(adapter: Adapter, stack: ExitStack) -> CodesReader | None:
    """The calibrated weights of the adapter's base, open until `stack` ends; None where it has none."""
    path = adapter.folder / MANIFEST_FILE
    file = codes_of(read_manifest(path), adapter.folder) if path.is_file() else None
    return None if file is None else stack.enter_context(open_codes(file))


def _forms(adapter: Adapter, name: str) -> list[Pair]:
    """What a merge may add to the layer `name`: all, and to 16-bit weights what was learned alone."""
    pair = adapter.layers[name]
    return [pair] if adapter.learned is None else [pair, pair.first(adapter.learned)]


def _effect(
    name: str,
    fit: Fit,
    forms: Sequence[Pair],
    base: nn.Module,
    merged: nn.Module,
    spec: FormatSpec,
    codes: CodesReader | None,
) -> AdaptedLayer:
    if fit != "fits":
        return AdaptedLayer(name, fit)
    module: Any = merged.get_submodule(name)
    stored, device = weight_of(module), module.weight.device
    before = weight_of(base.get_submodule(name)).to(device)
    bases, pairs = [before], forms
    if is_four_bit(module):
        round_to_nearest = Nf4(spec.blocksize, spec.double_quant).stored
        calibrated = codes.stored(name, device) if codes is not None and name in codes.layers else None
        bases.append((calibrated or round_to_nearest(before)).packed().unpack())
        pairs = forms[:1]
    nearest = min(bases, key=lambda x: float(torch.linalg.vector_norm(stored.float() - x.float())))
    change = stored.float() - nearest.float()
    added = min((x.delta(device) for x in pairs), key=lambda x: float(torch.linalg.vector_norm(change - x)))
    if not added.any():
        return AdaptedLayer(name, "zero")
    share = arrived(nearest, stored, added).share
    if share >= HALF:
        return AdaptedLayer(name, "took effect", share)
    rounded = (nearest.float() + added).to(stored.dtype)
    if is_four_bit(module):
        rounded = Nf4(spec.blocksize, spec.double_quant).stored(rounded).packed().unpack()
    # Calibrated codes may hold less than nearest ones: they are chosen for what the layer puts out.
    is_lost = _can_hold(nearest, rounded, added) and share < HALF * arrived(nearest, rounded, added).share
    return AdaptedLayer(name, "no effect" if is_lost else "rounded away", share)


def _can_hold(before: Tensor, rounded: Tensor, added: Tensor) -> bool:
    """Whether `rounded`, of `before` + `added`, all of one shape, holds half of `added` for certain.

    Rounding errors e, independent of what is added, move the share by about |e| / (|added| sqrt(n)).
    """
    errors = rounded.float() - before.float() - added
    error, size = (float(torch.linalg.vector_norm(x.double())) for x in (errors, added))
    moved = error / (size * added.numel() ** 0.5)
    return arrived(before, rounded, added).share >= HALF and 2 * moved <= HALF


TOO_SMALL = "it is smaller than the steps between the numbers that are stored"


def effect_remarks(found: Sequence[AdaptedLayer]) -> Iterator[str]:
    """A sentence on the layers in which rounding takes back what an adapter adds, if there are any."""
    names = [x.layer for x in found if x.state == "rounded away"]
    if names:
        yield (
            f"{len(names)} of {counted(len(found), 'layer')} of the adapter hold less than half of what it "
            f"adds, since {TOO_SMALL}, as in any merge into this form: {named(names)}."
        )


def effect_problems(found: Sequence[AdaptedLayer]) -> Iterator[str]:
    """What is wrong with the effect of an adapter, one sentence for each kind."""
    whys = {
        "no effect": "hold less than half of what it adds",
        "not in the model": "are not in the checkpoint",
        "another shape": "have another shape in the checkpoint",
        "tied": "are tied to the embedding",
    }
    for state, why in whys.items():
        names = [x.layer for x in found if x.state == state]
        if names:
            yield f"{len(names)} of {counted(len(found), 'layer')} of the adapter {why}: {named(names)}."
    if found and all(x.state == "zero" for x in found):
        yield "The adapter adds nothing: lora_B is zero in all of its layers."
