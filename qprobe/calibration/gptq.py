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

Matrices lie with the columns of the weight first, (in_features, rows), so that a column is contiguous, and
layers that read the same inputs stand side by side as more rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qprobe.calibration.columns import inverse, nf4_grid, round_columns

DAMPING = 0.01  # of the mean diagonal of G, as Frantar et al. choose
MOST_DAMPING = 1.0  # beyond it G says nothing any more
WIDTH = 128  # columns whose errors reach all later columns in one matrix product
BLOCKS = 2**10  # whose scales are searched at once, where blocks straddle rows: it bounds the memory
# Shares of a block's largest value that are tried as its scale. Above 1 the grid's own steps are coarser but
# its outer ones fit better; below 0.6 the largest weights are cut off too much to win (measured on SmolLM2).
RATIOS = tuple(0.6 + 0.1 * i for i in range(7))


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

    def slopes(self, errors: Tensor, span: slice) -> Tensor:
        """The columns `span` of E G, damped, for `errors` (n, rows): half the slope of the error."""
        return (self.gram[span] @ errors).add_(errors[span] * self.ridge)

    def within(self, span: slice) -> Tensor:
        """The part of the damped G between the columns `span`."""
        return self.gram[span, span] + self.ridge * torch.eye(span.stop - span.start, device=self.gram.device)


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


def shrunk(gram: Tensor, tokens: int) -> Tensor:
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


def best_scales(values: Tensor, costs: Tensor) -> Tensor:
    """(blocks,) scales under which `values` (blocksize, blocks) round best to NF4.

    costs: (blocksize, blocks) or (blocksize, 1), of a squared error. For each candidate of `RATIOS` the
    values are rounded to nearest, and the scale is the one that fits these codes best (least squares); of the
    candidates the one with the least error wins.
    """
    grid = nf4_grid(values.device)
    largest = values.abs().amax(dim=0)
    weighted = values * costs
    best, chosen = torch.zeros_like(largest), largest.clone()
    for ratio in RATIOS:
        rounded = grid.read(grid.nearest(values * inverse(largest * ratio)))
        along = (rounded * weighted).sum(dim=0)
        energy = rounded.mul_(rounded).mul_(costs).sum(dim=0)
        # The error is sum(costs values^2) - along^2 / energy at the best scale, along / energy.
        gain = along.square() * inverse(energy)
        is_better = (gain > best) & (along > 0)
        best = torch.where(is_better, gain, best)
        chosen = torch.where(is_better, along * inverse(energy), chosen)
    return chosen


def scales_at_turn(weight: Tensor, metric: Metric, blocksize: int) -> tuple[Tensor, Tensor]:
    """((rows, n / blocksize) scales, (n, rows) codes) by GPTQ, scales searched at their blocks' turns.

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
        targets = _targets(weight, errors, metric, span)
        found[block] = best_scales(targets, metric.costs[span, None])
        scales = found[block].expand(blocksize, rows)
        codes[span], errors[span] = _rounded(weight[span], scales, targets, metric, span)
    return found.T, codes


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
        found.append(best_scales(*both))
    return torch.cat(found)


def choose_codes(weight: Tensor, scales: Tensor, metric: Metric) -> Tensor:
    """(n, rows) uint8 NF4 codes of `weight` (n, rows) by GPTQ, given the scale of each weight, same shape."""
    errors = torch.zeros_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(weight), WIDTH):
        span = slice(start, min(start + WIDTH, len(weight)))
        targets = _targets(weight, errors, metric, span)
        codes[span], errors[span] = _rounded(weight[span], scales[span], targets, metric, span)
    return codes


def improved_codes(weight: Tensor, scales: Tensor, codes: Tensor, metric: Metric) -> Tensor:
    """`codes` after one sweep of coordinate descent over the columns; shapes as of `choose_codes`."""
    errors = _errors(weight, scales, codes)
    better = torch.empty_like(codes)
    for start in range(0, len(weight), WIDTH):
        span = slice(start, min(start + WIDTH, len(weight)))
        within = metric.within(span)
        curvature = within.diagonal()[:, None]
        read = weight[span] - errors[span]  # the weights as they read now
        targets = torch.addcdiv(read, metric.slopes(errors, span), curvature)
        # What a column changes adds to the targets of the columns after it, by the slope that it takes off.
        better[span], changes = round_columns(targets, read, scales[span], within / curvature)
        errors[span] += changes
    return better


def fitted_scales(weight: Tensor, scales: Tensor, codes: Tensor, metric: Metric, blocksize: int) -> Tensor:
    """(rows, n / blocksize) the scale of each block for which `codes` err least, block after block.

    weight, scales, codes: (n, rows); n must be a multiple of `blocksize`. Least squares, given all other
    blocks.
    """
    n = len(weight)
    assert n % blocksize == 0
    grid = nf4_grid(weight.device)
    errors = _errors(weight, scales, codes)
    found = scales[::blocksize].clone()
    for block, start in enumerate(range(0, n, blocksize)):
        span = slice(start, start + blocksize)
        values = grid.read(codes[span].int())
        energy = (values * (metric.within(span) @ values)).sum(dim=0)
        change = (values * metric.slopes(errors, span)).sum(dim=0) * inverse(energy)
        found[block] += change
        errors[span] -= values * change
    return found.T


def _errors(weight: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """`weight` less what `codes` and `scales` read as; a few columns at a time, which saves memory."""
    grid = nf4_grid(weight.device)
    errors = torch.empty_like(weight)
    for start in range(0, len(weight), WIDTH):
        span = slice(start, start + WIDTH)
        torch.addcmul(weight[span], grid.read(codes[span].int()), scales[span], value=-1, out=errors[span])
    return errors


def _targets(weight: Tensor, errors: Tensor, metric: Metric, span: slice) -> Tensor:
    """The columns `span` of the weight and what the errors of all columns before it add to them."""
    before = metric.feedback[: span.start, span]
    return torch.addmm(weight[span], before.T, errors[: span.start])


def _rounded(
    own: Tensor, scales: Tensor, targets: Tensor, metric: Metric, span: slice
) -> tuple[Tensor, Tensor]:
    """(codes, errors) of the columns `span` of a weight, rounded one by one; `targets` is used up."""
    return round_columns(targets, own, scales, metric.feedback[span, span].T)
