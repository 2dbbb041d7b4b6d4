"""`qprobe audit`: what is really 4-bit in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from qprobe.cli import shared
from qprobe.cli.options.declared import PATH
from qprobe.cli.options.model import device_option, trust_option
from qprobe.cli.output.speaking import say
from qprobe.system.wording import counted


@shared.command("audit", short_help="Say what is really 4-bit in a checkpoint.")
@click.argument("folder", type=PATH, metavar="DIR")
@click.option(
    "--manifest",
    type=PATH,
    metavar="FILE",
    help="What the checkpoint must be: a skiplist.json, or a folder or hub id with one.",
)
@click.option("--load", is_flag=True, help="Load the model as well, plainly, and look at every layer of it.")
@click.option(
    "--adapter", type=PATH, metavar="DIR", help="An adapter: say which of its layers took effect here."
)
@click.option(
    "--model",
    metavar="M",
    help="With --adapter: where the 16-bit weights of its base are.  [default: the model that it names]",
)
@click.option("--allow-downloads", is_flag=True, help="Fetch what is named by its hub id and is not here.")
@device_option
@trust_option
def audit(
    folder: Path,
    manifest: Path | None,
    load: bool,
    adapter: Path | None,
    model: str | None,
    device: str | None,
    allow_downloads: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Say which linear layers of the checkpoint DIR are really 4-bit, and whether all parts of it agree.

    DIR is a folder, or a hub id.

    Reads config.json, the headers of the safetensors files, and of each 4-bit layer the tables and scales
    beside its codes: which layers are packed, which hold 16-bit data though they would load as 4-bit layers
    (the first forward fails on them), which entries of the skip-list match nothing or too much, whether head
    and tied weights are named, whether the scales belong to the format, and the bytes. Weights are read
    with --load and with the manifest of a calibrated scan only. Entries are read as the transformers that is
    installed reads them.

    With the manifest of a calibrated scan, the 4-bit weights too are read and held against the file of
    calibrated weights that it names.

    With --adapter, the checkpoint and the adapter's base are loaded, and for each layer of the adapter is
    measured how much of what it adds is in the checkpoint's weight. Less than half is wrong, except where
    rounding would take as much back in any merge, which a note says.

    Exit code 1 if config, files, manifest, adapter or loaded model disagree.

    \b
    --json prints: ok, layers_4bit, layers_16bit, parameter_bytes, total_bytes, problems [text], remarks
    [text], entries [{entry, layers, too_many}] (null without a list), layers [{name, state, file}], loaded,
    adapter [{layer, state, arrived}] (null without one; arrived: share of what it adds that is there).
    """
    if device is not None and not load and adapter is None:
        raise click.UsageError("--device says where to load the model; pass --load or --adapter with it.")
    if model is not None and adapter is None:
        raise click.UsageError("--model says what an adapter was trained on; pass --adapter with it.")
    from qprobe.checkpoint.auditing.audit import audit as run_audit

    found = run_audit(
        folder,
        manifest,
        load,
        device,
        adapter=adapter,
        model=model,
        trust_remote_code=trust_remote_code,
        allow_downloads=allow_downloads,
    )
    if as_json:
        shared.print_json(found.to_json())
    else:
        _show(found.to_json(), has_manifest=manifest is not None)
    if not found.ok:
        raise click.exceptions.Exit(1)


def _show(found: dict, has_manifest: bool) -> None:
    from qprobe.report.terminal import readable_bytes

    for problem in found["problems"]:
        say(f"Wrong: {problem}")
    for remark in found["remarks"]:
        say(f"Note: {remark}")
    say(
        f"{counted(found['layers_4bit'], 'linear')} in 4-bit, {found['layers_16bit']} in 16-bit; "
        f"{readable_bytes(found['total_bytes'])} ({found['total_bytes']:,} bytes)."
    )
    if found["adapter"] is not None:
        took = sum(x["state"] == "took effect" for x in found["adapter"])
        say(f"The adapter took effect in {took} of {counted(len(found['adapter']), 'layer')}.")
    if found["ok"]:
        parts = ["config", "files", *["manifest"] * has_manifest, *["loaded model"] * found["loaded"]]
        say(f"All clear: {', '.join(parts[:-1])} and {parts[-1]} agree.")
