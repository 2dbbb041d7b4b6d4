"""KL of any list on a fixed set of samples, in the dtype of the path, each list measured once."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

import pandas as pd
from torch import Tensor

from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import Path
from qprobe.measure.kl import ANSWERS
from qprobe.measure.runner import kl_rows
from qprobe.measure.subject import Subject
from qprobe.selection.decide import Candidate

NOTHING: frozenset[str] = frozenset()


def path_without(subject: Subject, kept: frozenset[str]) -> Path:
    """The path from the 16-bit model to the one in which all but `kept` is in 4-bit."""
    modules = {name: m for name, m in subject.quantized_modules.items() if name not in kept}
    return Path(subject.model, modules, subject.dequantized, subject.path.dtype)


class Measured:
    """Measured KL of lists of kept layers; open `walking(subject.path)` around it.

    The 16-bit model's answer logits are kept in memory, so a list costs one forward pass of the samples.
    """

    def __init__(self, subject: Subject, batches: Sequence[Batch]) -> None:
        self.subject = subject
        self.batches = [batch.in_dtype(subject.path.dtype) for batch in batches]
        self.references = [subject.path.logits(batch, 0.0) for batch in self.batches]
        self._frames: dict[frozenset[str], pd.DataFrame] = {}

    @property
    def samples(self) -> int:
        return sum(batch.size for batch in self.batches)

    def frame(self, kept: frozenset[str]) -> pd.DataFrame:
        """One row per sample, columns of the unit stage "kl", with `kept` in 16-bit and the rest in 4-bit."""
        if kept not in self._frames:
            path = path_without(self.subject, kept)
            self._frames[kept] = pd.concat(
                [self._rows(path, batch, p) for batch, p in zip(self.batches, self.references, strict=True)],
                ignore_index=True,
            )
        return self._frames[kept]

    def kl(self, kept: frozenset[str]) -> float:
        """Nats per answer token."""
        frame = self.frame(kept)
        return fsum(frame["kl_sum"]) / fsum(frame["answer_tokens"])

    def candidate(self, name: str, kept: frozenset[str]) -> Candidate:
        """The list with what was measured of it."""
        return Candidate(name, kept, self.subject.inventory.total_bytes(kept), self.frame(kept))

    @staticmethod
    def _rows(path: Path, batch: Batch, reference: list[Tensor]) -> pd.DataFrame:
        return kl_rows(batch, "", ANSWERS.sums(reference, path.logits(batch, 1.0)))
