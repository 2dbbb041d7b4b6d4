"""`qprobe compare`."""

from __future__ import annotations

from typing import Any

from qprobe.cli import shared
from qprobe.cli.options.declared import option
from qprobe.cli.options.model import devices_option, dtype_option, trust_option
from qprobe.cli.options.samples import metric_option, refuse_two_sources, sample_options
from qprobe.cli.output.speaking import say
from qprobe.options import CompareOptions


@shared.command(
    "compare",
    interrupted="Nothing was written; the same command starts over.",
    out_of_memory="Pass a smaller --batch-size, or --device auto where there are several GPUs.",
    short_help="16-bit, standard and dynamic 4-bit, side by side.",
)
@option(CompareOptions, "manifest", metavar="FILE", help="A skiplist.json, or a folder or hub id with one.")
@option(
    CompareOptions,
    "model",
    metavar="M",
    help="Where the 16-bit weights are: name, hub id or folder.  [default: as the manifest says]",
)
@sample_options
@metric_option("the three models")
@devices_option
@dtype_option("that of the manifest")
@trust_option
def compare(as_json: bool, **asked: Any) -> None:
    """Run the 16-bit model, standard 4-bit and the dynamic 4-bit model on the same samples, side by side.

    Shows bytes as stored, KL to the 16-bit model (nats per answer token, with its standard error), how
    often the most likely token and the whole answer are the same, metrics of the answers with the
    differences between the models (facts wherever the samples carry facts), and a few answers. The built-in
    samples are other ones than those of a scan. Where FILE lies in a run folder, the result stays there as
    compare.json, and `qprobe report` shows it.

    \b
    --json prints: rows [{name, parameter_bytes, total_bytes, kl, kl_se, top1_agreement, answer_agreement}]
    for 16-bit, nf4 and dynamic (for calibrated weights also nf4-calibrated, with nothing kept, and
    dynamic-nf4, the list with weights rounded to nearest), metrics [{name, is_share, samples, left_out,
    means {name: {value, se}}, differences [{model, against, value, se, is_found}]}] (is_found: more than
    twice its error), and samples [{id, prompt, answers {name: text}}]; shares are 0 to 1, null for what does
    not apply.
    """
    refuse_two_sources(asked)
    from qprobe.checkpoint.comparing.compare import compare as run_compare
    from qprobe.checkpoint.hub import manifest_in

    asked["manifest"] = manifest_in(asked["manifest"], asked["allow_downloads"])
    with shared.opened_run(asked["manifest"].parent), shared.progress_bars() as progress:
        comparison = run_compare(**asked, progress=progress)
    if as_json:
        shared.print_json(comparison.to_json())
        return
    from qprobe.report.terminal import compare_text, is_terminal, kl_bars, paragraphs, terminal_width

    bars = kl_bars(comparison.to_json())
    if bars and is_terminal():
        say(f"KL to the 16-bit model:\n{bars}\n")
    say(compare_text(comparison.to_json(), terminal_width()))
    if comparison.notes:
        say("\n" + paragraphs(comparison.notes, terminal_width()))
