"""The merged model in 16-bit under measurement, on its device or, where that has no room, streamed to it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qprobe.calibration.planned.limit import GIB, USED, needed_beyond, shape_of_batch
from qprobe.calibration.room import check_limit
from qprobe.checkpoint.adapters.effect import weight_of
from qprobe.checkpoint.adapters.lora import Adapter
from qprobe.checkpoint.ready import is_four_bit
from qprobe.inputs import halving
from qprobe.inputs.answers import Batching
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.device import pick_device
from qprobe.loading.mapped import Mapped
from qprobe.loading.reference import Reference, reference_of
from qprobe.measure.memory import free_memory, held_bytes
from qprobe.measure.subject import Subject, limited_subject, subject_of
from qprobe.records import Sample
from qprobe.system.devices import parse_device
from qprobe.training.merging.forms import Job, with_added

ELSEWHERE = "as in the merged checkpoint"  # why a layer is not in 4-bit here


def merged_subject(
    job: Job,
    layers: Collection[str],
    processed: ProcessedSamples,
    samples: Sequence[Sample],
    batching: Batching,
    folder: Path,
) -> tuple[Subject, tuple[str, ...]]:
    """(the base's own weights with the adapter added, in 16-bit, and `layers` in 4-bit beside them; notes).

    Where the device has no room for all of that, with a batch of `samples`, weights wait on the host, which a
    note says; the base is then gone before the 16-bit model is there. folder: where files may be made.
    Open `Subject.streaming` around all that runs the model. Raises MachineError if even so memory does not
    suffice.
    """
    fmt, place = job.origin.manifest.format, pick_device(job.device)
    config, free = job.skeleton.config, free_memory(place)
    needed = needed_beyond(
        free, job.skeleton, fmt, lambda: shape_of_batch(config, processed, samples, batching)
    )
    if needed is None:
        reference = _on_device(job, processed.processor)
        halving.free_memory()  # of the base
        return _only(subject_of(reference, fmt, processed), layers), ()
    limit = int(USED * free) + held_bytes(place)
    reference = _on_host(job, processed.processor, folder)
    halving.free_memory()
    subject = _only(limited_subject(reference, fmt, limit, folder, processed, is_found=True), layers)
    check_limit(subject)
    why = (
        f"{place} has {free / GIB:.1f} GiB free, and with all weights on it calibrating the merged model "
        f"would take about {needed / GIB:.1f} GiB, so they waited on the host."
    )
    return subject, (why,)


def _on_device(job: Job, processor: Any) -> Reference:
    """The base, in 4-bit, is beside it for a while, for which there is room if there is for measuring."""
    reference = _reference(job, processor, on_host=False)
    base = reference.model if job.origin.base == "16-bit" else job.base(job.origin.base)[0]
    for name, weight in _own_weights(base, job.adapter):
        reference.model.get_submodule(name).weight.data.copy_(weight)
    return reference


def _on_host(job: Job, processor: Any, folder: Path) -> Reference:
    """All weights wait in files, those of the checkpoint and, in `folder`, files without a name."""
    mapped = Mapped(folder)
    if job.origin.base == "16-bit":
        reference = _reference(job, processor, on_host=True)
        sums = _in_files(reference.model, job.adapter, mapped)
    else:
        sums = _in_files(job.base(job.origin.base)[0], job.adapter, mapped)
        halving.free_memory()  # of the base
        reference = _reference(job, processor, on_host=True)
    for name, weight in sums.items():
        reference.model.get_submodule(name).weight.data = weight
    return reference


def _reference(job: Job, processor: Any, on_host: bool) -> Reference:
    one = parse_device(str(pick_device(job.device)))  # since a base is on one
    return reference_of(job.skeleton, one, on_host, processor)


def _in_files(base: nn.Module, adapter: Adapter, mapped: Mapped) -> dict[str, Tensor]:
    return {name: mapped.keep(weight.cpu()) for name, weight in _own_weights(base, adapter)}


def _own_weights(base: nn.Module, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """(layer, weight in 16-bit) of `base` with `adapter` added, where the 16-bit model has another one."""
    for name, module in base.named_modules():
        pair = adapter.layers.get(name)
        if pair is not None and not pair.is_zero:
            before: Any = weight_of(module)
            yield name, with_added(name, before, pair.delta(before.device))
        elif is_four_bit(module):
            yield name, weight_of(module)


def _only(subject: Subject, layers: Collection[str]) -> Subject:
    """`subject`, in whose all-4-bit form `layers` alone are in 4-bit."""
    inventory = subject.inventory
    marked = tuple(
        x if x.name in layers else replace(x, fixed=x.fixed or ELSEWHERE) for x in inventory.layers
    )
    return replace(subject, inventory=replace(inventory, layers=marked))
