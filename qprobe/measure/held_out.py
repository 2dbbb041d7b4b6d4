"""Measured KL of skip-lists on held-out samples, as finished units like everything else."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from qprobe.formats.protocol import Format
from qprobe.inputs.batch import Batch
from qprobe.measure.runner import candidate_kl, nearest_kl
from qprobe.measure.subject import Subject
from qprobe.options import Progress
from qprobe.records import Sample
from qprobe.runs.folder import RunFolder
from qprobe.runs.units import NEAREST_STAGE, candidate_stage


def measure_candidates(
    subject: Subject,
    run: RunFolder,
    groups: list[tuple[Sample, ...]],
    candidates: Mapping[str, frozenset[str]],
    progress: Progress,
) -> dict[str, pd.DataFrame]:
    """For each candidate (name -> linears kept in 16-bit) its KL rows over all batches of `groups`.

    Each distinct list costs one forward pass per batch, and the reference one; finished units are kept.
    """
    lists = {candidate_stage(kept): kept for kept in candidates.values()}
    missing = {stage: set(run.missing_units(stage, len(groups))) for stage in lists}
    for unit, group in enumerate(groups):
        wanted = {stage: kept for stage, kept in lists.items() if unit in missing[stage]}
        if wanted:
            frames = subject.measured(
                "candidates",
                group,
                lambda batch, wanted=wanted: candidate_kl(subject, batch, wanted),
                "measure",
            )
            for stage, frame in frames.items():
                run.write_unit(stage, unit, frame)
        progress("candidates", unit + 1, len(groups))
    return {name: run.units(candidate_stage(kept)) for name, kept in candidates.items()}


def measure_nearest(
    subject: Subject, run: RunFolder, groups: list[tuple[Sample, ...]], fmt: Format, progress: Progress
) -> pd.DataFrame:
    """The KL rows over `groups` with nothing kept and every weight rounded to nearest, whatever is in place.

    Two forward passes per batch; finished units are not repeated.
    """

    def measure(batch: Batch) -> dict[str, pd.DataFrame]:
        return {NEAREST_STAGE: nearest_kl(subject, batch, fmt, NEAREST_STAGE)}

    missing = run.missing_units(NEAREST_STAGE, len(groups))
    for done, unit in enumerate(missing, start=1):
        frames = subject.measured("nearest", groups[unit], measure)
        run.write_unit(NEAREST_STAGE, unit, frames[NEAREST_STAGE])
        progress("nearest", done, len(missing))
    return run.units(NEAREST_STAGE)
