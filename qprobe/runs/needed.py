"""What a scan measures, and which units its layer table is made of; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.errors import RunError
from qprobe.runs.store import missing_units, read_scan
from qprobe.system.versions import library_versions

ISOLATED = "isolated"  # the stage of isolated KL
RESIDUAL = 0.02  # of the KL: what the sum of all attributions may miss


@dataclass(frozen=True)
class Measures:
    """What is measured on every batch. propagated needs independent samples, sensitivity a language head.

    nodes: of the sensitivity's quadrature to begin with, a forward and a backward pass each. With two or more
    the first is the 16-bit end of the path, where the slope is 0 and the pass measures each layer's own
    damage, on half of the samples (see `isolated_half`), in batches of their own; the others are on the path.
    tolerance: see `attribute`.
    """

    propagated: bool
    sensitivity: bool
    nodes: int = 2
    tolerance: float = RESIDUAL

    @property
    def isolated_kl(self) -> bool:
        return self.sensitivity and self.nodes > 1

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of the store that `observe` fills; isolated KL has its own, `ISOLATED`."""
        return ("outputs", *(("kl", "sensitivity") if self.sensitivity else ()))


def needed_units(spec: Mapping[str, Any]) -> dict[str, int]:
    """The stages that a layer table is made of, each with its number of units; spec: of a scan.json.

    Raises RunError if another version of qprobe wrote a specification that this one cannot read.
    """
    try:
        return _needed_units(spec)
    except (KeyError, TypeError) as error:
        here, versions = library_versions()["qprobe"], spec.get("versions")
        there = versions.get("qprobe") if isinstance(versions, dict) else None
        wrote = f"qprobe {there}" if there else "a qprobe that its scan.json does not name"
        raise RunError(
            f"The scan is of {wrote}, and qprobe {here} cannot tell from its scan.json what it measured "
            f"({error}). Use the version that made it, or scan again with another --out."
        ) from error


def _needed_units(spec: Mapping[str, Any]) -> dict[str, int]:
    if "files" in spec:  # a scan of the weights alone, see `qprobe.scanning.weights`
        return {"weights": len(spec["files"])}
    measures = Measures(**spec["measures"])
    needed = {"weights": 1, **dict.fromkeys(measures.stages, len(spec["calibration"]))}
    # Runs of before there were batches of their own for it measured isolated KL in those of the others.
    return (
        {**needed, ISOLATED: len(spec.get("isolated", spec["calibration"]))}
        if measures.isolated_kl
        else needed
    )


def units_left(folder: Path) -> int:
    """How many units of the layer table no process has finished yet."""
    stages = needed_units(read_scan(folder).spec)
    return sum(len(missing_units(folder, stage, count)) for stage, count in stages.items())
