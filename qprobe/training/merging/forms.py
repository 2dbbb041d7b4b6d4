"""The two forms of a merged checkpoint: the adapter added to weights, in 16-bit or back in 4-bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qprobe.checkpoint.adapters.effect import Arrived, arrived, weight_of
from qprobe.checkpoint.adapters.lora import Adapter
from qprobe.checkpoint.auditing.audit import audit_files
from qprobe.checkpoint.codes import put_stored
from qprobe.checkpoint.load import dynamic_4bit
from qprobe.checkpoint.matching import check_keys
from qprobe.checkpoint.quantize import MAX_SHARD, save_four_bit, save_processor
from qprobe.checkpoint.ready import is_four_bit
from qprobe.checkpoint.starts.attached import names_as_written, peft_library
from qprobe.errors import ModelError, VerificationError
from qprobe.exports.export import config_entries
from qprobe.formats.codes_file import CodesReader, open_codes
from qprobe.formats.nf4 import Nf4, StoredNf4
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.source import resolve
from qprobe.manifest.records import Manifest
from qprobe.options import Base, Form
from qprobe.records import FormatSpec
from qprobe.system.devices import BEST, AskedDevice
from qprobe.training.bases import open_base
from qprobe.training.origin import Origin, as_merged


def fold(
    model: nn.Module,
    adapter: Adapter,
    spec: FormatSpec,
    beside: nn.Module | None = None,
    codes: CodesReader | None = None,
) -> dict[str, Arrived]:
    """Adds `adapter` to the weights of `model`; how much of it arrived, by layer, in the form that they have.

    beside: the model whose weights are added to, and put into `model`; None for its own. codes: of sums that
    were calibrated, see `qprobe.training.merging.calibrated`.
    A layer in 4-bit is dequantized and added to; where `codes` holds the sum it is taken from there, else it
    is rounded to nearest in the format `spec`. Sums are taken in float32 and rounded once. Layers that the
    adapter leaves as they are keep their codes to the bit. Raises ModelError as of `with_added`.
    """
    found = {}
    for name, pair in adapter.layers.items():
        if pair.is_zero:
            found[name] = Arrived()
            continue
        module: Any = model.get_submodule(name)
        added = pair.delta(module.weight.device)
        without = weight_of(module)
        before = without if beside is None else weight_of(beside.get_submodule(name))
        sums = with_added(name, before, added)
        if is_four_bit(module):
            held = codes.stored(name, sums.device) if codes is not None and name in codes.layers else None
            put_stored(module, held or _rounded(spec)(sums))
        else:
            module.weight.data.copy_(sums)
        found[name] = arrived(without, weight_of(module), added)
    return found


def with_added(layer: str, weight: Tensor, added: Tensor) -> Tensor:
    """`weight`, of `layer`, with `added` to it, in its own dtype, rounded once.

    Raises ModelError for sums beyond that dtype, which would be infinite.
    """
    sums = (weight.float() + added).to(weight.dtype)
    if not bool(torch.isfinite(sums).all()):
        held = f"{weight.dtype}".removeprefix("torch.")
        raise ModelError(
            f"With the adapter added, weights of {layer} are beyond what {held} holds "
            f"({torch.finfo(weight.dtype).max:,.0f} at most), or were so before. Nothing was kept; train on "
            "a base in bfloat16, or serve the adapter beside its base."
        )
    return sums


def _rounded(spec: FormatSpec) -> Callable[[Tensor], StoredNf4]:
    return Nf4(spec.blocksize, spec.double_quant).stored


@dataclass(frozen=True)
class Job:
    """What all forms share. for_tool: as of `qprobe.exports.export.config_entries`."""

    adapter: Adapter
    origin: Origin
    skeleton: Skeleton
    target: Path
    device: AskedDevice = BEST
    trusts_code: bool = False
    for_tool: str | None = None

    def base(self, base: Base) -> tuple[Any, Any]:
        """(model, processor) without the adapter."""
        origin = self.origin
        folder = origin.path.parent
        return open_base(origin.manifest, folder, base, self.skeleton, self.device, origin.dtype)

    def adapted(self) -> Any:
        """The model as it was trained, the adapter beside the weights, by peft itself."""
        model, _ = self.base(self.origin.base)
        with names_as_written():
            tuned = peft_library().PeftModel.from_pretrained(model, str(self.adapter.folder))
        return tuned.get_base_model().eval().requires_grad_(False)


@dataclass(frozen=True)
class Written:
    """One form as it lies in `folder`, before it is chosen. arrived: by layer."""

    folder: Path
    skeleton: Skeleton
    arrived: dict[str, Arrived]


def write_16bit(job: Job, folder: Path) -> Written:
    """The 16-bit weights with what the adapter learned added, in `folder`."""
    model, processor = job.base("16-bit")
    found = fold(model, job.adapter.on_16bit(), job.origin.manifest.format)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    save_processor(processor, folder)
    return Written(folder, _audited(job, folder, None), found)


def write_4bit(job: Job, folder: Path, codes: Path | None = None) -> Written:
    """The base's own weights with the adapter added, in 4-bit, in `folder`.

    codes: a file of them, calibrated, for layers that the adapter changes; None to round those to nearest.
    Layers that it leaves as they are have the base's codes, on the 16-bit base those of the scan.
    """
    manifest = as_merged(job.origin, job.skeleton)
    entries = config_entries(manifest, job.for_tool)
    model, processor = job.base(job.origin.base)
    beside = model
    if job.origin.base == "16-bit":
        model = dynamic_4bit(manifest, job.skeleton, job.device, job.origin.codes())
    with nullcontext() if codes is None else open_codes(codes) as file:
        found = fold(model, job.adapter, manifest.format, beside, file)
    check_keys(job.skeleton.model, entries, manifest)
    save_four_bit(model, processor, manifest, entries, folder)
    return Written(folder, _audited(job, folder, manifest), found)


def _audited(job: Job, folder: Path, manifest: Manifest | None) -> Skeleton:
    """The skeleton of the checkpoint in `folder`. Raises VerificationError if its parts disagree."""
    skeleton = job.skeleton.of_copy(resolve(str(folder), job.trusts_code))
    found = audit_files(folder, skeleton, manifest, folder)
    if not found.ok:
        raise VerificationError(
            f"The merged checkpoint is not what was to be written: {found.problems[0]} Nothing was kept; "
            "report this with the versions that `qprobe doctor` prints."
        )
    return skeleton


Candidate = Literal["16-bit", "4-bit", "4-bit, calibrated"]
"""What is measured: in 4-bit weights are rounded to nearest, or their codes calibrated."""
CALIBRATED: Candidate = "4-bit, calibrated"
ROUNDINGS: dict[Candidate, str] = {"4-bit": "nearest", CALIBRATED: "calibrated"}
Writer = Callable[[Job, Path], Written]
WRITERS: dict[Form, Writer] = {"16-bit": write_16bit, "4-bit": write_4bit}
