"""Error-compensated rounding of weights onto the NF4 grid: pure functions of tensors.

The error that counts is tr(E G E^T), with E = W - W-hat and G = X^T X the Gram matrix of a layer's inputs:
the summed squared error of its outputs. GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization
for Generative Pre-trained Transformers") rounds column after column and lets the columns that are still to
come make up for the error so far. Here it has the form that Chee et al. 2023 ("QuIP") prove equal to it: with
G = U diag(d) U^T, U upper triangular with ones on its diagonal, column j is rounded at
    w_j + sum over i < j of U_ij e_i,
and the error is sum_j d_j |t_j - w-hat_j|^2 over those targets t. It needs one Cholesky factor and no
inverse.

What that leaves is lowered by coordinate descent: column j is rounded again where the error is least given
all other columns, at w-hat_j + (E G)_j / G_jj. GPTQ cannot go back to a column; this can, and never harms.

Matrices lie with the columns of the weight first, (in_features, rows), so that a column is contiguous. Layers
with as many inputs stand side by side as more rows, each with the metric of its inputs: small steps are taken
for all of them at once, and matrix products one metric at a time, so that none changes a number of another.
Scales are (k, rows), each for in_features / k columns in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from qprobe.calibration.columns.grid import nf4_grid
from qprobe.calibration.columns.rounding import (
    best_scales,
    inverse,
    round_columns,
    searched_scales,
    spread,
)

DAMPING = 0.01  # of the mean diagonal of G, as Frantar et al. choose
MOST_DAMPING = 1.0  # beyond it G says nothing any more
WIDTH = 128  # columns whose errors reach all later columns in one matrix product
BLOCKS = 2**10  # whose scales are searched at once, where blocks straddle rows: it bounds the memory


@dataclass(frozen=True)
class Metric:
    """What an error of each weight costs, in_features = n.

    gram: (n, n) G as given. feedback: (n, n) U and costs: (n,) d, of the damped G; see the module's first
    lines.
    damping: the share of the mean diagonal of G that was added to its diagonal; ridge: the same as a number.
    """

    gram: Tensor
    feedback: Tensor
    costs: Tensor
    damping: float
    ridge: Tensor

    def within(self, span: slice) -> Tensor:
        """The part of the damped G between the columns `span`."""
        return self.gram[span, span] + self.ridge * torch.eye(span.stop - span.start, device=self.gram.device)


@dataclass(frozen=True)
class Metrics:
    """The metrics of layers that stand side by side; `widths` rows belong to each."""

    each: tuple[Metric, ...]
    widths: tuple[int, ...]

    def slopes(self, errors: Tensor, span: slice) -> Tensor:
        """The columns `span` of E G, damped, for `errors` (n, rows): half the slope of the error."""
        found = torch.empty_like(errors[span])
        for metric, part, out in self._parts(errors, found):
            torch.mm(metric.gram[span], part, out=out)
        ridges = self.across(torch.stack([m.ridge for m in self.each])[None])
        return found.add_(errors[span] * ridges)

    def targets(self, weight: Tensor, errors: Tensor, span: slice) -> Tensor:
        """The columns `span` of the weight and what the errors of all columns before it add to them."""
        found = torch.empty_like(weight[span])
        for metric, own, part, out in self._parts(weight[span], errors[: span.start], found):
            torch.addmm(own, metric.feedback[: span.start, span].T, part, out=out)
        return found

    def products(self, matrices: Tensor, right: Tensor) -> Tensor:
        """(m, rows): `matrices` (layers, m, k), each times its rows of `right` (k, rows)."""
        found = right.new_empty(matrices.shape[1], right.shape[1])
        for matrix, part, out in zip(matrices, self.split(right), self.split(found), strict=True):
            torch.mm(matrix, part, out=out)
        return found

    def within(self, span: slice) -> Tensor:
        """(layers, columns, columns): see `Metric.within`."""
        return self._stacked(lambda metric: metric.within(span))

    def coupling(self, span: slice) -> Tensor:
        """(layers, columns, columns): what errors of columns add to the targets of later ones, by GPTQ."""
        return self._stacked(lambda metric: metric.feedback[span, span].T)

    def costs(self, span: slice) -> Tensor:
        """(layers, columns): the costs of the columns `span`."""
        return self._stacked(lambda metric: metric.costs[span])

    def across(self, values: Tensor) -> Tensor:
        """`values` (m, layers) for each row: (m, rows), or (m, 1) where all rows are of one layer."""
        return values if len(self.each) == 1 else values.index_select(1, self._layers)

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The rows of each metric, of `matrix` (m, rows)."""
        return matrix.split(list(self.widths), dim=1)

    @cached_property
    def _layers(self) -> Tensor:
        counts = torch.tensor(self.widths)
        return torch.arange(len(self.widths)).repeat_interleave(counts).to(self.each[0].gram.device)

    def _stacked(self, part: Callable[[Metric], Tensor]) -> Tensor:
        found = [part(metric) for metric in self.each]
        return found[0][None] if len(found) == 1 else torch.stack(found)

    def _parts(self, *matrices: Tensor) -> zip[tuple]:
        return zip(self.each, *(self.split(x) for x in matrices), strict=True)


