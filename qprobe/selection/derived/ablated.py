"""RUN/ablation.csv: the KL of single layers, from the units that measured them; no torch."""

from __future__ import annotations

import pandas as pd

from qprobe.runs.derived import Derived, csv_bytes
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import STANDARD
from qprobe.runs.units import is_ablation, stage_of
from qprobe.selection.decide import Candidate, difference, on_common_samples

FILE = "ablation.csv"
COLUMNS = ("layer", "kl_isolated", "kl_isolated_se", "kl_saved", "kl_saved_se", "samples")
ALONE, KEPT = "alone ", "kept "
"""Candidates in the units: one layer in 4-bit, one layer in 16-bit; its name follows."""


def write_ablation(run: RunFolder, units: pd.DataFrame, layers: tuple[str, ...]) -> None:
    """Write RUN/ablation.csv, see `ablation_rows`."""
    run.files.write({FILE: _encoded(units, layers)})


def ablation_again(run: RunFolder, known: Derived | None) -> bool:
    """Whether RUN/ablation.csv could be written again from the units.

    known: what files.json says of it. A run may hold units of several sets of layers; those that give the
    same bytes are taken, or else the first that are complete.
    """
    first = None
    for stage in sorted({stage_of(name) or "" for name in run.unit_files()}):
        if not is_ablation(stage) or run.missing_units(stage, len(run.key.spec.calibration)):
            continue
        units = run.units(stage)
        ran = set(units["candidate"])
        made = _encoded(units, tuple(x.name for x in run.scan.inventory.layers if ALONE + x.name in ran))
        if known is None or known == Derived.of(*made):
            first = made
            break
        first = first or made
    if first is not None:
        run.files.write({FILE: first})
    return first is not None


def _encoded(units: pd.DataFrame, layers: tuple[str, ...]) -> tuple[bytes, int]:
    rows = ablation_rows(units, layers)
    return csv_bytes(rows), len(rows)


def ablation_rows(units: pd.DataFrame, layers: tuple[str, ...]) -> pd.DataFrame:
    """One row per layer, columns `COLUMNS`, in nats per answer token.

    kl_isolated: KL with only this layer in 4-bit. kl_saved: KL of standard 4-bit - KL with only this layer
    kept; paired by sample. Each with its standard error, over the samples where both are finite.
    """
    measured = {str(name): rows for name, rows in units.groupby("candidate")}
    rows = []
    for name in layers:
        standard, alone, kept = on_common_samples(
            [
                Candidate(candidate, frozenset(), 0, measured.get(candidate, units.iloc[:0]))
                for candidate in (STANDARD, ALONE + name, KEPT + name)
            ]
        )
        saved, saved_se = difference(standard, kept)
        rows.append((name, alone.kl, alone.kl_se, saved, saved_se, len(standard.measured)))
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))
