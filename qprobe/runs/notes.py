"""What processes remark about a run: RUN/notes/, one JSON file per topic; no torch.

Nothing here decides a number. Each file is written whole or not at all, and by whoever knows its topic, so
that no process can lose what another one wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

from qprobe.errors import RunError
from qprobe.records import CodesFile
from qprobe.runs.access import read_file, write_file
from qprobe.runs.scored import Scored
from qprobe.system.decoding import decode, strict_json
from qprobe.system.wording import shortened

FOLDER = "notes"


@dataclass(frozen=True)
class Remarks:
    """Sentences a reader must see (skipped files, measures that do not apply, warnings)."""

    notes: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """The damage of one of the two ways that are compared for `TokensCount`; None where it is not finite."""

    damage: float | None

    @classmethod
    def of(cls, damage: float) -> Trial:
        return cls(damage if isfinite(damage) else None)

    @property
    def damage_or_nan(self) -> float:
        return nan if self.damage is None else self.damage


@dataclass(frozen=True)
class TokensCount:
    """Whether tokens are weighed while codes are chosen.

    plain, weighted: the damage on samples kept back with a few layers rounded without and with weights, in
    the unit of the model's damage (`qprobe.runs.key.DAMAGE`; nats per answer token where it answers); None
    where it is not finite, or where there were too few samples to decide.
    """

    is_weighted: bool
    plain: float | None
    weighted: float | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, plain: float, weighted: float, unit: str) -> TokensCount:
        """Weighted unless that costs more or, alone of the two, is non-finite. unit: of both, in words."""
        is_weighted = weighted <= plain or not isfinite(plain)
        known = {name: x if isfinite(x) else None for name, x in (("plain", plain), ("weighted", weighted))}
        how = "half by how much the answers depend on them" if is_weighted else "once each"
        told = (
            f"Tokens count {how} when codes are chosen: on calibration samples kept back, a few layers in "
            f"4-bit cost {weighted:.4g} {unit} with tokens weighed and {plain:.4g} where each counts once."
        )
        return cls(is_weighted, **known, notes=(told,))

    @classmethod
    def undecided(cls, samples: int, least: int) -> TokensCount:
        """Weighted, for want of samples to compare on: there are `samples`, and it takes `least`."""
        told = (
            "Tokens count half by how much the answers depend on them when codes are chosen. Whether that "
            f"pays on this model is not known: comparing takes {least} calibration samples, and there are "
            f"{samples}."
        )
        return cls(True, None, None, (told,))


@dataclass(frozen=True)
class CorrectionFile:
    """What 4-bit leaves of each weight (`qprobe.calibration.correction`), in the folder of the run.

    sha256: of its bytes, None where it was no better than nothing on samples kept back, and is not kept;
    codes: of the calibrated weights that it corrects; rank: of the factors, at most.
    """

    sha256: str | None
    codes: str
    rank: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ran:
    """unmeasured: names of linears that never ran on the samples, or are not stored as one tensor."""

    unmeasured: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """The end of a scan that finished.

    seconds: by stage. peak_bytes: of the fullest device. verdict: on the list that it chose, in a sentence.
    metric: the one that was asked for, of the answers with that list among others.
    """

    seconds: dict[str, float]
    peak_bytes: int | None
    notes: tuple[str, ...]
    verdict: str
    metric: Scored | None = None


TOPICS: Mapping[str, type[Any]] = {
    "start": Remarks,  # on samples and measures, when a scan begins
    "codes": CodesFile,  # which calibrated weights were measured
    "tokens-plain": Trial,  # for "tokens", by whichever process comes first
    "tokens-weighted": Trial,
    "tokens": TokensCount,  # when codes are chosen
    "calibration": Remarks,  # on how they were chosen
    "correction": CorrectionFile,  # of these weights
    "tuning": Remarks,  # on whether their scales were tuned
    "layers": Ran,
    "left-out": Remarks,  # what is not finite, and tokens of experts that cannot be compared
    "memory": Remarks,  # on batches that ran in parts
    "damaged": Remarks,  # on unit files that were set aside
    "end": Ended,
}
"""The files of the folder, without .json, in the order in which a reader is told."""


class Notes:
    """The notes of the run in `folder`; each file is read when its topic is first asked for, and once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, Any] = {}

    def get(self, topic: str) -> Any | None:
        """What is noted under `topic`, of the type that `TOPICS` names; None if nothing is.

        Raises RunError if the file is damaged or cannot be read.
        """
        if topic not in self._read:
            path = self._path(topic)
            data = read_file(path)
            try:
                noted = None if data is None else decode(TOPICS[topic], strict_json(data), topic)
            except ValueError as error:
                raise RunError(
                    f"{path} is damaged ({shortened(str(error), 100)}). Put a copy of it back, or scan again "
                    "with another --out."
                ) from None
            self._read[topic] = noted
        return self._read[topic]

    def reread(self) -> None:
        """Forget what was read: another process may have noted something since."""
        self._read.clear()

    def put(self, topic: str, value: Any) -> None:
        """Note `value` under `topic`, in the place of what stood there; RunError if the disk refuses."""
        assert isinstance(value, TOPICS[topic]), topic
        data = (json.dumps(asdict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
        write_file(self._path(topic), data)
        self._read[topic] = value

    def add(self, topic: str, sentences: Iterable[str]) -> None:
        """Note sentences under `topic`, after those that stand there, each once."""
        there = self.get(topic)
        before = there.notes if there else ()
        told = tuple(dict.fromkeys((*before, *sentences)))
        if told != before:
            self.put(topic, Remarks(told))

    @property
    def sentences(self) -> tuple[str, ...]:
        """All that a reader must see, each sentence once."""
        noted = (self.get(topic) for topic in TOPICS)
        return tuple(dict.fromkeys(said for one in noted for said in getattr(one, "notes", ())))

    def _path(self, topic: str) -> Path:
        return self.folder / FOLDER / f"{topic}.json"
