"""Codes that are moved for what the answers depend on: coordinate descent under two Gram matrices.

To second order an error E of a weight costs 1/2 E[(g^T E x)^2], x its inputs and g the gradients at its
outputs of the log-likelihood of answers that the model draws itself. Where the two are unrelated that is
1/2 tr(E G E^T H), with G = X^T X and H the Gram matrix of the gradients (Kronecker factors: Martens and
Grosse 2015; for rounding: Tseng, Sun, Park and De Sa 2025, "Model-Preserving Adaptive Rounding"). By G
columns of a weight make up for one another, by H rows do.

Rows of a weight move a few at once. Within these H is bounded by the diagonal of its absolute row sums
(Gershgorin), so that no step costs more than before. Matrices lie as in `qprobe.calibration.gptq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qprobe.calibration.columns.rounding import round_columns
from qprobe.calibration.gptq import Metrics, errors_of, scales_of, spans

GROUPS = 16  # of rows that move at once: fewer are bounded more loosely, more take as many steps again
MIX = 0.5  # share of the gradients' matrix, the rest is the identity: few gradients say little of correlation
MOST_OUTPUTS = 2048  # rows of a weight; beyond, H would take more memory than the codes of a large model


def mixed(outputs: Tensor, mix: float = MIX) -> Tensor | None:
    """`outputs` (rows, rows) with a mean diagonal of one, a share `mix` of it with the identity; float32.

    None where nothing reached it, or it is not finite.
    """
    mean = outputs.diagonal().double().mean()
    if not bool(torch.isfinite(outputs).all()) or not bool(mean > 0):
        return None
    found = outputs.float() * float(mix / mean)
    found.diagonal().add_(1 - mix)
    return found


@dataclass(frozen=True)
class Sides:
    """The matrices of weights that stand side by side.

    heights: rows of each. outputs: (rows, rows) of each, `mixed`; None for one whose codes stay.
    """

    heights: Sequence[int]
    outputs: Sequence[Tensor | None]

    def rows(self, first: int) -> list[Tensor]:
        """(rows,) of each weight, on the CPU: every `GROUPS`-th of its own from number `first` on."""
        return [
            torch.arange(height if own is not None else 0)[first::GROUPS]
            for height, own in zip(self.heights, self.outputs, strict=True)
        ]

    def pulls(self, errors: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """(n, all `rows`): what of E G counts for these rows, E H over the bound of their own part of H.

        errors: (n, rows of all).
        """
        found = []
        parts = errors.split(list(self.heights), dim=1)
        for part, matrix, some in zip(parts, self.outputs, rows, strict=True):
            if matrix is None or not len(some):
                found.append(part[:, :0])
                continue
            columns = matrix[:, some.to(matrix.device)]
            bound = columns[some.to(matrix.device)].abs().sum(dim=0)
            found.append((part @ columns).div_(bound))
        return torch.cat(found, dim=1)


def move_codes(weight: Tensor, scales: Tensor, codes: Tensor, metrics: Metrics, sides: Sides) -> None:
    """Change `codes` by one sweep over rows and columns; shapes as of `improve_codes` in `gptq`.

    Only rows of weights with a matrix of their own move.
    """
    errors = errors_of(weight, scales, codes)
    starts = [sum(sides.heights[:i]) for i in range(len(sides.heights))]
    owners = torch.arange(len(metrics.widths)).repeat_interleave(torch.tensor(metrics.widths))
    for first in range(GROUPS):
        own = sides.rows(first)
        rows = torch.cat([some + start for some, start in zip(own, starts, strict=True)])
        if not len(rows):
            break
        widths = owners[rows].bincount(minlength=len(metrics.widths)).tolist()
        pulls = sides.pulls(errors, own)
        rows = rows.to(weight.device)
        w, s, c, e = (x.index_select(1, rows) for x in (weight, scales, codes, errors))
        some = _Some(w, s, c, e, pulls)
        _move(some, Metrics(metrics.each, tuple(widths)))
        codes[:, rows], errors[:, rows] = some.codes, some.errors


@dataclass(frozen=True)
class _Some:
    """The rows that move, as of `move_codes`; pulls: see `Sides.pulls`. Changed in place."""

    weight: Tensor
    scales: Tensor
    codes: Tensor
    errors: Tensor
    pulls: Tensor


def _move(some: _Some, metrics: Metrics) -> None:
    """One sweep over the columns of `some`, as in `qprobe.calibration.gptq.improve_codes`."""
    for span in spans(some.weight):
        within = metrics.within(span)
        curvature = within.diagonal(dim1=1, dim2=2)
        read = some.weight[span] - some.errors[span]
        targets = torch.addcdiv(read, metrics.slopes(some.pulls, span), metrics.across(curvature.T))
        some.codes[span], changes = round_columns(
            targets,
            read,
            scales_of(some.scales, span, len(some.weight)),
            within / curvature[..., None],
            metrics.widths,
        )
        some.errors[span] += changes
        some.pulls[span] += changes


def moving_bytes(heights: Sequence[int], in_features: int) -> int:
    """What `move_codes` holds at most beside its arguments and the errors of all rows.

    heights: of the weights with a matrix of their own. It holds these, mixed, one more while it is made, and
    of the rows that move at once copies of all there is of them.
    """
    if not heights:
        return 0
    rows = sum(-(-height // GROUPS) for height in heights)
    sides = 4 * sum(height**2 for height in heights) + 5 * max(heights) ** 2
    return sides + (6 * 4 + 1) * rows * in_features
