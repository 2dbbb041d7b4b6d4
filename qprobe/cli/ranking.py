"""The ranking of a run as `scan` and `rank` show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import pandas as pd


def default_score(folder: Path) -> str:
    """The score that chooses by default: of those measured the one that predicts best."""
    from qprobe.select.selection import default_measure
    from qprobe.select.table import read_table

    return default_measure(read_table(folder))


def ranking(folder: Path, by: str, top: int) -> pd.DataFrame:
    """The `top` rows of the layer table by `by`, the most damaged first.

    By sensitivity_kl they also have rank_low and rank_high, where the run knows them.
    """
    from qprobe.select.ranks import read_ranks
    from qprobe.select.table import rank_table, read_table

    ranked = rank_table(read_table(folder), by, top)
    intervals = read_ranks(folder) if by == "sensitivity_kl" else None
    if intervals is None:
        return ranked
    known = intervals.set_index("layer")[["rank_low", "rank_high"]]
    return ranked.join(known, on="layer")


def show_ranking(folder: Path, by: str | None, top: int) -> None:
    """Print the `top` layers of the ranking; in a terminal also a spark line of all layers."""
    from qprobe.measure.store import read_scan
    from qprobe.report.terminal import is_terminal, rank_text, spark_line, table_width
    from qprobe.report.write import kept_layers
    from qprobe.select.table import read_table

    score, table, width = by or default_score(folder), read_table(folder), table_width()
    ranked = ranking(folder, score, top)
    kept = kept_layers(folder, read_scan(folder)).in_16bit
    if is_terminal():
        click.echo(f"{score} of {len(table)} layers in execution order:")
        click.echo(spark_line([float(v) for v in table[score]], min(width, 100)) + "\n")
    click.echo(rank_text(ranked, score, kept, width))
    if "rank_low" in ranked:
        click.echo("ranks: 90 % interval over other samples of the same kind (bootstrap)")
    if any(name in kept for name in ranked["layer"]):
        click.echo("* stays in 16-bit in skiplist.json")
