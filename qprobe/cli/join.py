"""`qprobe join`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qprobe.cli import shared
from qprobe.cli.options.declared import PATH
from qprobe.cli.output.speaking import say
from qprobe.system.wording import counted

if TYPE_CHECKING:
    from qprobe.scanning.join import Joined


@shared.command("join", short_help="Join the run folders of one scan that several machines shared.")
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out", type=PATH, required=True, metavar="RUN", help="Where to join them; new, or one of them."
)
def join(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Join run folders of one scan, from a job array or several machines, and make the layer table of all.

    A share of a scan is measured by setting RANK and WORLD_SIZE, here the first of four:

        RANK=0 WORLD_SIZE=4 qprobe scan --model M --out part-0

    The order of RUN... changes nothing, and no unit counts twice. Then `qprobe rank` and `qprobe select` work
    on the joined folder, and the scan's command with that --out, without RANK, measures and chooses the list.

    \b
    --json prints: run, units, missing (units the layer table still needs), notes.
    """
    from qprobe.scanning.join import join as join_runs

    joined = join_runs(runs, out)
    if as_json:
        shared.print_json(joined)
    else:
        _show(joined)


def _show(joined: Joined) -> None:
    from qprobe.report.terminal import paragraphs, terminal_width

    if joined.notes:
        say(paragraphs(joined.notes, terminal_width()))
    say(f"{counted(joined.units, 'unit')} joined")
    if joined.missing:
        say(f"{counted(joined.missing, 'unit')} missing: join their folders too, or run the scan again.")
    else:
        say(f"Layer table  {joined.run / 'layers.csv'}")
    say(f"Run folder   {joined.run}")
