"""The ranking of a run as `scan` and `rank` show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qprobe.cli.output.speaking import say
from qprobe.registry import measures
from qprobe.system.wording import counted, named

if TYPE_CHECKING:
    import pandas as pd

    from qprobe.runs.folder import RunFolder
    from qprobe.runs.layers.by_expert import Expert


def default_score(run: RunFolder) -> str:
    """The score that chooses by default: of those measured the one that predicts best."""
    from qprobe.selection.scores import default_measure

    return default_measure(run.table)


def ranking(run: RunFolder, by: str, top: int) -> pd.DataFrame:
    """The `top` rows of the layer table by `by`, the most damaged first.

    By sensitivity_kl they also have rank_low and rank_high, where the run knows them.
    """
    from qprobe.runs.layers.table import rank_table

    ranked = rank_table(run.table, by, top)
    intervals = run.ranks if by == measures.SENSITIVITY_KL.score else None
    if intervals is None:
        return ranked
    known = intervals.set_index("layer")[["rank_low", "rank_high"]]
    return ranked.join(known, on="layer")


def experts_of(run: RunFolder, ranked: pd.DataFrame) -> dict[str, tuple[Expert, ...]]:
    """The experts of each fused weight among the rows of `ranked`, by its name, in their order."""
    from qprobe.runs.layers.by_expert import by_expert

    if ranked["experts"].isna().all():
        return {}
    found = by_expert(run)
    return {layer: found[layer] for layer in ranked["layer"] if layer in found}


def show_ranking(run: RunFolder, by: str | None, top: int) -> None:
    """Print the `top` layers of the ranking; in a terminal also a spark line of all layers."""
    from qprobe.report.terminal import is_terminal, rank_text, spark_line, table_width
    from qprobe.runs.findings import rerouted_note
    from qprobe.runs.layers.by_expert import expert_sentences

    score, table, width = by or default_score(run), run.table, table_width()
    ranked = ranking(run, score, top)
    kept, fixed = _in_16bit(run)
    if is_terminal():
        say(f"{score} of {len(table)} layers in execution order:")
        say(spark_line([float(v) for v in table[score]], min(width, 100)) + "\n")
    say(rank_text(ranked, score, frozenset((*kept, *fixed)), width))
    say("16-bit costs: what keeping a layer adds to its bytes in 4-bit")
    for sentence in expert_sentences(experts_of(run, ranked)):
        say(sentence)
    if score == measures.PROPAGATED.score and (rerouted := rerouted_note(run)):
        say(rerouted)
    if "rank_low" in ranked:
        say("ranks: 90 % interval over other samples of the same kind (bootstrap)")
    if any(name in (*kept, *fixed) for name in ranked["layer"]):
        besides = f", besides {named(fixed)}" if fixed else ""
        say(f"* stays in 16-bit in skiplist.json ({counted(len(kept), 'layer')}{besides})")


def _in_16bit(run: RunFolder) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(layers that the run's skip-list keeps beyond standard 4-bit, those that standard 4-bit keeps)."""
    from qprobe.manifest.read import read_manifest
    from qprobe.selection.to_manifest import kept_and_fixed

    inventory, path = run.inventory, run.path / "skiplist.json"
    if path.is_file():
        return kept_and_fixed(read_manifest(path), inventory)
    return (), tuple(x.name for x in inventory.layers if x.fixed)
