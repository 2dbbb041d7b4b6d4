"""Activation error and propagated error of every linear, from one forward pass of a doubled batch.

The batch runs twice side by side: its first half with the 16-bit weights, its second half with every
linear in 4-bit. At each linear
    activation error = D x on the first half's inputs (this layer alone),
    propagated error = second half's output - first half's output (everything before it in 4-bit too).
`halves_are_independent` checks that an architecture allows it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.roundtrips import RoundTrips
from qprobe.records import Linear
from qprobe.samples.inputs import KIND_NAMES, PAD, Batch

# One reduction of one linear: rows of a (len(SUMS), samples) float64 tensor.
SUMS = (
    "tokens",
    "activation_n",
    "activation_signal",
    "activation_noise",
    "activation_nonfinite",
    "propagated_n",
    "propagated_signal",
    "propagated_noise",
    "propagated_nonfinite",
)
COUNTS = ("tokens", "activation_n", "activation_nonfinite", "propagated_n", "propagated_nonfinite")


def run_model(model: Any, batch: Batch, **options: Any) -> Any:
    """The model's output on the batch, without a cache (a block that runs again would fill it twice)."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "use_cache" in parameters or (takes_any and model.can_generate()):
        options.setdefault("use_cache", False)
    return model(**batch.inputs, **options)


