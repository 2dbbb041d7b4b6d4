"""Activation and propagated error of fused experts, for each sample and expert the tokens that it read.

The same sums as of a linear (`qprobe.measure.outputs`). A token of the second half of a doubled batch may be
routed elsewhere than in the first: the propagated error is over the (expert, token) pairs of both halves, and
the pairs of the first alone are counted as rerouted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qprobe.inputs.batch import KIND_NAMES, PAD, VISION
from qprobe.measure.experts.routing import Routed, Routing, matmul, times


@dataclass(frozen=True, eq=False)
class Half:
    """One half of the rows of a call: where they are among all, and what multiplies them."""

    where: Tensor
    product: Routed


def half(product: Routed, is_in: Tensor) -> Half:
    """The rows where `is_in`."""
    rows = product.routing
    where = is_in.nonzero()[:, 0]
    counts = rows.expert[where].bincount(minlength=len(rows.ends)).cumsum(0).tolist()
    part = Routing(rows.expert[where], rows.token[where], tuple(counts), rows.tokens)
    return Half(where, replace(product, routing=part))


@dataclass(frozen=True, eq=False)
class ExpertNorms:
    """Norms over the output features of one call, of each row of the first half: (rows,) float32 each.

    expert, token: of each row. tokens: of one sample. peak: max |D x|. gap: of the propagated error; None
    where it is not measured.
    """

    expert: Tensor
    token: Tensor
    tokens: int
    out_features: int
    y: Tensor
    noise: Tensor
    peak: Tensor
    gap: Gap | None


@dataclass(frozen=True, eq=False)
class Gap:
    """Propagated errors of the rows of the first half: (rows,) each.

    norms: float32, 0 where the second half has no such row. is_common: True where it has.
    """

    norms: Tensor
    is_common: Tensor


def run_both(
    product: Routed, x: Tensor, own: Tensor, weight_hat: Tensor, second: Tensor | None, samples: int
) -> tuple[Tensor, ExpertNorms]:
    """(outputs of all rows, norms): the first `samples` with the weight `own`, the others with `second`.

    second: None where the inputs hold the samples once. weight_hat: the 4-bit form of `own`.
    """
    rows = product.routing
    tokens = rows.tokens // (samples if second is None else 2 * samples)
    is_first = rows.token < samples * tokens
    first = half(product, is_first)
    y = times(first.product, x[first.where], own)
    outputs, gap = y, None
    if second is not None:
        other = half(product, ~is_first)
        y_other = times(other.product, x[other.where], second)
        outputs = y.new_empty(len(x), y.shape[1]).index_copy(0, first.where, y)
        outputs = outputs.index_copy(0, other.where, y_other)
        gap = _gap(first.product.routing, y, other.product.routing, y_other, samples * tokens)
    work = torch.float32 if x.device.type == "cpu" else x.dtype
    noise = matmul(first.product, x[first.where].to(work), weight_hat.to(work) - own.to(work))
    found = ExpertNorms(
        first.product.routing.expert,
        first.product.routing.token,
        tokens,
        product.out_features,
        _norm(y),
        _norm(noise),
        torch.linalg.vector_norm(noise, ord=float("inf"), dim=-1).float(),
        gap,
    )
    return outputs, found


def _gap(first: Routing, y: Tensor, other: Routing, y_other: Tensor, tokens: int) -> Gap:
    """What differs in the second half, for the rows of the first."""
    gap = Gap(torch.zeros(len(y), device=y.device), torch.zeros(len(y), dtype=torch.bool, device=y.device))
    key = first.expert * tokens + first.token  # in ascending order in both halves
    other_key = other.expert * tokens + other.token - tokens
    if not len(key) or not len(other_key):
        return gap
    place = torch.searchsorted(key, other_key).clamp(max=len(key) - 1)
    both = (key[place] == other_key).nonzero()[:, 0]
    gap.norms[place[both]] = _norm(y_other[both] - y[place[both]])
    gap.is_common[place[both]] = True
    return gap


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def expert_rows(name: str, call: ExpertNorms, samples: list[str], kinds: Tensor | None) -> pd.DataFrame:
    """One row for each sample and expert that read a token of it, columns of the unit stage "outputs".

    kinds: (samples, tokens) of the batch; None where vision tokens are read.
    """
    sample, place = call.token // call.tokens, call.token % call.tokens
    kind = torch.full_like(place, VISION) if kinds is None else kinds.to(place.device)[sample, place].long()
    experts = int(call.expert.max()) + 1 if len(call.expert) else 0
    is_there = kind != PAD
    sums = _Sums(sample * experts + call.expert, len(samples) * experts)
    columns: dict[str, Any] = {"tokens": sums.of(is_there)}
    columns |= _errors("activation", sums, is_there, call, call.noise)
    if call.gap is None:
        columns |= {f"propagated_{x}": sums.of(is_there) * float("nan") for x in (*_PARTS, "rerouted")}
    else:
        columns |= _errors("propagated", sums, is_there & call.gap.is_common, call, call.gap.norms)
        columns["propagated_rerouted"] = sums.of(is_there & ~call.gap.is_common)
    peak = torch.where(is_there & torch.isfinite(call.peak), call.peak, -1.0)
    top, row = sums.largest(peak)
    columns |= {"activation_peak": top.double(), "peak_token": place[row], "peak_kind": kind[row]}
    frame = pd.DataFrame({key: values.cpu().numpy() for key, values in columns.items()})
    cell = torch.arange(sums.cells)
    frame.insert(0, "expert", (cell % max(1, experts)).numpy())
    frame.insert(0, "layer", name)
    frame.insert(0, "sample", [samples[i] for i in (cell // max(1, experts)).tolist()])
    frame["activation_peak"] = frame["activation_peak"].where(frame["activation_peak"] >= 0)
    frame["peak_kind"] = frame["peak_kind"].map(KIND_NAMES)
    return frame.loc[frame["tokens"] > 0]


_PARTS = ("n", "signal", "noise", "nonfinite")


def _errors(
    prefix: str, sums: _Sums, is_there: Tensor, call: ExpertNorms, error: Tensor
) -> dict[str, Tensor]:
    counted = is_there & torch.isfinite(call.y) & torch.isfinite(error)
    return {
        f"{prefix}_n": sums.of(counted) * call.out_features,
        f"{prefix}_signal": sums.of(torch.where(counted, call.y, 0.0).double().square()),
        f"{prefix}_noise": sums.of(torch.where(counted, error, 0.0).double().square()),
        f"{prefix}_nonfinite": sums.of(is_there & ~counted) * call.out_features,
    }


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums of rows by cell: (sample, expert). cell: (rows,)."""

    cell: Tensor
    cells: int

    def of(self, values: Tensor) -> Tensor:
        """(cells,) in float64, or counts of what is True."""
        kind = torch.int64 if values.dtype == torch.bool else torch.float64
        empty = torch.zeros(self.cells, dtype=kind, device=values.device)
        return empty.index_add(0, self.cell, values.to(kind))

    def largest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(cells,) the largest value and the first row that has it; -1 and row 0 of a cell without rows."""
        empty = torch.full((self.cells,), -1.0, dtype=values.dtype, device=values.device)
        top = empty.scatter_reduce(0, self.cell, values, "amax")
        order = torch.arange(len(values), device=values.device)
        at = torch.where(values == top[self.cell], order, len(values))
        first = torch.full((self.cells,), len(values), device=values.device)
        return top, first.scatter_reduce(0, self.cell, at, "amin") % max(1, len(values))
