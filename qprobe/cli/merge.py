"""`qprobe merge`: an adapter into a checkpoint that serves."""

from __future__ import annotations

from typing import Any

import click

from qprobe.cli import shared
from qprobe.cli.options.declared import PATH, option
from qprobe.cli.options.model import device_option, dtype_option, trust_option
from qprobe.cli.options.samples import metric_option, refuse_two_sources, sample_options
from qprobe.cli.output.speaking import say
from qprobe.options import FOR, MergeOptions


@shared.command(
    "merge",
    interrupted="{out} was not made, nothing is left of it; the same command starts over.",
    out_of_memory="Pass a smaller --batch-size, or another --device.",
    short_help="Add an adapter to the weights, as a checkpoint that serves.",
)
@click.argument("adapter", type=PATH, metavar="ADAPTER")
@option(MergeOptions, "out", metavar="DIR", help="Folder to make; never overwritten.")
@option(
    MergeOptions,
    "as_",
    help="Form of the merged weights.  [default: both are made and measured, the better one is kept]",
)
@option(
    MergeOptions,
    "manifest",
    metavar="FILE",
    help="The skiplist.json of the base, for an adapter that qprobe finetune did not make.",
)
@option(
    MergeOptions,
    "base",
    help="With --manifest: what the adapter was trained on.  [default: dynamic]",
)
@option(
    MergeOptions,
    "model",
    metavar="M",
    help="Where the 16-bit weights are: name, hub id or folder.  [default: those it was trained on]",
)
@option(
    MergeOptions,
    "for_tool",
    type=click.Choice(FOR),
    help="Tool that will serve DIR: in 4-bit, the list in its config has that tool's names as well.",
)
@sample_options
@metric_option("base + adapter and of what was merged")
@device_option
@dtype_option("that of the base; with --manifest only")
@trust_option
def merge(as_json: bool, **asked: Any) -> None:
    """Add the adapter in the folder ADAPTER to weights, and write them as the new checkpoint DIR.

    An adapter is trained beside its base's weights, most of them in 4-bit. Added to the 16-bit weights it is
    another model, and a correction of 4-bit weights that it holds is left out; added to the dequantized ones
    it has to go back to 4-bit, which rounds part of it away. Where the scan calibrated codes, those of the
    layers that the adapter changes are calibrated again as well, on samples that are not measured on: rows of
    --data or files of --images behind those that are, else built-in ones.
    All are made, loaded with plain from_pretrained, and held against base + adapter on the samples: the one
    with the lower KL is kept, and 4-bit where no difference is found. Pass samples that the adapter was not
    trained on; answers that they bring are held against the greedy ones (--metric).

    DIR is a standard checkpoint with its processor and a model card that holds what was measured. It gets its
    name only once it is complete and audited. An adapter that takes no effect is refused, and so is
    one of another base.

    \b
    --json prints: out, form (16-bit or 4-bit), rounding (of 4-bit: nearest or calibrated, else null), why,
    base, layers (that the adapter is on), unchanged [layer] (those that it leaves as they are), rounded_away
    [layer] (those whose weights hold less than half of what it adds), arrived (share of what the adapter adds
    that is in the weights), files {name: bytes}, and rows, metrics and samples as of compare; the first row
    is base + adapter.
    """
    refuse_two_sources(asked)
    if asked["manifest"] is None and asked["base"] is not None:
        raise click.UsageError("--base says what an adapter was trained on with --manifest; pass both.")
    from qprobe.report.terminal import compare_text, paragraphs, terminal_width
    from qprobe.training.merging.merge import merge as run_merge
    from qprobe.training.merging.merged import lost

    with shared.progress_bars() as progress:
        made = run_merge(**asked, progress=progress)
    if as_json:
        shared.print_json(made.to_json())
        return
    width = terminal_width()
    say(compare_text(made.comparison.to_json(), width))
    said = [f"{made.out}: merged in {made.form}. {made.why} {lost(made)}", *made.comparison.notes]
    say("\n" + paragraphs(said, width))
