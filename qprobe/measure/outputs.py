"""Activation error and propagated error of every linear, from one forward pass of a doubled batch.

The batch runs twice side by side: its first half with the 16-bit weights, its second half with every
linear in 4-bit. At each linear
    activation error = D x on the first half's inputs (this layer alone),
    propagated error = second half's output - first half's output (everything before it in 4-bit too).
`qprobe.measure.runner.halves_are_independent` checks that an architecture allows it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprobe.inputs.batch import KIND_NAMES, PAD, VISION, Batch
from qprobe.measure.dequantized import DequantizedWeights
from qprobe.measure.experts.outputs import ExpertNorms, expert_rows, run_both
from qprobe.measure.experts.routing import Product, has_samples_behind, samples_apart, times
from qprobe.records import Linear
from qprobe.registry.measures import OUTPUTS

COUNTS = (
    "tokens", "activation_n", "activation_nonfinite",
    "propagated_n", "propagated_nonfinite", "propagated_rerouted",
)  # fmt: skip


def run_model(model: Any, batch: Batch, **options: Any) -> Any:
    """The model's output on the batch, without a cache (a block that runs again would fill it twice)."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "use_cache" in parameters or (takes_any and model.can_generate()):
        options.setdefault("use_cache", False)
    # A processor may give more than the model takes, such as a text tower's inputs to a tower that is alone.
    inputs = {k: v for k, v in batch.inputs.items() if takes_any or k in parameters}
    return model(**inputs, **options)


def output_rows(model: Any, batch: Batch) -> list[Tensor]:
    """The output of a model without a language head by sample: (tokens that are no padding, features)."""
    hidden = run_model(model, batch)[0]
    if hidden.shape[:2] != batch.kinds.shape:
        return list(hidden)
    return [h[k != PAD] for h, k in zip(hidden, batch.kinds.to(hidden.device), strict=True)]


@dataclass
class Norms:
    """Norms over the output features of one call of one linear: (samples, rows of a sample) float32 each.

    y: of the reference output. noise: of D x. peak: max |D x|. gap: of the propagated error, if measured.
    """

    y: Tensor
    noise: Tensor
    peak: Tensor
    gap: Tensor | None


