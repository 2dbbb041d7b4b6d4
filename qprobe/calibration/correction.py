"""What 4-bit leaves of each weight, as a product of two thin matrices: where an adapter may start.

The correction B A of rank r that is added to W-hat leaves the least error of the outputs,
tr(F G F^T) with F = W - W-hat - B A and G the Gram matrix that codes were chosen with. With G = R R^T it is
the truncated singular value decomposition of (W - W-hat) R, times R^-1 (Eckart and Young 1936; Saha et al.
2024, "Compressing Large Language Models using Low Rank and Low Precision Decomposition").
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from qprobe.calibration.calibrate import Work, gathering_turns
from qprobe.calibration.gptq import Metric, metric_of, shrunk
from qprobe.calibration.gram import Gram, shared_inputs
from qprobe.formats.codes_file import sha256_of
from qprobe.measure.subject import Subject
from qprobe.runs.access import cannot_write
from qprobe.runs.notes import CorrectionFile
from qprobe.system.files import write_atomic

FILE_NAME = "correction.safetensors"
MOST_RANK = 64
EXACT_UP_TO = 512  # rows or columns: a whole decomposition is quick
SPARE = 16  # directions more than asked for, and sweeps, of the search for the largest ones
SWEEPS = 4


def keep_correction(work: Work, rank: int) -> None:
    """Write RUN/correction.safetensors, and note it in the run; nothing where it is there for these codes.

    For each layer NAME with calibrated codes `NAME.left` (out_features, r) and `NAME.right` (r, in_features),
    bfloat16, whose product is to be added to the 4-bit weight; r is `rank` or as much as the shape has.
    """
    codes = work.run.codes
    assert codes is not None
    noted: CorrectionFile | None = work.run.notes.get("correction")
    path = Path(work.run.path) / FILE_NAME
    if noted is not None and (noted.codes, noted.rank) == (codes.sha256, rank) and path.exists():
        return
    found: dict[str, Tensor] = {}
    subject = work.subject
    inputs = shared_inputs(subject, work.batches)
    runs, turns = gathering_turns(work, inputs, inputs)
    steps = iter(range(1, runs + 1))
    for gathering in turns(lambda: work.progress("keep correction", next(steps), runs)):
        for one in gathering.inputs:
            gram = gathering.grams.pop(one.leader)
            with subject.running(f"correct {one.leader}"), torch.no_grad():
                found |= _corrections(subject, set(one.names) - gathering.apart.keys(), gram, rank)
    try:
        from safetensors.torch import save

        write_atomic(path, save({key: t.contiguous() for key, t in found.items()}))
    except OSError as error:
        raise cannot_write(path, error) from error
    work.run.notes.put("correction", CorrectionFile(FILE_NAME, sha256_of(path), codes.sha256, rank))


def _corrections(subject: Subject, names: Iterable[str], gram: Gram, rank: int) -> dict[str, Tensor]:
    """Both factors for each of `names`, on the CPU; none where `gram` has no metric."""
    found: dict[str, Tensor] = {}
    metric = metric_of(shrunk(gram.total, gram.tokens))
    if metric is None:
        return found
    for name in sorted(names):
        error = subject.dequantized.own(name).float() - subject.dequantized.weight(name).float()
        left, right = best_correction(error, metric, rank)
        found |= {f"{name}.left": left.bfloat16().cpu(), f"{name}.right": right.bfloat16().cpu()}
    return found


def best_correction(error: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """((out_features, r), (r, in_features)) whose product is nearest to `error` under the damped `metric`."""
    root = metric.feedback * metric.costs.sqrt()  # upper triangular, and root root^T the damped matrix
    u, s, vh = largest_directions(error @ root, min(rank, *error.shape))
    size = s.sqrt()
    right = torch.linalg.solve_triangular(root, size[:, None] * vh, upper=True, left=False)
    return u * size, right


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
