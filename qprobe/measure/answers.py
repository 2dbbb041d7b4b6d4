"""Answers of the samples: the data's, or the reference's own, generated once and kept in the run folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from qprobe.manifest import write_atomic
from qprobe.measure.identity import weights_digest
from qprobe.measure.subject import Subject
from qprobe.options import Progress
from qprobe.records import Sample
from qprobe.samples.answers import answered

FILE = "answers.json"


def with_answers(
    subject: Subject,
    samples: tuple[Sample, ...],
    max_new_tokens: int,
    batch_size: int,
    folder: Path,
    progress: Progress,
) -> tuple[Sample, ...]:
    """`samples`, in order; those without an answer get the reference's greedy one.

    Generated answers are kept in FOLDER/answers.json under the model, the prompt, the image and the
    length limit, so that a resumed scan finds the same ones.
    """
    silent = [s for s in samples if s.answer is None]
    if not silent:
        return samples
    weights = weights_digest(subject.model)
    keys = {
        s.id: hashlib.sha256(f"{weights} {max_new_tokens} {s.digest}".encode()).hexdigest() for s in silent
    }
    known = _read(folder / FILE)
    fresh = [s for s in silent if keys[s.id] not in known]
    if fresh:
        model, processor = subject.model, subject.reference.processor
        for sample in answered(model, processor, fresh, max_new_tokens, batch_size, progress):
            known[keys[sample.id]] = {"sample": sample.id, "answer": sample.answer, "ends": sample.ends}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / FILE, json.dumps(known, indent=1, ensure_ascii=False).encode())
    return tuple(
        s
        if s.answer is not None
        else replace(s, answer=known[keys[s.id]]["answer"], ends=known[keys[s.id]]["ends"])
        for s in samples
    )


def _read(path: Path) -> dict[str, dict]:
    """What an earlier run kept; nothing if there is no such file or it is damaged (it is made again)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