@dataclass
class OutputErrors:
    """Collects the reductions of one batch on the device; `rows` copies them off once.

    doubled: the inputs hold the samples twice (see the module's first lines).
    quantized: names of the linears that run in 4-bit in the second half (not the fixed ones).
    """

    batch: Batch
    layers: dict[str, Linear]
    round_trips: RoundTrips
    quantized: frozenset[str]
    doubled: bool
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    peaks: dict[str, list[Tensor]] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)

    def forward(self, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        """The linear's output; its error sums are noted on the way."""
        parts = split_by_sample(x, self.batch.size * (2 if self.doubled else 1))
        if parts is None:
            self.skipped.add(name)
            return F.linear(x, module.weight, module.bias)
        first = parts[: self.batch.size]
        y = F.linear(first, module.weight, module.bias)
        work = torch.float32 if x.device.type == "cpu" else x.dtype
        noise = F.linear(first.to(work), self.round_trips.difference(name, work))
        outputs = y
        if self.doubled:
            weight = self.round_trips.weight(name) if name in self.quantized else module.weight
            outputs = torch.cat([y, F.linear(parts[self.batch.size :], weight, module.bias)])
        self._note(name, y, noise, outputs[self.batch.size :] if self.doubled else None)
        return outputs.reshape(*x.shape[:-1], outputs.shape[-1])

    def _note(self, name: str, y: Tensor, noise: Tensor, y_hat: Tensor | None) -> None:
        """Reduce (B, R, out) tensors to sums for each sample; tokens with a non-finite value are left out."""
        mask = self._mask(name, y)
        out_features = y.shape[-1]
        signal = _energy(y)
        activation = _masked_sums(mask, signal, _energy(noise), out_features)
        if y_hat is None:
            propagated = torch.full_like(activation, float("nan"))
        else:
            propagated = _masked_sums(mask, signal, _energy(y_hat.float() - y.float()), out_features)
        tokens = mask.sum(dim=1, keepdim=True).double().T
        self.sums.setdefault(name, []).append(torch.cat([tokens, activation, propagated]))
        peak = noise.abs().amax(dim=-1).float().masked_fill(~mask, -1.0).nan_to_num(nan=-1.0, posinf=-1.0)
        top = peak.max(dim=1)
        self.peaks.setdefault(name, []).append(torch.stack([top.values.double(), top.indices.double()]))

    def _mask(self, name: str, y: Tensor) -> Tensor:
        """(B, R) True for tokens that count: all vision rows, and text rows that are no padding."""
        size, rows = y.shape[:2]
        if self._is_text(name, rows):
            return (self.batch.kinds != PAD).to(y.device, non_blocking=True)
        return torch.ones((size, rows), dtype=torch.bool, device=y.device)

    def _is_text(self, name: str, rows: int) -> bool:
        return self.layers[name].reads == "text" and rows == self.batch.kinds.shape[1]

    def rows(self) -> pd.DataFrame:
        """One row for each sample and linear that ran, columns of the unit stage "outputs"."""
        names = list(self.sums)
        if not names:
            return pd.DataFrame()
        sums = torch.stack([torch.stack(self.sums[n]).sum(dim=0) for n in names]).cpu()
        peaks = torch.stack([_largest(self.peaks[n]) for n in names]).cpu()
        rows = []
        for i, name in enumerate(names):
            for b, sample in enumerate(self.batch.samples):
                row = dict(zip(SUMS, sums[i, :, b].tolist(), strict=True))
                peak, token = peaks[i, :, b].tolist()
                kind = self._kind(name, b, int(token))
                rows.append({"sample": sample.id, "layer": name, **row, "activation_peak": peak,
                             "peak_token": int(token), "peak_kind": kind})  # fmt: skip
        frame = pd.DataFrame(rows)
        frame["activation_peak"] = frame["activation_peak"].where(frame["activation_peak"] >= 0)
        return frame.astype({name: "Int64" for name in COUNTS})

    def _kind(self, name: str, sample: int, token: int) -> str:
        kinds = self.batch.kinds[sample]
        is_text = self.layers[name].reads == "text" and token < len(kinds)
        return KIND_NAMES.get(int(kinds[token]), "text") if is_text else "vision"


def split_by_sample(x: Tensor, count: int) -> Tensor | None:
    """`x` (..., features) as (count, rows of a sample, features); None if it cannot be split evenly."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0 or rows.shape[0] % count:
        return None
    return rows.reshape(count, -1, x.shape[-1])


def _energy(x: Tensor) -> Tensor:
    """Sum of squares over the last dimension, (B, R) float64."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).double().square()


def _masked_sums(mask: Tensor, signal: Tensor, noise: Tensor, out_features: int) -> Tensor:
    """(4, B): pairs, signal, noise, and pairs left out because their token holds a non-finite value."""
    counted = mask & torch.isfinite(signal) & torch.isfinite(noise)
    zero = torch.zeros((), dtype=torch.float64, device=signal.device)
    return torch.stack(
        [
            counted.sum(dim=1).double() * out_features,
            torch.where(counted, signal, zero).sum(dim=1),
            torch.where(counted, noise, zero).sum(dim=1),
            (mask & ~counted).sum(dim=1).double() * out_features,
        ]
    )


def _largest(peaks: list[Tensor]) -> Tensor:
    """(2, B): value and token of the largest peak over the calls of one linear in a forward."""
    stacked = torch.stack(peaks)  # (calls, 2, B)
    call = stacked[:, 0].argmax(dim=0)
    return torch.stack(
        [stacked[call, i, torch.arange(stacked.shape[2], device=stacked.device)] for i in (0, 1)]
    )


def halves_are_independent(
    model: Any, batch: Batch, layers: dict[str, Linear], round_trips: RoundTrips, quantized: frozenset[str]
) -> bool:
    """True if the second half of a doubled batch leaves the first half's output alone.

    False means that samples of one batch see each other in this architecture, so that the propagated
    error cannot be measured side by side. The first half is compared with the batch run alone: what
    differs must be rounding (kernels may sum in another order; below eps / 4 in nmse over a whole model), or
    a hundred times smaller than what 4-bit does to the second half.
    """
    errors = OutputErrors(batch, layers, round_trips, quantized, doubled=True)
    with torch.inference_mode():
        alone = _first_output(run_model(model, batch)).float()
        with replaced_forwards(round_trips.modules, errors.forward):
            both = _first_output(run_model(model, batch.repeated(2))).float()
    mask = (batch.kinds != PAD).to(alone.device)[..., None]
    energy = (alone * mask).square().sum()
    leaked = ((both[: batch.size] - alone) * mask).square().sum() / energy
    caused = ((both[batch.size :] - alone) * mask).square().sum() / energy
    rounding = torch.finfo(model.dtype).eps / 4
    return bool(leaked <= max(rounding, 0.01 * float(caused))) and not bool(torch.isnan(leaked))


def _first_output(output: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a language head: (B, T, features)."""
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits
