"""The samples that every peer calibrates on and is judged on: passages of text, or scenes with a question."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qprobe.demo.scenes import CALIBRATION_SEED, HELD_OUT_SEED, scenes
from qprobe.inputs.batch import Batch
from qprobe.measure.subject import Subject
from qprobe.records import Sample, asked
from tests.benchmarks.models import other_texts, texts

BATCH = 8
OWN = "held out"


@dataclass(frozen=True)
class Passages:
    """judged: by kind; `OWN` is the kind that calibration sees, from other topics."""

    calibration: list[Sample]
    judged: dict[str, list[Sample]]

    def write(self, path: Path) -> None:
        """So that another machine, with other packages and another Python, takes the same ones."""
        rows = {kind: _rows(x) for kind, x in {"calibration": self.calibration, **self.judged}.items()}
        path.write_text(json.dumps(rows))


def choose_passages(tokenizer: Any, count: int, judged: int, others: int) -> Passages:
    """`count` passages to calibrate on, `judged` of other topics and `others` of each other kind."""
    calibration, own = texts(tokenizer, max(count, judged))
    kinds = other_texts(tokenizer, others) if others else {}
    return Passages(calibration[:count], {OWN: own[:judged], **kinds})


def choose_scenes(count: int, judged: int) -> Passages:
    """`count` scenes to calibrate on, and `judged` others."""
    return Passages(scenes(count, CALIBRATION_SEED), {OWN: scenes(judged, HELD_OUT_SEED)})


def read_passages(path: Path) -> Passages:
    """What `Passages.write` wrote."""
    rows = {kind: [_sample(*row) for row in found] for kind, found in json.loads(path.read_text()).items()}
    return Passages(rows.pop("calibration"), rows)


def batches_of(subject: Subject, samples: Iterable[Sample]) -> list[Batch]:
    """Batches in float32, the dtype in which all is measured."""
    groups = subject.groups(tuple(samples), BATCH)
    return [subject.encode(group).in_dtype(subject.path.dtype) for group in groups]


def inputs_of(subject: Subject, samples: Iterable[Sample]) -> list[dict[str, Tensor]]:
    """What the model is called with for each sample, as a batch of one without padding, on the CPU."""
    batches = (subject.encode((sample,)).in_dtype(subject.path.dtype) for sample in samples)
    return [{name: x.cpu() for name, x in batch.inputs.items()} for batch in batches]


def _rows(samples: Iterable[Sample]) -> list[tuple[str, str, str, list[str], bool]]:
    return [
        (x.id, x.prompt, x.answer or "", [b64encode(i).decode() for i in x.images], x.ends) for x in samples
    ]


def _sample(name: str, prompt: str, answer: str, images: list[str], ends: bool) -> Sample:
    return Sample(name, asked(prompt, *map(b64decode, images)), answer=answer, ends=ends)
