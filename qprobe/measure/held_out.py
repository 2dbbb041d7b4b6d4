"""Measured KL of skip-lists on held-out samples, as finished units like everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pandas as pd

from qprobe.formats.protocol import Format
from qprobe.inputs.batch import Batch
from qprobe.measure.runner import candidate_kl, nearest_kl
from qprobe.measure.subject import Subject
from qprobe.options import Progress
from qprobe.records import Sample
from qprobe.runs.folder import RunFolder
from qprobe.runs.units import NEAREST_STAGE, candidate_stage, other_stage

Groups = list[tuple[Sample, ...]]


class Piece(NamedTuple):
    """One list on one batch of held-out samples: a unit. stage: of the list."""

    unit: int
    stage: str


def pieces_of(groups: Groups, stages: Iterable[str]) -> list[Piece]:
    """Each of `stages` on each batch of `groups`, batch by batch."""
    each = list(stages)
    return [Piece(unit, stage) for unit in range(len(groups)) for stage in each]


def measure_pieces(
    subject: Subject,
    run: RunFolder,
    groups: Groups,
    lists: Mapping[str, frozenset[str]],
    pieces: Iterable[Piece],
    progress: Progress,
) -> None:
    """Measure those of `pieces` that are not there yet.

    lists: by stage the linears that are kept in 16-bit. Each costs one forward pass per batch, and the
    reference one.
    """
    wanted: dict[int, list[str]] = {}
    for unit, stage in pieces:
        wanted.setdefault(unit, []).append(stage)
    missing = {stage: set(run.missing_units(stage, len(groups))) for stage in lists}
    for done, (unit, stages) in enumerate(wanted.items(), start=1):
        kept = {stage: lists[stage] for stage in stages if unit in missing[stage]}
        if kept:
            frames = subject.measured(
                "candidates",
                groups[unit],
                lambda batch, kept=kept: candidate_kl(subject, batch, kept),
                "measure",
            )
            for stage, frame in frames.items():
                run.write_unit(stage, unit, frame)
        progress("candidates", done, len(wanted))


def measure_candidates(
    subject: Subject,
    run: RunFolder,
    groups: Groups,
    candidates: Mapping[str, frozenset[str]],
    progress: Progress,
) -> dict[str, pd.DataFrame]:
    """For each candidate (name -> linears kept in 16-bit) its KL rows over all batches of `groups`.

    Equal lists are measured once; finished units are kept.
    """
    lists = {candidate_stage(kept): kept for kept in candidates.values()}
    measure_pieces(subject, run, groups, lists, pieces_of(groups, lists), progress)
    return {name: run.units(candidate_stage(kept)) for name, kept in candidates.items()}


def measure_others(
    subject: Subject,
    run: RunFolder,
    groups: Groups,
    kept: Mapping[str, frozenset[str]],
    fmt: Format | None,
    progress: Progress,
) -> dict[str, pd.DataFrame]:
    """For each list (name -> linears kept in 16-bit) its KL rows over `groups`, samples of another kind.

    fmt: for those of `NEAREST_STAGE` as well, standard 4-bit, every weight rounded to nearest as it does it;
    None for without it. Finished units are kept.
    """
    batches = [[sample.digest for sample in group] for group in groups]
    stages = {name: other_stage(one, batches) for name, one in kept.items()}
    lists = {stages[name]: one for name, one in kept.items()}
    if fmt is not None:
        stages[NEAREST_STAGE] = other_stage(None, batches)
    missing = {stage: set(run.missing_units(stage, len(groups))) for stage in stages.values()}
    for unit, group in enumerate(groups):
        left = [stage for stage in missing if unit in missing[stage]]

        def measure(batch: Batch, left: list[str] = left) -> dict[str, pd.DataFrame]:
            frames = candidate_kl(subject, batch, {x: lists[x] for x in left if x in lists})
            for stage in left:
                if stage not in lists and fmt is not None:
                    frames[stage] = nearest_kl(subject, batch, fmt, stage)
            return frames

        if left:
            for stage, frame in subject.measured("other samples", group, measure).items():
                run.write_unit(stage, unit, frame)
        progress("other samples", unit + 1, len(groups))
    return {name: run.units(stage) for name, stage in stages.items()}


def measure_nearest(
    subject: Subject, run: RunFolder, groups: Groups, fmt: Format, units: Iterable[int], progress: Progress
) -> None:
    """Measure the KL of standard 4-bit, every weight rounded to nearest, on the batches `units` of `groups`.

    Whatever weights are in place. Two forward passes per batch; finished units are not repeated.
    """

    def measure(batch: Batch) -> dict[str, pd.DataFrame]:
        return {NEAREST_STAGE: nearest_kl(subject, batch, fmt, NEAREST_STAGE)}

    left = set(run.missing_units(NEAREST_STAGE, len(groups)))
    missing = [unit for unit in units if unit in left]
    for done, unit in enumerate(missing, start=1):
        frames = subject.measured("nearest", groups[unit], measure)
        run.write_unit(NEAREST_STAGE, unit, frames[NEAREST_STAGE])
        progress("nearest", done, len(missing))
