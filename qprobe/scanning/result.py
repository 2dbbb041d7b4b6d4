"""What a scan gives back; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.runs.scored import Scored


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
