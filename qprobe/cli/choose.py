"""`qprobe rank`, `qprobe select`, `qprobe report`: everything after the measurement, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qprobe.cli import shared
from qprobe.cli.limits import limit_options, require_a_limit

if TYPE_CHECKING:
    from qprobe.manifest import Manifest

_RUN = click.argument("run", type=shared.PATH)


@shared.command("rank", short_help="List the layers that 4-bit hurts most.")
@_RUN
@click.option(
    "--by",
    metavar="COLUMN",
    help="Column of layers.csv to rank by.  [default: sensitivity_kl, or the best one measured]",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="How many layers to show.",
)
def rank(run: Path, by: str | None, top: int, as_json: bool) -> None:
    """List the layers of the run folder RUN that 4-bit hurts most.

    \b
    --json prints: by, and rows [{rank, and the columns of layers.csv}]; by sensitivity_kl also rank_low
    and rank_high, the 90 % interval of the rank over other samples of the same kind.
    """
    from qprobe.cli.ranking import default_score, ranking, show_ranking

    if not as_json:
        show_ranking(run, by, top)
        return
    score = by or default_score(run)
    ranked = ranking(run, score, top).to_dict("records")
    shared.print_json({"by": score, "rows": [{"rank": i, **row} for i, row in enumerate(ranked, 1)]})


@shared.command("select", short_help="Choose layers again for another budget or bound.")
@_RUN
@limit_options(None)
@click.option(
    "--by",
    metavar="COLUMN",
    help="Score of layers.csv that chooses.  [default: sensitivity_kl, or the best one measured]",
)
@click.option(
    "--out", type=shared.PATH, metavar="FILE", help="Where to write it.  [default: RUN/skiplist.json]"
)
def select(
    run: Path, budget: str | None, max_kl: float | None, by: str | None, out: Path | None, as_json: bool
) -> None:
    """Choose again, for another budget, bound or score, from what the run folder RUN holds.

    Nothing is measured: a --max-kl here is on the predicted KL.

    \b
    --json prints the manifest that was written.
    """
    require_a_limit({"budget": budget, "max_kl": max_kl})
    from qprobe.manifest import manifest_to_json, moved, write_manifest
    from qprobe.select import select as choose

    target = out if out is not None else run / "skiplist.json"
    manifest = moved(choose(run, budget, by, max_kl), run, target.parent)
    write_manifest(target, manifest)
    if as_json:
        shared.print_json(manifest_to_json(manifest))
    else:
        _show(manifest, target, is_bound=max_kl is not None)


def _show(manifest: Manifest, target: Path, is_bound: bool) -> None:
    from qprobe.report.terminal import readable_bytes
    from qprobe.select.selection import always_16bit

    kept = [layer for layer in manifest.layers if layer.precision == "bf16"]
    for layer in kept:
        click.echo(f"{layer.name}  {readable_bytes(layer.bytes)}  ({layer.reason})")
    if kept:
        click.echo()
    sizes = (manifest.budget.total_bytes, manifest.budget.limit_bytes, manifest.budget.standard_4bit_bytes)
    total, limit, standard = map(readable_bytes, sizes)
    always = always_16bit(manifest)
    besides = f", besides {', '.join(always)}, as in standard 4-bit" if always else ""
    chosen = len(kept) - len(always)
    click.echo(
        f"{chosen} of {len(manifest.layers)} layers {'is' if chosen == 1 else 'are'} kept in 16-bit{besides}."
    )
    what = f"of the {limit} allowed"
    if is_bound:
        what = f"for a predicted KL of {manifest.quality.kl_predicted:.3g}"
    click.echo(f"{total} {what}; standard 4-bit takes {standard}.")
    click.echo(_how_sure(manifest))
    click.echo(f"Skip-list  {target}")


def _how_sure(manifest: Manifest) -> str:
    """Whether the KL of the list was measured or is a prediction."""
    quality = manifest.quality
    if quality.kl_dynamic is not None:
        return f"Its KL was measured on {quality.samples} held-out samples: {quality.kl_dynamic:.3g}."
    if quality.kl_predicted is None:
        return "No KL was measured in this run."
    return f"Its KL is predicted, {quality.kl_predicted:.3g}, and not measured; `qprobe compare` measures it."


@shared.command("report", short_help="Draw the page and the pictures of a run.")
@_RUN
@click.option("--out", type=shared.PATH, metavar="DIR", help="Where to write it.  [default: RUN/report]")
@click.option(
    "--against",
    type=shared.PATH,
    metavar="RUN2",
    help="Another run of the same model, for instance of another format, to draw beside it (against.png).",
)
def report(run: Path, out: Path | None, against: Path | None, as_json: bool) -> None:
    """Draw the run folder RUN: a page to explore (index.html), error spikes, and KL over the budget.

    The page needs no network and holds everything; a measure that was not taken is left out and named.

    \b
    --json prints: files [path], missing [measures that were not taken].
    """
    from qprobe.report.write import missing_measures, write_report

    files = write_report(run, out, against)
    missing = missing_measures(run)
    if as_json:
        shared.print_json({"files": files, "missing": missing})
        return
    for path in files:
        click.echo(f"{'Page' if path.suffix == '.html' else 'Picture':8} {path}")
    if missing:
        click.echo(f"Not measured in this run, so left out: {', '.join(missing)}.")
