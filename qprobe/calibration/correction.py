"""What 4-bit leaves of each weight, as a product of two thin matrices: where an adapter may start.

The correction B A of rank r that is added to W-hat leaves the least tr(H F G F^T) with F = W - W-hat - B A,
G the Gram matrix that codes were chosen with, and H that of the gradients at the outputs, where codes were
moved for it (`qprobe.calibration.two_sided`); elsewhere H is the identity, and what is least is the error of
the outputs. With G = R R^T and H = L L^T it is L^-T times the truncated singular value decomposition of
L^T (W - W-hat) R, times R^-1 (Eckart and Young 1936; Saha et al. 2024, "Compressing Large Language Models
using Low Rank and Low Precision Decomposition"; with both matrices Chekalina et al. 2025, "Generalized
Fisher-Weighted SVD").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qprobe.calibration.calibrate import gathering_turns
from qprobe.calibration.damage import FEWEST, mean_damage, unit_of
from qprobe.calibration.gptq import Metric, metric_of, shrunk
from qprobe.calibration.gram import Gram, shared_inputs
from qprobe.calibration.two_sided import mixed
from qprobe.calibration.work import Work
from qprobe.formats.codes_file import sha256_of
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.experts.routing import Product, times
from qprobe.measure.subject import Subject
from qprobe.runs.access import cannot_write
from qprobe.runs.notes import CorrectionFile
from qprobe.system.files import write_atomic

FILE_NAME = "correction.safetensors"
MOST_RANK = 64
EXACT_UP_TO = 512  # rows or columns: a whole decomposition is quick
SPARE = 16  # directions more than asked for, and sweeps, of the search for the largest ones
SWEEPS = 4
MIX = 0.75  # share of the gradients' matrix: on MiniLM 0.75 to 0.97 are level, with 32 texts as with 8
_UNTRIED = (
    "A correction of the 4-bit weights is kept, for adapters to start at. Whether it helps was not tried: "
    f"that takes {FEWEST} calibration samples."
)


def keep_correction(work: Work, rank: int) -> None:
    """Write RUN/correction.safetensors, and note it in the run; nothing where that is done for these codes.

    For each layer NAME with calibrated codes `NAME.left` (out_features, r) and `NAME.right` (r, in_features),
    bfloat16, whose product is to be added to the 4-bit weight; r is `rank` or as much as the shape has. They
    are fitted to all samples but those kept back, and are not written unless the damage on these is lower
    with them: tuned scales make up for errors of other layers, which a correction of each undoes. With none
    kept back they are written, and a note says so.
    """
    codes = work.run.codes
    assert codes is not None
    noted: CorrectionFile | None = work.run.notes.get("correction")
    path = Path(work.run.path) / FILE_NAME
    if noted is not None and (noted.codes, noted.rank) == (codes.sha256, rank):
        if noted.sha256 is None or path.exists():
            return
    training, kept_back = work.split
    fitting = replace(work, samples=tuple(training)) if kept_back else work
    found = _all_corrections(fitting, rank)
    told = (_UNTRIED,)
    if kept_back:
        batches = [work.subject.encode(group).in_dtype(work.subject.path.dtype) for group in kept_back]
        before, after = (damage_with(work.subject, x, batches) for x in ({}, found))
        told = (_comparison(before, after, unit_of(work.subject)),)
        if not after < before:
            path.unlink(missing_ok=True)
            work.run.notes.put("correction", CorrectionFile(None, codes.sha256, rank, told))
            return
    try:
        from safetensors.torch import save

        write_atomic(path, save({key: t.contiguous() for key, t in found.items()}))
    except OSError as error:
        raise cannot_write(path, error) from error
    work.run.notes.put("correction", CorrectionFile(sha256_of(path), codes.sha256, rank, told))


def damage_with(subject: Subject, factors: Mapping[str, Tensor], batches: Sequence[Batch]) -> float:
    """Damage of `subject` in 4-bit over `batches`, with the products of `factors` added to its weights."""

    def forward(name: str, product: Product, x: Tensor) -> Tensor:
        weights = subject.dequantized
        weight = (weights.weight if name in subject.quantized else weights.own)(name)
        y = times(product, x, weight.to(x.dtype))
        if f"{name}.left" not in factors:
            return y
        left, right = (factors[f"{name}.{side}"].to(x) for side in ("left", "right"))
        return y + x @ right.T @ left.T

    with walking(subject.path):
        return mean_damage(subject, batches, forward)


def _comparison(before: float, after: float, unit: str) -> str:
    """What a reader of the run is told."""
    found = (
        f"on calibration samples kept back 4-bit costs {before:.4g} {unit} without it and {after:.4g} with"
    )
    if after < before:
        return f"A correction of the 4-bit weights is kept, for adapters to start at: {found} it."
    return f"A correction of the 4-bit weights is no better than none, so it is not kept: {found} it."


def _all_corrections(work: Work, rank: int) -> dict[str, Tensor]:
    """Both factors for each layer with calibrated codes, fitted to all samples of `work`."""
    found: dict[str, Tensor] = {}
    subject = work.subject
    inputs = shared_inputs(subject, work.batches)
    turns = gathering_turns(work, inputs, inputs)
    steps = iter(range(1, turns.runs + 1))
    for gathering in turns.gathered(lambda: work.progress("keep correction", next(steps), turns.runs)):
        for one in gathering.inputs:
            gram = gathering.grams.pop(one.leader)
            with subject.running(f"correct {one.leader}"), torch.no_grad():
                names = set(one.names) - gathering.apart.keys()
                found |= _corrections(subject, names, gram, turns.outputs or {}, rank)
    return found


def _corrections(
    subject: Subject, names: Iterable[str], gram: Gram, outputs: Mapping[str, Tensor], rank: int
) -> dict[str, Tensor]:
    """Both factors for each of `names`, on the CPU; none where `gram` has no metric.

    outputs: Gram matrices of the gradients at outputs, by name, of those that have one.
    """
    found: dict[str, Tensor] = {}
    metric = metric_of(shrunk(gram.total, gram.tokens))
    if metric is None:
        return found
    for name in sorted(names):
        error = subject.dequantized.own(name).float() - subject.dequantized.weight(name).float()
        left, right = best_correction(error, metric, rank, outputs.get(name))
        found |= {f"{name}.left": left.bfloat16().cpu(), f"{name}.right": right.bfloat16().cpu()}
    return found


def best_correction(
    error: Tensor, metric: Metric, rank: int, outputs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """((out_features, r), (r, in_features)) whose product is nearest to `error` under the damped `metric`.

    outputs: Gram matrix of the gradients at the outputs, (out_features, out_features), of which a share of
    `MIX` counts beside the identity; None, or one that is not finite or zero: every output counts alike.
    """
    root = metric.feedback * metric.costs.sqrt()  # upper triangular, and root root^T the damped matrix
    matrix, side = error @ root, None if outputs is None else mixed(outputs.to(error.device), MIX)
    lower = None if side is None else torch.linalg.cholesky(side)
    u, s, vh = largest_directions(matrix if lower is None else lower.T @ matrix, min(rank, *error.shape))
    size = s.sqrt()
    left, right = u * size, torch.linalg.solve_triangular(root, size[:, None] * vh, upper=True, left=False)
    return left if lower is None else torch.linalg.solve_triangular(lower.T, left, upper=True), right


def largest_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, rank), S (rank,), V^T (rank, n): the largest singular values of `matrix` (m, n).

    Of large ones by subspace iteration (Halko, Martinsson, Tropp 2011), from seeded directions.
    """
    m, n = matrix.shape
    if min(m, n) <= max(EXACT_UP_TO, rank + SPARE):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    start = torch.randn(n, rank + SPARE, generator=torch.Generator().manual_seed(0))
    basis = start.to(matrix)
    for _ in range(SWEEPS):
        across = torch.linalg.qr(matrix @ basis).Q
        basis = torch.linalg.qr(matrix.T @ across).Q
    u, s, vh = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return u[:, :rank], s[:rank], (vh @ basis.T)[:rank]
