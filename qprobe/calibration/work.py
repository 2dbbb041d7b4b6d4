"""What calibration needs: a model, where its units lie, and what codes are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from qprobe.calibration.damage import split_samples
from qprobe.formats.nf4 import Nf4, nf4
from qprobe.inputs.batch import PAD, Batch
from qprobe.inputs.drawing import Texts, text_batches
from qprobe.measure.subject import Subject
from qprobe.options import Progress, no_progress
from qprobe.records import Sample
from qprobe.runs.folder import RunFolder
from qprobe.system.processes import Shard

ALONE = Shard()
TEXTS_EACH, MOST_TEXTS = 4, 16  # drawn texts run beside one another for a sample of a batch, and at most
Groups = Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class Work:
    """What calibration needs. samples: in batches, as they are measured.

    limit_bytes: for the Gram matrices held at once; None for `gram_room`. tune_steps: see `tuned`. draw:
    gives texts that the model drew itself, to which codes are fitted as well.
    """

    subject: Subject
    run: RunFolder
    samples: Sequence[tuple[Sample, ...]]
    limit_bytes: int | None = None
    tune_steps: int = 0
    progress: Progress = no_progress
    shard: Shard = ALONE
    draw: Callable[[], Texts] = tuple

    @cached_property
    def drawn(self) -> list[Batch]:
        """The drawn texts in batches, on the CPU.

        All of them together count as much as the samples, but no token of them more than one of a sample.
        """
        texts = self.draw()
        if not texts:
            return []
        given = (self.subject.processed.batch(group).kinds for group in self.samples)
        weight = sum(int((kinds != PAD).sum()) for kinds in given) / sum(map(len, texts))
        size = min(MOST_TEXTS, TEXTS_EACH * max(map(len, self.samples)))
        return text_batches(self.subject.reference.processor, texts, size, min(1.0, weight))

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
    def batches(self) -> Iterator[Batch]:
        """What codes are fitted to as the model reads it, on its device, one batch at a time.

        First the samples for fitting, then the drawn texts, then the samples kept back.
        """
        training, kept_back = self.split
        yield from map(self.subject.encode, training)
        yield from (batch.to(self.subject.reference.device) for batch in self.drawn)
        yield from map(self.subject.encode, kept_back)

    @property
    def fitting(self) -> int:
        """How many of `batches` are fitted to before the others have decided: the first ones."""
        return len(self.split[0]) + len(self.drawn)

    @property
    def count(self) -> int:
        """How many `batches` there are."""
        return self.fitting + len(self.split[1])

    @property
    def widened(self) -> Iterator[Batch]:
        """The same in the dtype of the path: rounding of activations to 16-bit would enter the matrices."""
        return (batch.in_dtype(self.subject.path.dtype) for batch in self.batches)

    @property
    def format(self) -> Nf4:
        return nf4(self.run.key.format)