def metric_of(gram: Tensor, damping: float = DAMPING) -> Metric | None:
    """The metric of `gram` (n, n) float32, damped by `damping` or, where that is not enough, tenfold and so
    on.

    None if `gram` is not finite, zero, or not positive definite at `MOST_DAMPING` either.
    """
    mean = gram.diagonal().mean()
    if not is_finite(gram) or not bool(mean > 0):
        return None
    while damping <= MOST_DAMPING:
        reversed_gram = gram.flip(0, 1)  # a copy: reversing rows and columns turns lower factors into upper
        reversed_gram.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(reversed_gram)
        del reversed_gram  # up to 0.8 GB
        if not bool(failed) and is_finite(factor):
            upper = factor.flip(0, 1)
            del factor
            pivots = upper.diagonal().clone()
            return Metric(gram, upper.div_(pivots), pivots.square(), damping, damping * mean)
        damping *= 10
    return None


def is_finite(matrix: Tensor) -> bool:
    """True if no element is infinite or NaN; makes no copy, unlike torch.isfinite."""
    least, most = matrix.aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(most))


def shrunk(gram: Tensor, tokens: float) -> Tensor:
    """`gram` (n, n) of that many tokens as an estimate of what fresh tokens give: off-diagonal less; float32.

    (1 - rho) G + rho diag(G) with rho = n / (n + tokens), after Ledoit and Wolf 2004, "A well-conditioned
    estimator for large-dimensional covariance matrices", with the diagonal kept, as outlier features must
    be. Correlations of n features from few tokens are mostly chance, and codes fitted to them are worse than
    rounding to nearest on other tokens. Ledoit and Wolf estimate rho from the data; that takes tokens to be
    independent of one another, which those of one text are not, and rho then comes out too small.
    """
    rho = len(gram) / (len(gram) + tokens)
    less = gram.to(torch.float32, copy=True).mul_(1 - rho)
    less.diagonal().copy_(gram.diagonal())
    return less


def output_error(errors: Tensor, gram: Tensor) -> Tensor:
    """(rows,) the diagonal of E G E^T, for `errors` (n, rows)."""
    return ((gram @ errors) * errors).sum(dim=0)


