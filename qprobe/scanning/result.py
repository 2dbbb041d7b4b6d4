"""What a scan gives back; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Quality
from qprobe.runs.folder import RunFolder
from qprobe.runs.scored import Scored
from qprobe.runs.shards import SKIPLIST
from qprobe.runs.table import attribution_residual


@dataclass(frozen=True)
class ScanResult:
    """What a scan found, and where it lies.

    seconds: by stage. peak_bytes: of the fullest device (CUDA) or of the process (CPU). kl_*: nats per answer
    token on held-out samples, None where they do not apply. attribution_residual: (sum of the sensitivities
    - measured KL) / measured KL, on the calibration samples. skiplist: None where other processes of this
    scan have not finished their share, so that one of them chooses. verdict: one sentence.
    streamed_bytes: of weights that were copied to the device for a memory limit; None without one.
    metric: the one that was asked for, of 16-bit, the format with nothing kept, and "dynamic", the list.
    """

    run: Path
    layers: int
    samples: int
    seconds: dict[str, float]
    peak_bytes: int | None
    kl_standard_4bit: float | None
    kl_dynamic: float | None
    attribution_residual: float | None
    skiplist: Path | None
    verdict: str
    notes: tuple[str, ...] = ()
    streamed_bytes: int | None = None
    metric: Scored | None = None

    def to_json(self) -> dict[str, Any]:
        """The documented object of `scan --json`."""
        metric = None if self.metric is None else self.metric.to_json()
        skiplist = None if self.skiplist is None else str(self.skiplist)
        return {
            **vars(self),
            "run": str(self.run),
            "skiplist": skiplist,
            "notes": list(self.notes),
            "metric": metric,
        }


def result_of(run: RunFolder) -> ScanResult:
    """What the scan in the folder `run` found, by what lies there; streamed_bytes is not known any more.

    Raises RunError if it is no run folder, or a file of it is damaged.
    """
    spec, end, path = run.key.spec, run.notes.get("end"), run.path / SKIPLIST
    has_list = end is not None and path.is_file()
    quality = read_manifest(path).quality if has_list else Quality()
    return ScanResult(
        run=run.path,
        layers=len(run.key.inventory.layers),
        samples=sum(len(group) for group in (*spec.calibration, *spec.held_out)),
        seconds=end.seconds if end else {},
        peak_bytes=end.peak_bytes if end else None,
        kl_standard_4bit=quality.kl_standard_4bit,
        kl_dynamic=quality.kl_dynamic,
        attribution_residual=attribution_residual(run),
        skiplist=path if has_list else None,
        verdict=end.verdict if end else "This scan has not finished; the same command goes on with it.",
        notes=run.notes.sentences,
    )