@dataclass
class OutputErrors:
    """Collects norms of one batch on the device, without waiting for it; `rows` reduces and copies them once.

    doubled: the inputs hold the samples twice (see the module's first lines).
    quantized: names of the linears that run in 4-bit in the second half (not the fixed ones).
    shared: names of layers known to read rows that belong to no sample, see `SharedRows`.
    ran: the layers in execution order. apart: those of them that read such rows.
    """

    batch: Batch
    layers: dict[str, Linear]
    dequantized: DequantizedWeights
    quantized: frozenset[str]
    doubled: bool
    shared: frozenset[str] = frozenset()
    norms: dict[str, list[Norms]] = field(default_factory=dict)
    experts: dict[str, list[ExpertNorms]] = field(default_factory=dict)
    ran: dict[str, None] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)

    def forward(self, name: str, product: Product, x: Tensor) -> Tensor:
        """The layer's output; the norms of its errors are noted on the way."""
        count = self.batch.size * (2 if self.doubled else 1)
        if self.layers[name].reads == "text" and has_samples_behind(product, x, count):
            return self._forward(name, product, x.transpose(0, 1), count).transpose(0, 1).contiguous()
        return self._forward(name, product, x, count)

    def _forward(self, name: str, product: Product, x: Tensor, count: int) -> Tensor:
        """`forward` of the rows of `count` samples, one sample after the other."""
        self.ran[name] = None
        if name in self.shared or not samples_apart(product, x, count):
            self.apart.add(name)
            return times(product, x, self.dequantized.own(name).to(x.dtype))
        own = self.dequantized.own(name).to(x.dtype)
        weight_hat = self.dequantized.weight(name).to(x.dtype)
        if isinstance(product, nn.Linear):
            return self._linear(name, product, x, own, weight_hat)
        second = (weight_hat if name in self.quantized else own) if self.doubled else None
        outputs, norms = run_both(product, x, own, weight_hat, second, self.batch.size)
        self.experts.setdefault(name, []).append(norms)
        return outputs

    def _linear(self, name: str, module: nn.Linear, x: Tensor, own: Tensor, weight_hat: Tensor) -> Tensor:
        half = self.batch.size
        parts = split_by_sample(x, half * (2 if self.doubled else 1))
        assert parts is not None, name
        outputs = x.new_empty((*parts.shape[:2], module.out_features))
        linear_into(outputs[:half], parts[:half], own, module.bias)
        if self.doubled:
            second = weight_hat if name in self.quantized else own
            linear_into(outputs[half:], parts[half:], second, module.bias)
        self._note(name, outputs, _noise(own, weight_hat, parts[:half]))
        return outputs.reshape(*x.shape[:-1], module.out_features)

    def _note(self, name: str, outputs: Tensor, noise: Tensor) -> None:
        y = outputs[: self.batch.size]
        gap = _norm(outputs[self.batch.size :] - y) if self.doubled else None
        peak = torch.linalg.vector_norm(noise, ord=float("inf"), dim=-1).float()
        self.norms.setdefault(name, []).append(Norms(_norm(y), _norm(noise), peak, gap))

    def rows(self) -> pd.DataFrame:
        """One row for each sample and layer that ran, columns of the unit stage "outputs", as layers ran.

        Of fused experts one row for each expert that read a token of the sample. Of a layer in `apart` a row
        of nulls.

        Tokens with a non-finite value are left out and their output features counted as non-finite.
        """
        for name in self.apart:  # also where it ran more than once, and was told apart in another call
            self.norms.pop(name, None)
            self.experts.pop(name, None)
        frames = [x for x in (self._linear_rows(), self._expert_rows()) if len(x)]
        if len(frames) == 1 and not self.apart:
            return frames[0]
        both = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*OUTPUTS.schema])
        keys = [(sample.id, name) for name in self.ran if name in self.apart for sample in self.batch.samples]
        count = len(both)
        both = both.reindex(range(count + len(keys)))
        both.loc[count:, "sample"] = [sample for sample, _ in keys]
        both.loc[count:, "layer"] = [name for _, name in keys]
        place = {name: i for i, name in enumerate(self.ran)}
        return both.iloc[both["layer"].map(place).argsort(kind="stable")]

    def _expert_rows(self) -> pd.DataFrame:
        """Rows of fused experts, one for each sample and expert."""
        samples, frames = [s.id for s in self.batch.samples], []
        for name, several in self.experts.items():
            for call in several:
                frames.append(expert_rows(name, call, samples, self._kinds(name, call.tokens)))
        if not frames:
            return pd.DataFrame()
        frame = pd.concat(frames, ignore_index=True)
        merged = frame if len(frames) == len(self.experts) else _merged_calls(frame)
        return merged.astype({name: "Int64" for name in (*COUNTS, "expert")})

    def _linear_rows(self) -> pd.DataFrame:
        calls = [(name, call) for name, several in self.norms.items() for call in several]
        if not calls:
            return pd.DataFrame()
        alike: dict[tuple, list[int]] = {}
        for i, (name, call) in enumerate(calls):
            key = (call.y.device, call.y.shape[1], self._kinds(name, call.y.shape[1]) is not None)
            alike.setdefault(key, []).append(i)
        columns: dict[str, np.ndarray] = {}
        for members in alike.values():
            for key, values in self._reduced([calls[i] for i in members]).items():
                found = values.expand(len(members), self.batch.size).cpu().numpy()
                columns.setdefault(key, np.empty((len(calls), self.batch.size), found.dtype))[members] = found
        frame = pd.DataFrame({key: values.reshape(-1) for key, values in columns.items()})
        frame.insert(0, "expert", 0)
        frame.insert(0, "layer", [name for name, _ in calls for _ in self.batch.samples])
        frame.insert(0, "sample", [s.id for s in self.batch.samples] * len(calls))
        frame["activation_peak"] = frame["activation_peak"].where(frame["activation_peak"] >= 0)
        frame["activation_peak"] = frame["activation_peak"].astype("float64")
        frame["peak_kind"] = frame["peak_kind"].map(KIND_NAMES)
        merged = frame if len(calls) == len(self.norms) else _merged_calls(frame)
        merged["expert"] = pd.NA
        return merged.astype({name: "Int64" for name in (*COUNTS, "expert")})

    def _reduced(self, calls: list[tuple[str, Norms]]) -> dict[str, Tensor]:
        """(calls, samples) of each column, on the device, for calls whose tokens are the same ones."""
        y, noise, peak = (
            torch.stack([getattr(call, k) for _, call in calls]) for k in ("y", "noise", "peak")
        )
        kinds = self._kinds(calls[0][0], y.shape[2])
        if kinds is not None:
            kinds = kinds.to(y.device)
        else:
            kinds = torch.full(y.shape[1:], VISION, dtype=torch.uint8, device=y.device)
        mask = kinds != PAD
        features = torch.tensor([[self.layers[name].out_features] for name, _ in calls], device=y.device)
        reduced = {"tokens": mask.sum(dim=1), **_sums("activation", mask, y, noise, features)}
        if self.doubled:
            gap = torch.stack([call.gap for _, call in calls if call.gap is not None])
            reduced |= _sums("propagated", mask, y, gap, features)
            reduced["propagated_rerouted"] = torch.zeros_like(reduced["propagated_n"])
        else:
            reduced |= {key: torch.full(y.shape[:2], float("nan")) for key in PROPAGATED}
        top = torch.where(mask & torch.isfinite(peak), peak, -1.0).max(dim=2)
        kind = kinds.expand(y.shape).gather(2, top.indices[..., None])[..., 0]
        return {**reduced, "activation_peak": top.values, "peak_token": top.indices, "peak_kind": kind}

    def _kinds(self, name: str, rows: int) -> Tensor | None:
        """The kinds of the tokens that layer `name` reads, where it reads one of the sequences of the batch;
        None where its `rows` are vision tokens beside it.
        """
        return self.batch.kinds_of(rows, self.layers[name].reads)


