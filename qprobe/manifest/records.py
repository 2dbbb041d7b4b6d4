"""What a manifest holds, as frozen dataclasses."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from qprobe.records import CodesFile, FormatSpec, ModelIdentity, Uncovered
from qprobe.registry.precisions import is_four_bit

# Names of two lists among those compared.
NOTHING = "nothing kept"
NEAREST = "standard 4-bit: rounded to nearest, nothing kept"  # compared with calibrated weights


@dataclass(frozen=True)
class ManifestBudget:
    """requested: as typed ("+10%"); the rest in bytes of every parameter and persistent buffer as stored."""

    requested: str
    limit_bytes: int
    total_bytes: int
    standard_4bit_bytes: int


@dataclass(frozen=True)
class Quality:
    """KL divergence to the 16-bit model in nats per answer token; None where not measured.

    kl_dynamic: on the samples that chose the list, where it was chosen among several.
    """

    samples: int | None = None
    kl_standard_4bit: float | None = None
    kl_dynamic: float | None = None
    kl_predicted: float | None = None


@dataclass(frozen=True)
class Compared:
    """One list that was measured on the held-out samples; kl and its standard error kl_se as in `Quality`."""

    name: str
    total_bytes: int
    kl: float | None
    kl_se: float | None
    chosen: bool


@dataclass(frozen=True)
class OtherKinds:
    """Damage on samples of another kind than those that were measured. data: the file that they are of.

    compared: standard 4-bit, nothing kept where that is another model, and this list, on these samples.
    """

    data: str
    samples: int
    compared: tuple[Compared, ...]


@dataclass(frozen=True)
class ManifestLayer:
    """One linear, or one fused weight of experts, and its precision.

    shape: of the weight, as `qprobe.records.Linear` has it. precision: the name of a declared one.
    bytes: of the weight as stored.
    """

    name: str
    checkpoint_name: str
    shape: tuple[int, ...]
    precision: str
    bytes: int
    sensitivity_kl: float | None
    reason: str

    @property
    def is_four_bit(self) -> bool:
        return is_four_bit(self.precision)

    @property
    def is_experts(self) -> bool:
        """True for a weight that experts share; its name is a parameter's, not a module's."""
        return len(self.shape) == 3


@dataclass(frozen=True)
class MadeBy:
    """qprobe: its version. No time: equal inputs give equal manifests, to the byte."""

    qprobe: str
    command: str


@dataclass(frozen=True)
class Manifest:
    """What `skiplist.json` holds, except its schema version.

    compared: the lists that this one was chosen among by measured KL; empty where nothing was measured.
    other_kinds: None where none were measured.
    layers: every linear in execution order. skip_modules: the exact names of those in 16-bit, in that order.
    codes: the file with the calibrated weights, its path from the manifest's folder; None for other formats.
    """

    model: ModelIdentity
    format: FormatSpec
    budget: ManifestBudget
    quality: Quality
    compared: tuple[Compared, ...] = field(default=(), kw_only=True)
    layers: tuple[ManifestLayer, ...]
    uncovered: tuple[Uncovered, ...]
    skip_modules: tuple[str, ...]
    made_by: MadeBy
    codes: CodesFile | None = None
    other_kinds: OtherKinds | None = field(default=None, kw_only=True)


def unmeasured(manifest: Manifest) -> Manifest:
    """`manifest` without the damage that was measured, which is another one where any weight changes."""
    return replace(manifest, quality=Quality(), compared=(), other_kinds=None)


def moved(manifest: Manifest, origin: Path, target: Path) -> Manifest:
    """`manifest` of the folder `origin` as it must read in `target`: the codes stay where they are."""
    if manifest.codes is None:
        return manifest
    file = (Path(origin) / manifest.codes.file).resolve()
    path = os.path.relpath(file, Path(target).resolve()).replace(os.sep, "/")
    return replace(manifest, codes=replace(manifest.codes, file=path))
