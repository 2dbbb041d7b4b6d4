"""What calibration needs: a model, where its units lie, and what codes are fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from qprobe.calibration.damage import split_samples
from qprobe.formats.nf4 import Nf4, nf4
from qprobe.inputs.batch import Batch
from qprobe.measure.subject import Subject
from qprobe.options import Progress, no_progress
from qprobe.records import Sample
from qprobe.runs.folder import RunFolder
from qprobe.system.processes import Shard

ALONE = Shard()
Groups = Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class Work:
    """What calibration needs. samples: in batches, as they are measured.

    limit_bytes: for the Gram matrices held at once; None for `gram_room`. tune_steps: see `tuned`.
    """

    subject: Subject
    run: RunFolder
    samples: Sequence[tuple[Sample, ...]]
    limit_bytes: int | None = None
    tune_steps: int = 0
    progress: Progress = no_progress
    shard: Shard = ALONE

    @cached_property
    def split(self) -> tuple[list[tuple[Sample, ...]], list[tuple[Sample, ...]]]:
        """(for fitting, kept back): the samples, cut into batches again; see `split_samples`.

        Those kept back are fitted to as well once they have decided.
        """
        training, kept_back = split_samples([s for group in self.samples for s in group])
        if not kept_back:
            return list(self.samples), []
        size = max(map(len, self.samples))
        return self.subject.groups(tuple(training), size), self.subject.groups(tuple(kept_back), size)

    @property
    def groups(self) -> list[tuple[Sample, ...]]:
        """All samples: the batches for fitting, then those kept back."""
        training, kept_back = self.split
        return [*training, *kept_back]

    @property
    def batches(self) -> Iterator[Batch]:
        """The samples as the model reads them, on its device, one batch of `groups` at a time."""
        return (self.subject.encode(group) for group in self.groups)

    @property
    def widened(self) -> Iterator[Batch]:
        """The same in the dtype of the path: rounding of activations to 16-bit would enter the matrices."""
        return (batch.in_dtype(self.subject.path.dtype) for batch in self.batches)

    @property
    def format(self) -> Nf4:
        return nf4(self.run.key.format)