def scales_at_turn(weight: Tensor, metrics: Metrics, blocksize: int) -> tuple[Tensor, Tensor]:
    """((n / blocksize, rows) scales, (n, rows) codes) by GPTQ, scales searched at their blocks' turns.

    weight: (n, rows); n must be a multiple of `blocksize`, so that blocks keep to their rows. The search sees
    the targets, with the errors so far, and not the weights.
    """
    n, rows = weight.shape
    assert n % blocksize == 0
    errors = torch.zeros_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    found = weight.new_empty(n // blocksize, rows)
    for block, start in enumerate(range(0, n, blocksize)):
        span = slice(start, start + blocksize)
        targets = metrics.targets(weight, errors, span)
        found[block] = best_scales(targets, metrics.costs(span), metrics.widths)
        codes[span], errors[span] = _rounded(weight[span], found[block, None], targets, metrics, span)
    return found, codes


def scales_of_blocks(weight: Tensor, metric: Metric, blocksize: int) -> Tensor:
    """(blocks,) scales searched on the weights themselves, for blocks that straddle rows.

    weight: (n, rows) of one layer; blocks are cut from the flattened (rows, n) weight, the last one may be
    short.
    """
    n = len(weight)
    flat = weight.T.reshape(-1)
    found = []
    for part in flat.split(BLOCKS * blocksize):
        missing = -len(part) % blocksize
        start = len(found) * BLOCKS * blocksize
        columns = torch.arange(start, start + len(part), device=part.device) % n
        both = (
            F.pad(x, (0, missing)).view(-1, blocksize).T.contiguous() for x in (part, metric.costs[columns])
        )
        found.append(searched_scales(*both))
    return torch.cat(found)


def choose_codes(weight: Tensor, scales: Tensor, metrics: Metrics) -> Tensor:
    """(n, rows) uint8 NF4 codes of `weight` (n, rows) by GPTQ, given `scales` (k, rows)."""
    errors = torch.zeros_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for span in spans(weight):
        targets = metrics.targets(weight, errors, span)
        own = scales_of(scales, span, len(weight))
        codes[span], errors[span] = _rounded(weight[span], own, targets, metrics, span)
    return codes


def improve_codes(weight: Tensor, scales: Tensor, codes: Tensor, metrics: Metrics) -> None:
    """Change `codes` by one sweep of coordinate descent over the columns; shapes as of `choose_codes`."""
    errors = errors_of(weight, scales, codes)
    for span in spans(weight):
        within = metrics.within(span)
        curvature = within.diagonal(dim1=1, dim2=2)
        read = weight[span] - errors[span]  # the weights as they read now
        targets = torch.addcdiv(read, metrics.slopes(errors, span), metrics.across(curvature.T))
        # What a column changes adds to the targets of the columns after it, by the slope that it takes off.
        codes[span], changes = round_columns(
            targets,
            read,
            scales_of(scales, span, len(weight)),
            within / curvature[..., None],
            metrics.widths,
        )
        errors[span] += changes


def fitted_scales(weight: Tensor, scales: Tensor, codes: Tensor, metrics: Metrics, blocksize: int) -> Tensor:
    """(n / blocksize, rows) the scale of each block for which `codes` err least, block after block.

    weight, codes: (n, rows); n must be a multiple of `blocksize`; scales: as what is returned. Least squares,
    given all other blocks.
    """
    n = len(weight)
    assert n % blocksize == 0
    grid = nf4_grid(weight.device)
    errors = errors_of(weight, scales, codes)
    found = scales.clone()
    for block, start in enumerate(range(0, n, blocksize)):
        span = slice(start, start + blocksize)
        values = grid.read(codes[span].int())
        energy = (values * metrics.products(metrics.within(span), values)).sum(dim=0)
        change = (values * metrics.slopes(errors, span)).sum(dim=0) * inverse(energy)
        found[block] += change
        errors[span] -= values * change
    return found


def spans(weight: Tensor) -> list[slice]:
    n = len(weight)
    return [slice(start, min(start + WIDTH, n)) for start in range(0, n, WIDTH)]


def scales_of(scales: Tensor, span: slice, columns: int) -> Tensor:
    """Those of `scales`, which serve `columns` columns, that serve the columns `span`."""
    each = columns // len(scales)
    return scales[span.start // each : -(-span.stop // each)]


def errors_of(weight: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """`weight` less what `codes` and `scales` read as; a few columns at a time, which saves memory."""
    grid = nf4_grid(weight.device)
    errors = torch.empty_like(weight)
    for span in spans(weight):
        own = spread(scales_of(scales, span, len(weight)), span.stop - span.start)
        torch.addcmul(weight[span], grid.read(codes[span].int()), own, value=-1, out=errors[span])
    return errors


def _rounded(
    own: Tensor, scales: Tensor, targets: Tensor, metrics: Metrics, span: slice
) -> tuple[Tensor, Tensor]:
    """(codes, errors) of the columns `span` of a weight, rounded one by one; `targets` is used up."""
    return round_columns(targets, own, scales, metrics.coupling(span), metrics.widths)
