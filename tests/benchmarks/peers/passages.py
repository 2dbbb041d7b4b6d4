"""The passages that every peer calibrates on and is judged on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def read_passages(path: Path) -> Passages:
    """What `Passages.write` wrote."""
    rows = {kind: [_sample(*row) for row in found] for kind, found in json.loads(path.read_text()).items()}
    return Passages(rows.pop("calibration"), rows)


def batches_of(subject: Subject, samples: Iterable[Sample]) -> list[Batch]:
    """Batches in float32, the dtype in which all is measured."""
    groups = subject.groups(tuple(samples), BATCH)
    return [subject.encode(group).in_dtype(subject.path.dtype) for group in groups]


def token_rows(batches: Iterable[Batch]) -> list[list[int]]:
    """The token ids of each passage, without padding."""
    rows: list[list[int]] = []
    for batch in batches:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        rows += [row[seen].tolist() for row, seen in zip(ids, mask, strict=True)]
    return rows


def _rows(samples: Iterable[Sample]) -> list[tuple[str, str, str]]:
    return [(x.id, x.prompt, x.answer or "") for x in samples]


def _sample(name: str, first: str, rest: str) -> Sample:
    return Sample(name, asked(first), answer=rest, ends=False)
