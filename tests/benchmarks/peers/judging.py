"""The KL of any weights to the 16-bit model, all in one harness and in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import fsum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from qprobe.inputs.batch import Batch
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.kl import ANSWERS
from qprobe.measure.outputs import run_model
from qprobe.measure.subject import Subject


@dataclass(frozen=True)
class Result:
    """One format. kl: by kind of passages, of each passage, summed over its answer tokens."""

    name: str
    bits: float
    total_bytes: int
    seconds: float
    peak_bytes: int
    note: str
    versions: dict[str, str]
    machine: str
    kl: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """The reference's answers to passages of several kinds; open `walking(subject.path)` around it."""

    def __init__(self, subject: Subject, kinds: Mapping[str, Sequence[Batch]]) -> None:
        self.subject, self.kinds = subject, kinds
        self.references = {kind: [self._logits(b) for b in batches] for kind, batches in kinds.items()}

    @property
    def tokens(self) -> dict[str, list[int]]:
        """Answer tokens of each passage."""
        return {
            kind: [end - start for batch in batches for start, end in batch.answers]
            for kind, batches in self.kinds.items()
        }

    def kl(self, weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """KL of each passage with `weights` in place: of linears by module name, of parameters by theirs."""
        modules = {name: m for name, m in self.subject.modules.items() if name in weights}

        def forward(name: str, module: nn.Linear, x: Tensor) -> Tensor:
            return F.linear(x, weights[name].to(x.device), module.bias)

        others = {name: value for name, value in weights.items() if name not in modules}
        with replaced_forwards(modules, forward), _replaced_parameters(self.subject.model, others):
            return {
                kind: [
                    value
                    for batch, wanted in zip(batches, self.references[kind], strict=True)
                    for value in ANSWERS.damage(wanted, self._logits(batch)).tolist()
                ]
                for kind, batches in self.kinds.items()
            }

    def _logits(self, batch: Batch) -> list[Tensor]:
        with torch.no_grad():
            logits = run_model(self.subject.model, batch).logits
        return [logits[i, start - 1 : end - 1] for i, (start, end) in enumerate(batch.answers)]


@contextmanager
def _replaced_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(before[name])
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value


def judged(judge: Judge, folder: Path, machine: str, device: str) -> Result:
    """What a peer handed back in `folder`, measured."""
    made = json.loads((folder / "made.json").read_text())
    sizes = {n: x.in_features * x.out_features for n, x in judge.subject.layers.items()}
    names = judge.subject.quantized
    assert made["bits"].keys() == names, sorted(names ^ made["bits"].keys())
    stored = fsum(made["bits"][n] * sizes[n] for n in names)
    plain = sum(judge.subject.layers[n].bytes_4bit for n in names)
    return Result(
        name=folder.name,
        bits=stored / sum(sizes[n] for n in names),
        total_bytes=judge.subject.inventory.standard_4bit_bytes - plain + round(stored / 8),
        seconds=made["seconds"],
        peak_bytes=made["peak_bytes"],
        note=made["note"],
        versions=made["versions"],
        machine=machine,
        kl=judge.kl(load_file(folder / "weights.safetensors", device=device)),
    )
