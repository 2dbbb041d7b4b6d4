"""qprobe's own: plain NF4, calibrated, or calibrated and tuned, alone and with its list by budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qprobe.calibration.damage import split_samples
from qprobe.calibration.gram import shared_inputs
from qprobe.calibration.token_weights import token_weights
from qprobe.calibration.tuning import Given, tune
from qprobe.formats.nf4 import Nf4, StoredNf4
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec, Sample
from qprobe.selection.search.damage import least_damage
from tests.benchmarks.calibration import all_rounded, stored
from tests.benchmarks.peers.opening import reference_of
from tests.benchmarks.peers.passages import batches_of, read_passages
from tests.benchmarks.peers.workers.exchange import Cost, Job, hand_back, measured, read_job
from tests.benchmarks.rankings.additive import default_damage

KEPT_BITS = 16.0


def bits_of(subject: Subject, kept: frozenset[str] = frozenset()) -> dict[str, float]:
    """Bits per weight of every linear that may be in 4-bit, scales included."""
    return {
        name: KEPT_BITS if name in kept else 8 * layer.bytes_4bit / (layer.in_features * layer.out_features)
        for name, layer in subject.layers.items()
        if name in subject.quantized
    }


def limit_bytes(subject: Subject, bits: float) -> int:
    """Bytes of the whole model where its linears take `bits` per weight."""
    plain = sum(x.bytes_4bit for n, x in subject.layers.items() if n in subject.quantized)
    weights = sum(x.in_features * x.out_features for n, x in subject.layers.items() if n in subject.quantized)
    return subject.inventory.standard_4bit_bytes - plain + int(bits * weights / 8)


def hand_back_with_lists(job: Job, subject: Subject, name: str, batches: list[Batch], spent: Cost) -> None:
    """The weights in place, alone and with the list that fills each budget, chosen on the same passages."""

    def give(title: str, kept: frozenset[str], cost: Cost) -> None:
        names = sorted(subject.quantized - kept)
        weights: Mapping[str, Tensor] = {x: subject.dequantized.between(x, 1.0, torch.float32) for x in names}
        hand_back(
            job, title, weights, bits_of(subject, kept), cost, "bitsandbytes", f"{len(kept)} layers kept"
        )

    give(name, frozenset(), spent)
    if not job.options["bits"]:
        return
    with measured(job.device) as cost, walking(subject.path):
        damage = default_damage(subject.path, batches)
    cost.seconds += spent.seconds
    for bits in job.options["bits"]:
        found = least_damage(subject.inventory, damage, limit_bytes(subject, bits), "")
        give(f"{name} with list, {bits:g} bits", frozenset(found.kept), cost)


def calibrated(subject: Subject, batches: list[Batch]) -> dict[str, StoredNf4]:
    """Codes and scales of every 4-bit weight, as a scan of a small model chooses them.

    Tokens are weighed by how much answers depend on them, and codes moved for the gradients at outputs.
    """
    inputs = shared_inputs(subject, batches[:1])
    with walking(subject.path):
        weights = token_weights(subject, inputs, batches)
    return stored(subject, all_rounded(subject, inputs, batches, weights.of, weights.outputs))


def put(subject: Subject, weights: Mapping[str, StoredNf4]) -> None:
    """Put `weights` in place."""
    for name, one in weights.items():
        subject.dequantized.put(name, one.packed())


def subject_and_samples(job: Job) -> tuple[Subject, list[Sample]]:
    """The model as qprobe opens it, and the passages to calibrate on."""
    return subject_of(reference_of(job.model, job.device), FormatSpec()), read_passages(
        Path(job.options["passages"])
    ).calibration


def main() -> None:
    """Make the format that is asked for and hand it back."""
    job = read_job()
    subject, samples = subject_and_samples(job)
    batches = batches_of(subject, samples)
    if job.options["kind"] == "nf4":
        with measured(job.device) as nearest:
            for name in sorted(subject.quantized):
                subject.dequantized.weight(name)
        hand_back_with_lists(job, subject, "nf4", batches, nearest)
        return
    with measured(job.device) as cost:
        found = calibrated(subject, batches)
        if job.options["kind"] == "tuned":
            training, kept_back = (batches_of(subject, part) for part in split_samples(samples))
            found = dict(tune(subject, found, Given(training, kept_back), job.options["tune"], Nf4()).stored)
    put(subject, found)
    hand_back_with_lists(job, subject, job.options["name"], batches, cost)


if __name__ == "__main__":
    main()
