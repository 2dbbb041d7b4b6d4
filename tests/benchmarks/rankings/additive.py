"""Scores that add up over layers, one number a layer: the library's default and the baselines.

Each function returns nats per answer token (or a share, for local errors) by layer name. Those that run the
model expect `walking(subject.path)` around them and batches in the path's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import fsum

import pandas as pd
import torch
from torch import Tensor

from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import Attribution, Path, attribute
from qprobe.measure.runner import isolated_half, observe_outputs
from qprobe.measure.subject import Subject
from qprobe.measure.weights import weight_rows
from qprobe.records import ErrorSums
from qprobe.runs.key import RESIDUAL, Measures
from qprobe.selection.search.damage import Damage, measured_damage
from tests.benchmarks.rankings.measured import Measured

Scores = dict[str, float]
LABEL_LOGIT = 1e4  # its softmax is 1 to the last bit in float32


def weight_error(subject: Subject) -> Scores:
    """nmse of each weight."""
    rows = weight_rows(subject.dequantized)
    return _nmse(rows, rows["n"], rows["signal"], rows["noise"])


def output_errors(subject: Subject, batches: Iterable[Batch], propagated: bool) -> pd.DataFrame:
    """The unit rows "outputs" of all batches; walk no path around it, this runs in the model's own dtype."""
    measures = Measures(propagated=propagated, sensitivity=False)
    return pd.concat([observe_outputs(subject, batch, measures)[0] for batch in batches])


def output_nmse(rows: pd.DataFrame, kind: str) -> Scores:
    """nmse of each layer's output; kind: "activation" or "propagated"."""
    return _nmse(rows, *(rows[f"{kind}_{what}"] for what in ("n", "signal", "noise")))


def _nmse(rows: pd.DataFrame, n: pd.Series, signal: pd.Series, noise: pd.Series) -> Scores:
    sums: dict[str, ErrorSums] = {}
    for layer, *values in zip(rows["layer"], n, signal, noise, strict=True):
        sums[layer] = sums.get(layer, ErrorSums()) + ErrorSums(*values)
    return {name: total.nmse for name, total in sums.items()}


def times_bytes(subject: Subject, scores: Scores) -> Scores:
    """scores x bytes that keeping the layer costs: the best sum of these takes layers by score alone."""
    layers = subject.layers
    return {name: v * (layers[name].bytes_16bit - layers[name].bytes_4bit) for name, v in scores.items()}


def random_scores(subject: Subject, seed: int) -> Scores:
    """A random order of the groups, whatever their bytes."""
    generator = torch.Generator().manual_seed(seed)
    names = sorted({layer.group for layer in subject.inventory.layers})
    drawn = dict(zip(names, torch.rand(len(names), generator=generator).tolist(), strict=True))
    return times_bytes(subject, {name: drawn[layer.group] for name, layer in subject.layers.items()})


def attributed(
    path: Path, batches: Iterable[Batch], nodes: int = 1, tolerance: float = RESIDUAL
) -> list[Attribution]:
    """Path attribution by the library, one for each batch; `nodes` beside the one at the 16-bit end."""
    return [attribute(path, batch, nodes, tolerance) for batch in batches]


def path_rows(found: Sequence[Attribution]) -> pd.DataFrame:
    """The unit rows "sensitivity" of all batches."""
    return pd.concat([one.rows for one in found])


def mean_scores(rows: pd.DataFrame) -> Scores:
    """Nats per answer token of each layer from rows of the unit stage "sensitivity"."""
    return {
        str(name): fsum(part["kl_sum"]) / fsum(part["answer_tokens"]) for name, part in rows.groupby("layer")
    }


def isolated_kl(path: Path, batches: Sequence[Batch], every: bool = False) -> Scores:
    """Isolated KL by the library, one random direction a sample: of half of the samples, or `every` one."""
    totals: dict[str, list[float]] = {}
    half = isolated_half(sample for batch in batches for sample in batch.samples)
    tokens = 0
    for batch in batches:
        chosen = [i for i, x in enumerate(batch.samples) if every or x.id in half]
        tokens += sum(end - start for start, end in (batch.answers[i] for i in chosen))
        for name, values in path.isolated_kl(batch).items() if chosen else ():
            totals.setdefault(name, []).extend(values[chosen].tolist())
    return {name: fsum(values) / tokens for name, values in totals.items()}


def default_damage(path: Path, batches: Sequence[Batch]) -> Damage:
    """What `qprobe scan` chooses by: two nodes, one at the 16-bit end and one on the path."""
    return measured_damage(mean_scores(path_rows(attributed(path, batches))), isolated_kl(path, batches))


def slope_scores(path: Path, batches: Sequence[Batch], alpha: float) -> Scores:
    """<dKL/dW, D> at W + alpha D; alpha = 1 is the gradient at the 4-bit model."""
    totals: dict[str, list[float]] = {}
    for batch in batches:
        reference = path.logits(batch, 0.0)
        for name, slope in path.slopes(batch, reference, alpha).items():
            totals.setdefault(name, []).extend(slope.tolist())
    tokens = sum(batch.answer_tokens for batch in batches)
    return {name: fsum(values) / tokens for name, values in totals.items()}


def fisher_scores(path: Path, batches: Sequence[Batch], draws: int, seed: int) -> Scores:
    """Half the mean of (d log p(labels) / d step)^2, labels drawn from the 16-bit model.

    `step` moves one layer along D, so this is the KL of that layer alone to second order. The slope of
    KL(certain label || p) is that of -log p(label), so the library's own slopes serve.
    """
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, list[float]] = {}
    for batch in batches:
        reference = path.logits(batch, 0.0)
        for _ in range(draws):
            labels = [_drawn_labels(logits, generator) for logits in reference]
            for name, slope in path.slopes(batch, labels, 0.0).items():
                totals.setdefault(name, []).extend((slope.square() / 2).tolist())
    tokens = draws * sum(batch.answer_tokens for batch in batches)
    return {name: fsum(values) / tokens for name, values in totals.items()}


def _drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Logits of the same shape that are certain of one label at each position, drawn from `logits`."""
    if not len(logits):
        return logits
    labels = torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=generator).to(logits.device)
    return torch.zeros_like(logits).scatter_(1, labels, LABEL_LOGIT)


def brute_force(measured: Measured, progress: Callable[[int, int], None]) -> Scores:
    """Measured KL with one layer in 4-bit and all others in 16-bit, for each layer."""
    names = sorted(measured.subject.quantized)
    scores = {}
    for done, name in enumerate(names, start=1):
        scores[name] = measured.kl(measured.subject.quantized - {name})
        progress(done, len(names))
    return scores
