"""`qprobe scan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from qprobe.cli import shared
from qprobe.cli.options.declared import NOT_NEGATIVE, PATH, POSITIVE, option
from qprobe.cli.options.limits import for_option, limit_options, refuse_two_limits
from qprobe.cli.options.model import devices_option, dtype_option, experts_option, trust_option
from qprobe.cli.options.samples import data_help, metric_option, refuse_two_sources, sample_options
from qprobe.cli.output.speaking import say
from qprobe.options import DEFAULT_BUDGET, ScanOptions
from qprobe.registry import measures, precisions
from qprobe.system.wording import counted, lasting

if TYPE_CHECKING:
    from qprobe.scanning.run import Run

TOP = 10  # layers of the ranking that are shown


@shared.command(
    "scan",
    interrupted="Finished units are kept in the run folder; the same command goes on from there.",
    out_of_memory="Pass --max-memory with a limit below what the device has, or --device auto where there "
    "are several GPUs, and what is finished is kept; or a smaller --batch-size with another --out.",
    short_help="Measure every layer, choose those that stay in 16-bit.",
)
@option(
    ScanOptions,
    "model",
    metavar="M",
    help="Name from `qprobe models`, hub id, or folder of a 16-bit checkpoint.",
)
@sample_options
@metric_option("16-bit, standard 4-bit and the chosen list to the held-out samples")
@option(
    ScanOptions,
    "format",
    type=click.Choice([x.name for x in precisions.measurable()]),
    help="4-bit format whose damage is measured; nf4-calibrated chooses the codes of every weight on the "
    "samples, for the same bytes.",
)
@option(
    ScanOptions,
    "max_memory",
    metavar="SIZE",
    help="The most that the scan may hold on its device (on a CPU: in its process), such as 22GiB. Weights "
    "that do not fit wait on the host and are copied when a layer runs.  [default: what is free]",
)
@option(
    ScanOptions,
    "calibration_samples",
    type=POSITIVE,
    metavar="N",
    help="Samples that nf4-calibrated fits codes to: those that are measured, and more of the same source up "
    "to N.  [default: 128 that bring answers on CUDA, for a model up to 2.5 billion parameters; else those "
    "that are measured]",
)
@option(
    ScanOptions,
    "drawn_texts",
    type=NOT_NEGATIVE,
    metavar="N",
    help="Texts of 128 tokens that the model draws itself, to which nf4-calibrated fits codes and scales as "
    "well, so that they suit other kinds of text better; all of them together count as much as the samples.",
)
@option(
    ScanOptions,
    "tune",
    type=NOT_NEGATIVE,
    metavar="N",
    help="Steps in which nf4-calibrated tunes block scales on the answers; 0 for none. Each runs a batch "
    "forward and backward.  [default: 200 on CUDA, 32 for a model above 2.5 billion parameters; 0 on a CPU]",
)
@option(
    ScanOptions,
    "keep_correction",
    type=click.IntRange(min=1, max=64),
    metavar="RANK",
    help="Also keep what nf4-calibrated leaves of every weight, as factors of this rank at most, in "
    "RUN/correction.safetensors; one of another rank there is not replaced.",
)
@option(
    ScanOptions,
    "check_data",
    type=PATH,
    metavar="FILE",
    help=data_help("Samples of another kind than those that are measured, for what 4-bit costs on them"),
)
@experts_option
@limit_options(DEFAULT_BUDGET)
@option(
    ScanOptions,
    "by",
    metavar="COLUMN",
    help="Score of layers.csv that chooses, e.g. activation_nmse.  [default: the best one measured]",
)
@for_option
@option(
    ScanOptions,
    "measures",
    metavar="NAMES",
    callback=lambda _context, _option, value: _names(value),
    help=f"What to measure, of {', '.join(measures.names())}, with commas between them. Weight is always "
    "measured, and activation with whatever runs samples. weight alone reads the files tensor by tensor, "
    "for models that fit nowhere.  [default: all]",
)
@option(
    ScanOptions,
    "nodes",
    type=POSITIVE,
    default=2,
    metavar="N",
    help="Quadrature nodes of the sensitivity; each costs a forward and a backward pass.",
)
@option(
    ScanOptions,
    "ablate",
    metavar="LAYERS",
    help="Also measure the KL of single layers, alone in 4-bit and alone in 16-bit, into RUN/ablation.csv: "
    "all, the N most sensitive ones, or names with commas. Slow: two forward passes per layer and batch.",
)
@option(
    ScanOptions,
    "out",
    metavar="RUN",
    help="Run folder; an interrupted scan continues in it.  [default: runs/MODEL]",
)
@option(
    ScanOptions,
    "check",
    metavar="RUN",
    help="In the place of --out: measure a few units of RUN again, the run of this same command, and compare "
    "them, to the bit on a CPU, on a GPU with what two runs differ there. Nothing is written.",
)
@devices_option
@dtype_option("bf16")
@trust_option
def scan(as_json: bool, **asked: Any) -> None:
    """Measure what 4-bit costs every linear layer of a model, and choose which layers stay in 16-bit.

    Leaves a run folder RUN with the layer table (layers.csv), how sure its ranking is (ranks.csv), the
    skip-list (skiplist.json) and pictures (report/); with nf4-calibrated also the weights. The same command
    resumes an interrupted scan.

    `torchrun --nproc-per-node N -m qprobe scan ...` shares the work among N GPUs; so does any scheduler that
    sets RANK and WORLD_SIZE. Processes that finish before the others print nothing on stdout.

    \b
    --json prints: run, layers, samples, seconds {stage: s}, peak_bytes, kl_standard_4bit, kl_dynamic
    (nats per answer token), attribution_residual, skiplist, verdict, notes, streamed_bytes (copied to
    the device for --max-memory), metric (as in `qprobe compare --json`; of 16-bit, the format with nothing
    kept, and dynamic, the chosen list); null for what does not apply.
    """
    refuse_two_sources(asked)
    refuse_two_limits(asked)
    from qprobe.scanning.scan import scan as run_scan

    with shared.progress_bars() as progress:
        run = run_scan(**asked, progress=progress)
    if asked["check"] is not None and not as_json:
        say(run.verdict)
    elif run.skiplist is None and not asked["check"]:  # stdout belongs to the process that chooses
        say(run.verdict, err=True)
    elif as_json:
        shared.print_json(run.to_json())
    else:
        _show(run, asked)


def _names(value: str | None) -> tuple[str, ...] | None:
    """The measures that were typed, in the order of their declaration; raises BadParameter for others."""
    if value is None:
        return None
    typed = {name.strip() for name in value.split(",")}
    unknown = sorted(typed - {*measures.names()})
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is no measure; name some of {', '.join(measures.names())}.")
    return tuple(name for name in measures.names() if name in typed)


def _show(run: Run, asked: Mapping[str, Any]) -> None:
    from qprobe.cli.output.ranking import show_ranking
    from qprobe.report.terminal import paragraphs, readable_bytes, terminal_width

    result, width = run.result, terminal_width()
    stages = "  ".join(f"{stage} {lasting(seconds)}" for stage, seconds in result.seconds.items())
    peak = f"  (peak memory {readable_bytes(result.peak_bytes)})" if result.peak_bytes else ""
    say(f"{counted(result.layers, 'linear layer')}, {counted(result.samples, 'sample')}")
    say(f"{stages}{peak}\n")
    show_ranking(run.folder, asked["by"], TOP)
    if run.notes:
        say("\n" + paragraphs(run.notes, width))
    say(f"\nRun folder  {run.path}")
    if asked["ablate"] is not None:
        say(f"Ablation    {run.path / 'ablation.csv'}")
    say(f"Skip-list   {run.skiplist}")
    say()
    click.secho(paragraphs([run.verdict], width, mark=""), bold=True)
