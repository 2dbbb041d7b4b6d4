"""Texts that the model draws itself, to which calibrated codes are fitted as well: kept in the run folder.

A part of them is one file, written whole as soon as it is there. What decides them is in the key of the run,
so that a resumed scan finds the same ones; processes that share a folder begin with different parts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qprobe.errors import RunError
from qprobe.inputs.drawing import Texts, draw_texts
from qprobe.measure.subject import Subject
from qprobe.runs.access import cannot_write
from qprobe.scanning.process import Process
from qprobe.system.decoding import decode, strict_json
from qprobe.system.files import make_folder, write_atomic, write_first
from qprobe.system.foreign import read_foreign_if_there

FOLDER = "drawn"
AT_ONCE = 128  # texts of a part: a step of a model takes hardly longer for them than for one
MAX_BYTES = 2**20  # of a part


def drawn_texts(subject: Subject, count: int, seed: int, process: Process) -> Texts:
    """`count` texts that the 16-bit model draws, see `qprobe.inputs.drawing`; those in the run folder first.

    Raises RunError if the disk refuses.
    """
    sizes = [min(AT_ONCE, count - first) for first in range(0, count, AT_ONCE)]
    words = subject.model.get_output_embeddings().weight.shape[0] if sizes else 0
    folder = process.run.path / FOLDER
    parts = [_Kept(folder / f"{i:05d}.json", size, words) for i, size in enumerate(sizes)]
    for done, i in enumerate(process.shard.rotated(range(len(parts))), start=1):
        if parts[i].texts() is None:
            parts[i].write(_drawn(subject, sizes[i], _seed_of(seed, i)))
        process.progress("draw texts", done, len(parts))
    return tuple(text for part in parts for text in part.texts() or _vanished(part.path))


def _seed_of(seed: int, part: int) -> int:
    """Of one part; parts of other seeds have other ones."""
    return (seed * 2**20 + part) % 2**63


def _drawn(subject: Subject, size: int, seed: int) -> Texts:
    """`size` texts, in parts where memory does not suffice for all at once."""

    def draw(numbers: Sequence[int]) -> Texts:
        return draw_texts(
            subject.model,
            subject.reference.processor,
            len(numbers),
            (seed + 2**40 * numbers[0]) % 2**63,
            subject.reference.device,
        )

    with subject.running("draw texts", size):
        parts = subject.halving.run("drawn texts", range(size), draw)
    return tuple(text for _, texts in parts for text in texts)


@dataclass(frozen=True)
class _Kept:
    """The file of a part: `count` texts of tokens whose ids are below `words`."""

    path: Path
    count: int
    words: int

    def texts(self) -> Texts | None:
        """The texts in it; None if there are none or they are damaged (drawn again)."""
        try:
            data = read_foreign_if_there(self.path, RunError, "", MAX_BYTES)
            found = None if data is None else decode(Texts, strict_json(data), "drawn")
        except (RunError, ValueError):
            return None
        return found if found is not None and self._holds(found) else None

    def _holds(self, texts: Texts) -> bool:
        are_words = all(0 <= x < self.words for text in texts for x in text)
        return len(texts) == self.count and len({len(text) for text in texts}) == 1 and are_words

    def write(self, texts: Texts) -> None:
        """Write `texts`. The first process to finish a part decides it: others may have read it already."""
        data = (json.dumps(texts, separators=(",", ":")) + "\n").encode()
        try:
            make_folder(self.path.parent)
            if not write_first(self.path, data) and self.texts() is None:
                write_atomic(self.path, data)
        except OSError as error:
            raise cannot_write(self.path, error) from error


def _vanished(path: Path) -> Texts:
    raise RunError(f"{path} is gone or damaged though it was just written. Run the same command again.")
