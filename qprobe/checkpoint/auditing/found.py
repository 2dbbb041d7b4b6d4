"""What an audit finds: every linear, every entry of the list, and what disagrees."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qprobe.checkpoint.adapters.effect import AdaptedLayer

State = Literal["4-bit", "16-bit", "plain in a 4-bit class", "packed in a 16-bit class", "missing", "tied"]
BROKEN: tuple[State, ...] = ("plain in a 4-bit class", "packed in a 16-bit class", "missing")


@dataclass(frozen=True)
class AuditedLayer:
    """One linear: its module name, what it really is, and in which file its weight lies."""

    name: str
    state: State
    file: str | None


@dataclass(frozen=True)
class ReadEntry:
    """One entry of the config's list: the linears it keeps, and those of them that its words do not name."""

    entry: str
    layers: tuple[str, ...]
    too_many: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    problems: one sentence per disagreement of config, files, manifest and loaded model; none if they agree.
    remarks: what is harmless as it stands. parameter_bytes, total_bytes: of the files, as everywhere here.
    loaded: True if the model was loaded as well. adapter: its layers, where one was asked about.
    """

    layers: tuple[AuditedLayer, ...]
    entries: tuple[ReadEntry, ...] | None
    parameter_bytes: int
    total_bytes: int
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    loaded: bool = False
    adapter: tuple[AdaptedLayer, ...] | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The object of `audit --json`."""
        states = Counter(x.state for x in self.layers)
        return {
            "ok": self.ok,
            "layers_4bit": states["4-bit"],
            "layers_16bit": states["16-bit"] + states["tied"],
            "parameter_bytes": self.parameter_bytes,
            "total_bytes": self.total_bytes,
            "problems": list(self.problems),
            "remarks": list(self.remarks),
            "entries": None if self.entries is None else [asdict(x) for x in self.entries],
            "layers": [asdict(x) for x in self.layers],
            "loaded": self.loaded,
            "adapter": None if self.adapter is None else [asdict(x) for x in self.adapter],
        }
