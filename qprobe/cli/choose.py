"""`qprobe rank`, `qprobe select`, `qprobe report`: everything after the measurement, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qprobe.cli import shared
from qprobe.cli.options.declared import PATH
from qprobe.cli.options.limits import for_option, limit_options, require_a_limit
from qprobe.cli.options.model import kept_experts_option
from qprobe.cli.output.speaking import say
from qprobe.system.wording import counted, named

if TYPE_CHECKING:
    from qprobe.manifest.records import Manifest
    from qprobe.runs.folder import RunFolder

_RUN = click.argument("run", type=PATH)


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
    and rank_high, the 90 % interval of the rank over other samples of the same kind; of fused experts also
    by_expert [{tokens, weight_nmse, activation_nmse}], null what is not known.
    """
    from qprobe.cli.output.ranking import default_score, experts_of, ranking, show_ranking

    with shared.opened_run(run) as opened:
        if not as_json:
            show_ranking(opened, by, top)
            return
        score = by or default_score(opened)
        ranked = ranking(opened, score, top)
        fused = {name: [vars(x) for x in ones] for name, ones in experts_of(opened, ranked).items()}
    rows = [
        {"rank": i, **row} | ({"by_expert": fused[row["layer"]]} if row["layer"] in fused else {})
        for i, row in enumerate(ranked.to_dict("records"), 1)
    ]
    shared.print_json({"by": score, "rows": rows})


@shared.command("select", short_help="Choose layers again for another budget or bound.")
@_RUN
@limit_options(None)
@click.option(
    "--by",
    metavar="COLUMN",
    help="Score of layers.csv that chooses.  [default: sensitivity_kl, or the best one measured; isolated_kl "
    "where sensitivities miss the damage by more than 5 %]",
)
@for_option
@kept_experts_option("Keep all fused weights of experts in 16-bit; the budget counts beside them.")
@click.option(
    "--out",
    type=PATH,
    metavar="FILE",
    help="Where to write it; only a skip-list is replaced.  [default: RUN/skiplist.json]",
)
def select(run: Path, max_kl: float | None, out: Path | None, as_json: bool, **asked: Any) -> None:
    """Choose again, for another budget, bound or score, from what the run folder RUN holds.

    Nothing is measured: a --max-kl here is on the predicted KL, and refused where the run measured the list
    above it. Without --out the new list takes the place of
    RUN/skiplist.json, which rank, report and others read; a list that the scan measured is kept beside it as
    skiplist-measured.json, another one that select does not make again as skiplist-before.json.

    \b
    --json prints the manifest that was written.
    """
    require_a_limit({**asked, "max_kl": max_kl})
    from qprobe.manifest.write import manifest_to_json
    from qprobe.selection.replaced import select_into

    target = out if out is not None else run / "skiplist.json"
    with shared.opened_run(run) as opened:
        manifest, replaced = select_into(target, opened, max_kl=max_kl, **asked)
        if as_json:
            shared.print_json(manifest_to_json(manifest))
        else:
            _show(opened, manifest, target, max_kl)
    if replaced is not None:
        say(replaced.sentence, err=as_json)


def _show(run: RunFolder, manifest: Manifest, target: Path, max_kl: float | None) -> None:
    from qprobe.report.terminal import kept_text, paragraphs, readable_bytes, table_width, terminal_width
    from qprobe.selection.budget import Budget, all_fit
    from qprobe.selection.to_manifest import kept_and_fixed

    inventory = run.inventory
    kept, fixed = kept_and_fixed(manifest, inventory)
    if kept:
        say(kept_text(manifest, {x.name: x.bytes_4bit for x in inventory.layers}, kept, table_width()))
        say()
    budget = manifest.budget
    total, limit, standard = map(
        readable_bytes, (budget.total_bytes, budget.limit_bytes, budget.standard_4bit_bytes)
    )
    what = f"of the {limit} allowed"
    roomy = None if max_kl is not None else all_fit(Budget(budget.requested, budget.limit_bytes), inventory)
    if max_kl is not None:
        what = f"for a predicted KL of {manifest.quality.kl_predicted:.3g}"
    elif roomy is not None:
        what = "in all"
    sentences = [
        _how_many(len(kept), len(inventory.layers) - len(fixed), fixed),
        f"{total} {what}; standard 4-bit takes {standard}.",
        *([roomy] if roomy else []),
        _how_sure(manifest),
    ]
    say(paragraphs(sentences, terminal_width(), mark=""))
    say(f"Skip-list  {target}")


def _how_many(kept: int, choosable: int, fixed: tuple[str, ...]) -> str:
    """How many layers the list keeps, apart from those that standard 4-bit keeps as well."""
    besides = f", besides {named(fixed)}, which standard 4-bit keeps too" if fixed else ""
    return f"{kept} of {counted(choosable, 'layer')} kept in 16-bit{besides}."


def _how_sure(manifest: Manifest) -> str:
    """Whether the KL of the list was measured or is a prediction."""
    quality = manifest.quality
    if quality.kl_dynamic is not None:
        samples = counted(quality.samples or 0, "held-out sample")
        return f"Its KL was measured on {samples}: {quality.kl_dynamic:.3g}."
    if quality.kl_predicted is None:
        return "No KL was measured in this run."
    fitted = ", from samples that codes were fitted to, so too low for others"
    whence = fitted if manifest.format.is_calibrated else ""
    return (
        f"Its KL is predicted, {quality.kl_predicted:.3g}{whence}, and not measured; `qprobe compare` "
        "measures it."
    )


@shared.command("report", short_help="Draw the page and the pictures of a run.")
@_RUN
@click.option("--out", type=PATH, metavar="DIR", help="Where to write it.  [default: RUN/report]")
@click.option(
    "--against",
    type=PATH,
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

    with shared.opened_run(run) as opened:
        files = write_report(opened, out, against)
        missing = missing_measures(opened)
    if as_json:
        shared.print_json({"files": files, "missing": missing})
        return
    for path in files:
        say(f"{'Page' if path.suffix == '.html' else 'Picture':8} {path}")
    if missing:
        say(f"Not measured in this run, so left out: {', '.join(missing)}.")
