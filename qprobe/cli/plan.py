"""`qprobe plan`."""

from __future__ import annotations

from pathlib import Path

import click

from qprobe.cli import shared


@shared.command("plan", short_help="Exact bytes of every layout, from the config alone.")
@click.option(
    "--model",
    required=True,
    metavar="M",
    help="Known name (`qprobe models`), hub id or folder; of a folder only config.json is read.",
)
@click.option(
    "--manifest",
    type=shared.PATH,
    metavar="FILE",
    help="A skiplist.json of this model: its layout is shown as well.",
)
def plan(as_json: bool, model: str, manifest: Path | None) -> None:
    """Say what a model occupies in 16-bit, in standard 4-bit, and with the lists others published for it.

    Exact, and from the config alone: no weights are read, and a model known by name needs no network.
    Parameter bytes (packed 4-bit weights and every 16-bit parameter) are what published figures count, in
    GiB; bytes "with state" add the block scales of the 4-bit weights and are what memory must hold before
    the first activation. Code tables, about 1 KB a layer, are not counted.

    \b
    Layouts: 16-bit; nf4 (double quantization, lm_head and tied weights kept); nf4-single (without double
    quantization); fp4 (as load_in_4bit=True alone gives it); a published list by its author; manifest.
    \b
    --json prints: model, hub_id, architecture, fingerprint, parameters, linear_layers, layouts [{name,
    layers_4bit, parameter_bytes, total_bytes, double_quant, published_gib}], towers [{name, linear_layers,
    parameters, layouts [{name, layers_4bit, parameter_bytes, total_bytes}]}], outside [{name, tower, bytes,
    why}] for everything that is no weight of a linear, and notes. null is what does not apply.
    """
    from qprobe.build.plan import plan as size_plan

    found = size_plan(model, manifest).to_json()
    if as_json:
        shared.print_json(found)
        return
    from qprobe.report.sizes import plan_text
    from qprobe.report.terminal import terminal_width

    click.echo(plan_text(found, terminal_width()))
