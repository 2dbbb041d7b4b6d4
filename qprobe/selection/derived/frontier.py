"""RUN/frontier.csv: predicted and measured KL of the best score's lists at several budgets; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from qprobe.options import FOR
from qprobe.runs.derived import Derived, csv_bytes
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import measured
from qprobe.runs.units import candidate_stage
from qprobe.selection.candidates import frontier
from qprobe.selection.decide import Candidate, on_common_samples
from qprobe.selection.request import parse_request
from qprobe.selection.scores import predicted_kl
from qprobe.selection.select import scored_run

FILE = "frontier.csv"


def write_frontier(run: RunFolder, table: pd.DataFrame, points: Sequence[Candidate]) -> None:
    """Write RUN/frontier.csv: one row per list of `points`."""
    run.files.write({FILE: _encoded(table, points)})


def frontier_again(run: RunFolder, known: Derived | None) -> bool:
    """Whether RUN/frontier.csv could be written again from the units.

    known: what files.json says of it. Which score chose, and for which tool, stands nowhere, so every answer
    is tried whose lists were all measured; the one that gives the same bytes is taken, or else the first.
    """
    first = None
    for points in _measured_points(run):
        made = _encoded(run.table, points)
        if known is None or known == Derived.of(*made):
            first = made
            break
        first = first or made
    if first is not None:
        run.files.write({FILE: first})
    return first is not None


def _measured_points(run: RunFolder) -> Iterator[list[Candidate]]:
    """The lists of every frontier whose lists were all measured."""
    count = len(run.key.spec.held_out)
    for for_tool in (None, *FOR):
        scored = scored_run(run, parse_request(for_tool=for_tool))
        for by in (None, *(x for x in measured(run.table) if not x.endswith("_db"))):
            lines = frontier(scored, by)
            kept = {name: frozenset(x.kept) for name, x in lines.items()}
            if count and not any(run.missing_units(candidate_stage(x), count) for x in kept.values()):
                found = {name: run.units(candidate_stage(x)) for name, x in kept.items()}
                yield on_common_samples(
                    [Candidate(name, kept[name], x.total_bytes, found[name]) for name, x in lines.items()]
                )


def _encoded(table: pd.DataFrame, points: Sequence[Candidate]) -> tuple[bytes, int]:
    rows = [
        {
            "budget_bytes": point.total_bytes,
            "predicted_kl": predicted_kl(table, point.kept),
            "measured_kl": point.kl,
            "measured_kl_se": point.kl_se,
            "candidate": point.name,
        }
        for point in points
    ]
    return csv_bytes(pd.DataFrame(rows)), len(rows)
