"""The key of a run, RUN/scan.json: everything that decides a number, and nothing else; no torch.

It is written once, when a scan begins, and never changes. What processes remark on the way stands in
RUN/notes/ (`qprobe.runs.notes`). Two runs with equal keys may share a folder and its units.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qprobe.errors import RunError
from qprobe.records import FormatSpec, Inventory, ModelIdentity, Sample
from qprobe.registry import measures as declared
from qprobe.system.decoding import check_names, check_visible, decode, strict_json
from qprobe.system.versions import library_versions
from qprobe.system.wording import shortened

FILE = "scan.json"
VERSION = 1
"""The format of a run folder. 1: the key in scan.json, notes apart from it."""

RESIDUAL = 0.02  # of the KL: what the sum of all attributions may miss

# What differs wherever the model, the processor or the seed does: told where none of them is.
_FOLLOWS = ("spec.calibration", "spec.codes", "spec.isolated", "spec.held_out", "spec.reading")
_INPUTS = "spec.processor"  # differs with the processor or with the samples
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class DamageWords:
    """What the damage of a model is, and its unit: "a KL", "nats per answer token"."""

    what: str
    unit: str

    @property
    def name(self) -> str:
        """Without its article: "KL"."""
        return self.what.removeprefix("a ")


ANSWERS = "answers"
DAMAGE = {
    ANSWERS: DamageWords("a KL", "nats per answer token"),
    "tokens": DamageWords("a KL", "nats per token"),
    "classes": DamageWords("a KL", "nats per class distribution"),
    "scores": DamageWords("a normalized error", "per score"),
    "outputs": DamageWords("a normalized error", "per token of its output"),
    "embeddings": DamageWords("a normalized error", "per embedding"),
}
"""What damage is measured on (`qprobe.measure.kl.Readout`), and it in words."""


@dataclass(frozen=True)
class Measures:
    """What is measured on every batch. propagated needs independent samples, sensitivity a language head.

    nodes: of the sensitivity's quadrature to begin with, a forward and a backward pass each. With two or more
    the first is the 16-bit end of the path, where the slope is 0 and the pass measures each layer's isolated
    KL, on half of the samples (see `isolated_half`), in batches of their own; the others are on the path.
    tolerance: see `attribute`. readout: what damage is measured on, see `DAMAGE`. others: names of further
    declared measures, each with an implementation of its own.
    """

    propagated: bool
    sensitivity: bool
    nodes: int = 2
    tolerance: float = RESIDUAL
    others: tuple[str, ...] = ()
    readout: str = ANSWERS

    @classmethod
    def of(cls, taken: Iterable[declared.Measure], nodes: int) -> Measures:
        """Those that measure what is `taken`, with so many nodes."""
        names = [x.name for x in taken if not x.is_always]
        own = (declared.PROPAGATED.name, declared.SENSITIVITY_KL.name, declared.ISOLATED_KL.name)
        others = tuple(name for name in names if name not in own)
        return cls(
            declared.PROPAGATED.name in names, declared.SENSITIVITY_KL.name in names, nodes, others=others
        )

    @property
    def isolated_kl(self) -> bool:
        return self.sensitivity and self.nodes > 1

    @property
    def taken(self) -> tuple[declared.Measure, ...]:
        """The declarations of all that is measured, in their order."""
        is_taken = {
            declared.PROPAGATED.name: self.propagated,
            declared.SENSITIVITY_KL.name: self.sensitivity,
            declared.ISOLATED_KL.name: self.isolated_kl,
            **dict.fromkeys(self.others, True),
        }
        return tuple(x for x in declared.DECLARED if x.is_always or is_taken.get(x.name, False))


@dataclass(frozen=True)
class SampleKey:
    """A sample as the key knows it. digest, ends: see `qprobe.records.Sample`."""

    id: str
    digest: str
    ends: bool


Batches = tuple[tuple[SampleKey, ...], ...]


def named_batches(groups: Iterable[Iterable[Sample]]) -> Batches:
    """Samples in batches, as the key knows them."""
    return tuple(tuple(SampleKey(s.id, s.digest, s.ends) for s in group) for group in groups)


@dataclass(frozen=True)
class Rounding:
    """How calibrated codes are chosen, beside weights and samples; see `qprobe.calibration.calibrate`.

    tokens: what each counts. tune_steps: of tuning the scales afterwards, 0 for none. drawn_texts: of the
    model's own, to which codes are fitted as well.
    """

    method: str
    version: int
    damping: float
    shrinkage: str
    tokens: str
    tune_steps: int
    drawn_texts: int = 0


@dataclass(frozen=True)
class Spec:
    """What decides the numbers, beside the model and the format.

    measures: None for a scan of the weights alone, whose units are the `files` of the checkpoint.
    calibration, isolated, held_out: the samples in batches, by what is measured on them. codes: to which
    calibrated codes are fitted beside `calibration`.
    weights, processor, reading: digests of the weights, of one batch of inputs, and of how the processor
    reads every sample. rounding: of calibrated weights only.
    """

    weights: str
    device: str
    measures: Measures | None = None
    files: tuple[str, ...] = ()
    processor: str | None = None
    reading: str | None = None
    calibration: Batches = ()
    codes: Batches = ()
    isolated: Batches = ()
    held_out: Batches = ()
    seed: int | None = None
    rounding: Rounding | None = None
    versions: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if (self.measures is None) != bool(self.files):
            raise ValueError(f"measures is {self.measures}, and {len(self.files)} files are named")

    @property
    def needed_units(self) -> dict[str, int]:
        """The stages that the layer table is made of, each with its number of units."""
        if self.measures is None:
            return {declared.WEIGHTS.name: len(self.files)}
        units = {"weights": 1, "batch": len(self.calibration), "half batch": len(self.isolated)}
        return {stage.name: units[x.unit] for x in self.measures.taken for stage in x.stages}


@dataclass(frozen=True)
class Key:
    """What `scan.json` holds. inventory: in module order; a `RunFolder` knows the order of execution."""

    version: int
    model: ModelIdentity
    format: FormatSpec
    inventory: Inventory
    spec: Spec


def key_bytes(key: Key) -> bytes:
    """The bytes of scan.json."""
    return (json.dumps(asdict(key), indent=1, allow_nan=False) + "\n").encode()


def parse_key(path: Path, data: bytes) -> Key:
    """The key in `data`, the bytes of the scan.json at `path`; RunError if it is damaged or not ours."""
    raw: Any = None
    try:
        raw = strict_json(data)
        key = decode(Key, raw, "scan")
        for name in ("model", "format", "inventory"):
            check_visible(raw[name], f"scan.{name}")
        check_names((x for one in key.inventory.layers for x in (one.name, one.tower, one.group)), "scan")
        if key.version != VERSION:
            raise ValueError(f"its format is version {key.version}, not {VERSION}")
    except ValueError as error:
        wrote = _writer(raw)
        if wrote is not None:
            here = library_versions()["qprobe"]
            raise RunError(
                f"The scan is of {wrote}, and qprobe {here} cannot tell from its scan.json what it measured "
                f"({shortened(str(error), 300)}). Use the version that made it, or scan again "
                "with another --out."
            ) from None
        raise RunError(
            f"{path} is damaged ({shortened(str(error), 300)}). Put a copy of it back, or scan again "
            "with another --out."
        ) from None
    return key


def _writer(raw: Any) -> str | None:
    """Which other qprobe wrote the JSON value of a scan.json, in words; None if it was this one."""
    spec = raw.get("spec") if isinstance(raw, dict) else None
    if not isinstance(spec, dict):
        return None
    versions = spec.get("versions")
    there = versions.get("qprobe") if isinstance(versions, dict) else None
    if there is None:
        return "a qprobe that its scan.json does not name"
    is_ours = there == library_versions()["qprobe"] and raw.get("version") == VERSION
    return None if is_ours else f"qprobe {shortened(str(there), 40)}"


def differences(old: Key, new: Key) -> str:
    """In how many places, and which, two keys differ that must be equal to share units; or ""."""
    found = list(_differences("", _identity(old), _identity(new)))
    if not found:
        return ""
    first = [place for place in found if not place.startswith(_FOLLOWS)]
    has_cause = any(not place.startswith(_INPUTS) for place in first)
    told = (first if has_cause else [*first, *(place for place in found if place not in first)])[:8]
    left = f"; and {len(found) - len(told)} more{' in the samples' if told == first else ''}"
    shown = "; ".join(told) + (left if len(found) > len(told) else "")
    return f"{len(found)} {'place' if len(found) == 1 else 'places'}: {shown}"


def _identity(key: Key) -> dict[str, Any]:
    """What two runs must share to share units, as JSON values: the inventory follows from the model."""
    return {name: value for name, value in json.loads(key_bytes(key)).items() if name != "inventory"}


def _differences(where: str, old: Any, new: Any) -> Iterator[str]:
    """`spec.seed: 0 -> 1` for every leaf in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            place = f"{where}.{name}" if where else name
            if name in old and name in new:
                yield from _differences(place, old[name], new[name])
            else:
                yield f"{place}: {_shown(old, name)} -> {_shown(new, name)}"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{where}[{index}]", a, b)
    elif isinstance(old, list) and isinstance(new, list):
        yield f"{where}: {len(old)} entries -> {len(new)} entries"
    elif _canonical(old) != _canonical(new):
        yield f"{where}: {_short(old)} -> {_short(new)}"


def _shown(value: dict[str, Any], name: str) -> str:
    return _short(value[name]) if name in value else "(absent)"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else _canonical(value)
    if _SHA256.fullmatch(text):
        return f"{text[:12]}..."
    return text if len(text) <= 60 else f"{text[:57]}..."


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
