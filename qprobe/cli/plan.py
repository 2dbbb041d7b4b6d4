"""`qprobe plan`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qprobe.cli import shared
from qprobe.cli.options.declared import NOT_NEGATIVE, PATH, option, options
from qprobe.cli.options.model import adapt_option, device_option, experts_option, trust_option
from qprobe.cli.output.speaking import say
from qprobe.options import Experts, PlanScanOptions, flag_of
from qprobe.registry import precisions

_POSITIVE = click.IntRange(min=1)
_STEP = (
    click.option(
        "--batch-size",
        type=_POSITIVE,
        metavar="N",
        help="Of a step, or of a scan.  [default: 1; 4 of a scan]",
    ),
    click.option(
        "--tokens",
        type=_POSITIVE,
        metavar="N",
        help="Length of a sequence; image tokens that stand in it count.  [default: 2048; 512 of a scan]",
    ),
    click.option(
        "--tiles",
        type=click.IntRange(min=0),
        default=4,
        show_default=True,
        metavar="N",
        help="Image tiles of a sequence, of the config's image size each (or 560 x 560 pixels).",
    ),
    click.option(
        "--rank",
        type=_POSITIVE,
        default=16,
        show_default=True,
        metavar="N",
        help="Of the adapters; for one that holds a correction, the sum of both ranks.",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw_8bit", "adamw_torch"]),
        default="adamw_8bit",
        show_default=True,
    ),
    adapt_option("Where adapters go"),
    click.option(
        "--processes",
        type=_POSITIVE,
        default=1,
        show_default=True,
        metavar="N",
        help="That train together (torchrun), a card each; what is said is of one card.",
    ),
)


def training_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a training step."""
    for decorate in reversed(_STEP):
        function = decorate(function)
    return function


_SHARED = ("batch_size", "tokens", "tiles")  # of a training step and of a scan
_OF_STEP = ("rank", "optimizer", "adapt", "processes")
_OF_SCAN = ("samples", "format", "tune", "drawn_texts", "max_memory", "device")


scan_options = options(
    option(PlanScanOptions, "samples", type=_POSITIVE, metavar="N", help="Of a scan.  [default: 32]"),
    option(
        PlanScanOptions,
        "format",
        type=click.Choice([x.name for x in precisions.measurable()]),
        help="4-bit format of a scan.",
    ),
    option(PlanScanOptions, "tune", type=NOT_NEGATIVE, metavar="N", help="Steps, as of `qprobe scan`."),
    option(
        PlanScanOptions, "drawn_texts", type=NOT_NEGATIVE, metavar="N", help="Texts, as of `qprobe scan`."
    ),
    option(PlanScanOptions, "max_memory", metavar="SIZE", help="Limit of a scan, as of `qprobe scan`."),
    device_option,
)
"""The options of a scan that decide what it takes."""


def refuse_what_describes_nothing(training: bool, scan: bool) -> None:
    """Raises UsageError where an option of a training step or a scan was passed without asking for that."""
    context = click.get_current_context()
    needed = {
        **dict.fromkeys(_SHARED, ("a training step or a scan", "--training or --scan", training or scan)),
        **dict.fromkeys(_OF_STEP, ("a training step", "--training", training)),
        **dict.fromkeys(_OF_SCAN, ("a scan", "--scan", scan)),
    }
    for name, (what, flag, is_asked) in needed.items():
        if not is_asked and context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{flag_of(name)} describes {what}; pass {flag}.")


