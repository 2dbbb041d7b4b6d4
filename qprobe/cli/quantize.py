"""`qprobe quantize`: a standard checkpoint of the dynamic model."""

from __future__ import annotations

from pathlib import Path

import click

from qprobe.cli import shared
from qprobe.cli.options.declared import PATH
from qprobe.cli.options.model import device_option, dtype_option, kept_experts_option, trust_option
from qprobe.cli.output.speaking import say
from qprobe.options import FOR, KeptExperts
from qprobe.system.wording import counted


@shared.command(
    "quantize",
    interrupted="{out} was not made, nothing is left of it; the same command starts over.",
    short_help="Write the dynamic model as a checkpoint that from_pretrained loads.",
)
@click.argument("manifest", type=PATH, metavar="F")
@click.option("--out", type=PATH, required=True, metavar="DIR", help="Folder to make; never overwritten.")
@click.option(
    "--model",
    metavar="M",
    help="Where the 16-bit weights are: known name, hub id or folder.  [default: the model F names]",
)
@device_option
@dtype_option("the manifest's")
@kept_experts_option(
    "Keep all fused weights of experts in 16-bit, so that plain from_pretrained loads DIR.  "
    "[default: as F says]"
)
@click.option(
    "--for",
    "for_tool",
    type=click.Choice(FOR),
    help="Tool that will serve DIR: the list in its config has that tool's names as well.",
)
@click.option(
    "--push-to-hub",
    metavar="REPO",
    help="Upload DIR to owner/name on the hub as well; a new one is private.",
)
@trust_option
def quantize(
    manifest: Path,
    out: Path,
    model: str | None,
    device: str | None,
    dtype: str | None,
    experts: KeptExperts | None,
    for_tool: str | None,
    push_to_hub: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Write the model that the skiplist.json F describes into the new folder DIR.

    DIR is a standard checkpoint: safetensors shards, a config with the exact list of the layers in 16-bit,
    the processor, a model card with what the scan measured, and F itself. Plain from_pretrained loads it
    where qprobe is not installed; where fused weights of experts are in 4-bit, which it cannot read, it
    refuses DIR, and load_dynamic_4bit("DIR") loads it. The 16-bit weights are read one by one. DIR gets its
    name only once it is complete and audited.

    \b
    --json prints: out, layers_4bit, layers_16bit, parameter_bytes, total_bytes, files {name: bytes}, pushed
    (address of the commit; null without --push-to-hub).
    """
    from qprobe.checkpoint.quantize import quantize as write

    with shared.progress_bars() as progress:
        done = write(
            manifest,
            out,
            model,
            device,
            dtype,
            trust_remote_code=trust_remote_code,
            experts=experts,
            for_tool=for_tool,
            push_to_hub=push_to_hub,
            progress=progress,
        )
    if as_json:
        shared.print_json(done.to_json())
        return
    from qprobe.report.terminal import readable_bytes

    say(
        f"{done.out}: {counted(done.layers_4bit, 'linear layer')} in 4-bit, {done.layers_16bit} in 16-bit "
        f"(those that standard 4-bit keeps among them), "
        f"{readable_bytes(done.total_bytes)} with quantization state, {counted(len(done.files), 'file')}."
        + (f" Uploaded: {done.pushed}" if done.pushed else "")
    )
