"""`qprobe export` and `qprobe import`: a skip-list for other tools, and from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qprobe.cli import shared
from qprobe.cli.options.declared import PATH
from qprobe.cli.options.model import adapt_option, trust_option
from qprobe.cli.output.speaking import say
from qprobe.system.wording import counted, named


class _Tool(click.ParamType[str]):
    """The name of an export target. They are looked up when they are asked for: other commands need none."""

    name = "tool"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from qprobe.exports import export_targets

        if value not in export_targets():
            self.fail(f"{value!r} is not one of {', '.join(export_targets())}.", param, ctx)
        return value


class _WithTools(shared.GivenOnce):
    """A command whose help ends with the export targets, one line each."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from qprobe.exports import export_targets

        super().format_options(ctx, formatter)
        with formatter.section("Tools"):
            formatter.write_dl([(x.name, x.summary) for x in export_targets().values()])


@shared.command("export", short_help="Hand a skip-list to another tool.", kind=_WithTools)
@click.argument("manifest", type=PATH)
@click.option(
    "--to", "tool", type=_Tool(), metavar="TOOL", required=True, help="The tool whose language to write."
)
@click.option("--out", type=PATH, metavar="FILE", help="Where to write it.  [default: stdout]")
@adapt_option("With peft and axolotl: where adapters go", None)
def export(manifest: Path, tool: str, out: Path | None, adapt: str | None, as_json: bool) -> None:
    """Write the skip-list of MANIFEST (a skiplist.json) in the language of another tool.

    Every entry is first run through that tool's own rule of matching, so that exactly the 16-bit layers of
    the manifest are kept, the output head and tied weights among them; where a tool cannot be told so, the
    command says which layer is in the way. What its user must know goes to stderr.

    \b
    --json prints: tool, text (what would be written), notes [text], layers_16bit [name].
    """
    from qprobe.errors import QprobeError
    from qprobe.exports import export_manifest
    from qprobe.system.files import write_atomic

    made = export_manifest(manifest, tool, adapt)
    if out is not None:
        try:
            write_atomic(out, made.text.encode())
        except OSError as error:
            raise QprobeError(f"{out} cannot be written ({error.strerror}); choose another file.") from error
    if as_json:
        shared.print_json(made.to_json())
        return
    for note in made.notes:
        say(f"Note: {note}", err=True)
    say(made.text if out is None else f"Written  {out}", nl=out is not None)


@shared.command("import", short_help="Turn a published skip-list into a manifest.")
@click.argument("config", type=PATH)
@click.option("--model", required=True, metavar="M", help="The model it is for: name, hub id or folder.")
@click.option(
    "--out",
    type=PATH,
    default="skiplist-imported.json",
    show_default=True,
    metavar="FILE",
    help="Where to write the manifest.",
)
@trust_option
def import_(config: Path, model: str, out: Path, trust_remote_code: bool, as_json: bool) -> None:
    """Turn the skip-list in CONFIG into a manifest for a model, so that `qprobe compare` can measure it.

    CONFIG is the config.json of a quantized checkpoint (of bitsandbytes, compressed-tensors, ModelOpt,
    GPTQModel, AutoRound or AWQ), what `qprobe export` wrote as JSON, YAML or Python, or a JSON list of module
    names. Names may be those of today's transformers or those of the files on the hub; entries are read by
    the rule of their tool, or of the transformers version that the config names. Only the model's config is
    needed, no weights.

    \b
    --json prints: out, rule, matched [{entry, layers}], dead [entry], layers_16bit [name], total_bytes,
    notes [text].
    """
    from qprobe.checkpoint.import_list import import_list
    from qprobe.manifest.write import write_manifest

    imported = import_list(config, model, out, trust_remote_code)
    write_manifest(out, imported.manifest)
    if as_json:
        shared.print_json({"out": out, **imported.to_json()})
        return
    from qprobe.report.terminal import readable_bytes

    for one in imported.matched:
        count = counted(len(one.layers), "layer") if one.layers else "nothing"
        say(f"{one.entry}  {count}")
    for note in imported.notes:
        say(f"Note: {note}", err=True)
    budget = imported.manifest.budget
    fixed = named(imported.fixed)
    besides = f", besides {fixed}, which standard 4-bit keeps too" if fixed else ""
    say(
        f"{len(imported.manifest.skip_modules) - len(imported.fixed)} of "
        f"{counted(len(imported.manifest.layers) - len(imported.fixed), 'layer')} kept in 16-bit{besides}, "
        f"read as {imported.rule} does: {readable_bytes(budget.total_bytes)}; standard 4-bit takes "
        f"{readable_bytes(budget.standard_4bit_bytes)}."
    )
    say(f"Skip-list  {out}")