@shared.command("plan", short_help="Exact bytes of every layout, from the config alone.")
@click.option(
    "--model",
    required=True,
    metavar="M",
    help="Known name (`qprobe models`), hub id or folder; of a folder only config.json is read.",
)
@click.option(
    "--manifest",
    type=PATH,
    metavar="FILE",
    help="A skiplist.json of this model: its layout is shown as well.",
)
@experts_option
@click.option("--training", is_flag=True, help="Also say what a QLoRA step occupies and which cards it fits.")
@training_options
@click.option("--scan", is_flag=True, help="Also say what a scan takes here: seconds, memory, disk.")
@scan_options
@trust_option
def plan(
    as_json: bool,
    model: str,
    manifest: Path | None,
    experts: Experts,
    training: bool,
    scan: bool,
    trust_remote_code: bool,
    **asked: Any,
) -> None:
    """Say what a model occupies in 16-bit, in standard 4-bit, and with the lists others published for it.

    Exact, and from the config alone: no weights are read, and a model known by name needs no network.
    Parameter bytes (packed 4-bit weights and every 16-bit parameter) are what published figures count, in
    GiB; bytes "with state" add the block scales of the 4-bit weights and are what memory must hold before
    the first activation. Code tables, about 1 KB per layer, are not counted.

    \b
    Layouts: 16-bit; nf4 (double quantization, lm_head and tied weights kept); nf4-single (without double
    quantization); fp4 (as load_in_4bit=True alone gives it); a published list by its author; manifest.
    \b
    --json prints: model, hub_id, architecture, fingerprint, parameters, linear_layers, layouts [{name,
    layers_4bit, parameter_bytes, total_bytes, double_quant, published_gib}], towers [{name, linear_layers,
    parameters, layouts [{name, layers_4bit, parameter_bytes, total_bytes}]}], outside [{name, tower, bytes,
    why}] for everything that is no weight of a linear, and notes. null is what does not apply.
    With --training also: training {batch_size, tokens, tiles, rank, optimizer, adapt, processes,
    adapted_layers, adapter_parameters, activations {kept, at_loss, in_block, peak}, layouts [{name,
    weight_bytes, adapter_bytes, gradient_bytes, exchange_bytes, optimizer_bytes, activation_bytes,
    total_bytes, cards [{gb, usable_bytes, margin_bytes, fits}]}]}, of one card.
    With --scan also: scan {model, device, samples [measured, held out], batch {samples, tokens,
    answer_tokens, vision_rows}, format, tune, seconds {stage: s}, total_seconds, device_bytes (at the
    peak), free_bytes, needed_bytes (with all weights on the device), is_streamed, host_bytes, disk_bytes,
    rates {products, products32, copies} (measured here), notes}.
    """
    refuse_what_describes_nothing(training, scan)
    given = {name: value for name, value in asked.items() if value is not None}
    found = _sizes(given if training else None, model, manifest, experts, trust_remote_code)
    if scan:
        from qprobe.scanning.planning.plan import plan_scan

        of_scan = {name: value for name, value in given.items() if name in (*_SHARED, *_OF_SCAN)}
        takes = plan_scan(model, experts=experts, trust_remote_code=trust_remote_code, **of_scan)
        found["scan"] = takes.to_json()
    if as_json:
        shared.print_json(found)
    else:
        _say(found)


def _sizes(
    step: dict[str, Any] | None, model: str, manifest: Path | None, experts: Experts, trust_remote_code: bool
) -> dict[str, Any]:
    """The layouts of `model`, and what a training step takes where `step`, options by name, is not None."""
    if step is None:
        from qprobe.checkpoint.plan import plan as size_plan

        return size_plan(model, manifest, trust_remote_code, experts).to_json()
    from qprobe.training.memory import Step, training_plan

    asked = Step(**{name: value for name, value in step.items() if name in (*_SHARED, *_OF_STEP)})
    found = training_plan(model, asked, manifest, trust_remote_code)
    return {**found.sizes.to_json(), "training": found.to_json()}


def _say(found: dict[str, Any]) -> None:
    from qprobe.report.sizes import plan_text, scan_text
    from qprobe.report.terminal import terminal_width
    from qprobe.report.training import training_text

    width = terminal_width()
    say(plan_text(found, width))
    if "training" in found:
        say("\n" + training_text(found["training"], width))
    if "scan" in found:
        say("\n" + scan_text(found["scan"], width))
