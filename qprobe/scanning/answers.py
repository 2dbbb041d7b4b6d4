"""Answers of the samples: the data's, or the model's own, generated once and kept in the run folder.

A batch of answers is one file, written whole as soon as it is there, so that a killed scan loses one batch at
most. Batches are cut before any is looked up, so that a resumed scan generates in the same company, and with
it the same answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qprobe.errors import RunError
from qprobe.inputs.answers import Batching, answer_group
from qprobe.measure.digests import reading_digest
from qprobe.measure.subject import Subject
from qprobe.records import Sample
from qprobe.runs.access import cannot_write
from qprobe.runs.folder import ANSWERS
from qprobe.scanning.process import Process
from qprobe.system.decoding import decode, strict_json
from qprobe.system.files import make_folder, write_atomic, write_first
from qprobe.system.foreign import read_foreign_if_there
from qprobe.system.versions import library_versions

MAX_ANSWERS_BYTES = 64 * 2**20  # of one batch


@dataclass(frozen=True)
class _Answer:
    """The answer to one sample, as its file holds it; `ends` as of `Sample`."""

    sample: str
    answer: str
    ends: bool


@dataclass(frozen=True)
class AnsweredBy:
    """Which form of the model answers. stage: of progress, and the kind of work.

    what: all that tells the form from the 16-bit model, as text. form: opens it; the model is as before once
    it is closed.
    """

    stage: str = "answers"
    what: str = ""
    form: Callable[[], AbstractContextManager[Any]] = nullcontext


REFERENCE = AnsweredBy()


def with_answers(
    subject: Subject, samples: tuple[Sample, ...], batching: Batching, process: Process
) -> tuple[Sample, ...]:
    """`samples`, in order; those without an answer get the reference's greedy one, see `own_answers`."""
    own = own_answers(subject, tuple(s for s in samples if s.answer is None), batching, process)
    return tuple(own.get(id(s), s) for s in samples)


def own_answers(
    subject: Subject,
    samples: tuple[Sample, ...],
    batching: Batching,
    process: Process,
    by: AnsweredBy = REFERENCE,
) -> dict[int, Sample]:
    """Each of `samples`, by its `id()`, with the model's greedy answer in place of its own.

    Generated answers are kept in RUN/answers/ under all that decides them, so that a resumed scan finds
    the same ones, and a changed model, processor, library or prompt none. Every process needs all of them:
    those that share a folder begin with different batches and take what others have finished.
    Raises RunError if the disk refuses.
    """
    if not samples:
        return {}
    made_by = _made_by(subject, samples, batching.max_new_tokens) + by.what
    groups = subject.groups(samples, batching.size)
    paths = [process.run.path / ANSWERS / f"{_key(made_by, group)}.json" for group in groups]
    for count, i in enumerate(process.shard.rotated(range(len(groups))), start=1):
        if _read(paths[i], groups[i]) is None:
            with subject.running(by.stage, len(groups[i])), by.form():
                own = answer_group(
                    subject.model,
                    subject.processed,
                    groups[i],
                    batching.max_new_tokens,
                    subject.halving,
                    subject.reference.device,
                )
            _write(paths[i], own, groups[i])
        process.progress(by.stage, count, len(groups))
    found: dict[int, Sample] = {}
    for path, group in zip(paths, groups, strict=True):
        answered = _read(path, group) or _vanished(path)
        found |= {id(asked): own for asked, own in zip(group, answered, strict=True)}
    return found


def _made_by(subject: Subject, samples: tuple[Sample, ...], max_new_tokens: int) -> str:
    """All that decides the answers of `samples` but their batches and the model's form, as text."""
    reading = reading_digest(subject.reference.processor, samples)
    device = subject.reference.device.type
    return json.dumps([subject.weights_digest, reading, device, library_versions(), max_new_tokens])


def _key(made_by: str, group: Sequence[Sample]) -> str:
    text = " ".join([made_by, *(s.digest for s in group)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write(path: Path, answered: Sequence[Sample], group: Sequence[Sample]) -> None:
    """The first process to finish a batch decides its answers: others may have measured with them already."""
    lines = [asdict(_Answer(s.id, s.answer or "", s.ends)) for s in answered]
    data = (json.dumps(lines, indent=1, ensure_ascii=False) + "\n").encode()
    try:
        make_folder(path.parent)
        if not write_first(path, data) and _read(path, group) is None:
            write_atomic(path, data)
    except OSError as error:
        raise cannot_write(path, error) from error


def _read(path: Path, group: Sequence[Sample]) -> list[Sample] | None:
    """`group` with the answers kept in `path`; None if there are none or they are damaged (made again)."""
    try:
        data = read_foreign_if_there(path, RunError, "", MAX_ANSWERS_BYTES)
        lines = None if data is None else decode(tuple[_Answer, ...], strict_json(data), "answers")
        if lines is None:
            return None
        return [replace(s, answer=x.answer, ends=x.ends) for s, x in zip(group, lines, strict=True)]
    except (RunError, ValueError):
        return None


def _vanished(path: Path) -> list[Sample]:
    raise RunError(f"{path} is gone or damaged though it was just written. Run the same command again.")