PROPAGATED = (
    "propagated_n", "propagated_signal", "propagated_noise", "propagated_nonfinite", "propagated_rerouted"
)  # fmt: skip


def _noise(own: Tensor, weight_hat: Tensor, x: Tensor) -> Tensor:
    """D x, (samples, rows, out_features); in float32 on the CPU, in the input's dtype elsewhere."""
    work = torch.float32 if x.device.type == "cpu" else x.dtype
    return F.linear(x.to(work), weight_hat.to(work) - own.to(work))


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write x W^T + b into `out` (samples, rows, out_features), a contiguous part of a larger tensor."""
    target, rows = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
    if bias is None:
        torch.mm(rows, weight.T, out=target)
    else:
        torch.addmm(bias, rows, weight.T, out=target)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, in float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def _sums(prefix: str, mask: Tensor, y: Tensor, error: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Pairs, signal, noise and left-out pairs of each call and sample, from (calls, samples, rows) norms."""
    counted = mask & torch.isfinite(y) & torch.isfinite(error)
    return {
        f"{prefix}_n": counted.sum(dim=2) * features,
        f"{prefix}_signal": torch.where(counted, y, 0.0).double().square().sum(dim=2),
        f"{prefix}_noise": torch.where(counted, error, 0.0).double().square().sum(dim=2),
        f"{prefix}_nonfinite": (mask & ~counted).sum(dim=2) * features,
    }


def _merged_calls(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each sample and layer, or expert of it, where one ran several times in a forward."""
    keys = ["layer", "sample", "expert"]
    largest = frame["activation_peak"].fillna(-1.0).groupby([frame[k] for k in keys], sort=False).idxmax()
    where = frame.loc[largest, [*keys, "activation_peak", "peak_token", "peak_kind"]]
    sums = [c for c in frame.columns if c not in where.columns]
    totals = frame.groupby(keys, sort=False)[sums].sum(min_count=1).reset_index()
    return totals.merge(where, on=keys, validate="one_to_one")[list(frame.columns)]


def split_by_sample(x: Tensor, count: int) -> Tensor | None:
    """`x` (..., features) as (count, rows of a sample, features); None if it cannot be split evenly."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0 or rows.shape[0] % count:
        return None
    return rows.reshape(count, -1, x.shape[-1])
