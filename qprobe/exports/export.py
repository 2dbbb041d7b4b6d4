"""`qprobe export`: a manifest in the language of one target, its entries checked by the target's own rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qprobe.errors import ManifestError, QprobeError
from qprobe.exports.keys import exact, exact_entries, first_exact, transformers_readers
from qprobe.exports.target import Target
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest
from qprobe.system.discovery import declared
from qprobe.system.wording import counted, is_or_are


@dataclass(frozen=True)
class Export:
    """text: the file for `tool`, as it must be handed on. notes: sentences its user must see."""

    tool: str
    text: str
    notes: tuple[str, ...]
    layers_16bit: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `export --json`."""
        return {
            "tool": self.tool,
            "text": self.text,
            "notes": list(self.notes),
            "layers_16bit": list(self.layers_16bit),
        }


@cache
def export_targets() -> Mapping[str, Target]:
    """Every target by name, in alphabetical order."""
    found = declared("qprobe.exports.targets", "TARGET", Target).values()
    return {x.name: x for x in sorted(found, key=lambda x: x.name)}


def export_manifest(manifest: Manifest | str | Path, to: str, adapt: str | None = None) -> Export:
    """The list of `manifest` (or of the file at that path) in the language of the target `to`.

    adapt: where adapters go, for tools that are told; None for the default of `finetune`.

    The entries were run through the tool's own rule: they keep exactly the manifest's 16-bit layers, the
    output head and tied weights among them. Raises QprobeError for an unknown tool, ManifestError,
    naming the layer, where the tool cannot be told so.
    """
    target = export_targets().get(to)
    if target is None:
        raise QprobeError(f"No tool {to!r}: qprobe exports to {', '.join(export_targets())}.")
    if adapt is not None:
        if target.adapting is None:
            tools = ", ".join(x.name for x in export_targets().values() if x.adapting)
            raise QprobeError(f"{to} is not told where adapters go, so --adapt says nothing. {tools} are.")
        target = target.adapting(adapt)
    written = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    _check_precision(written, target)
    _check_experts(written, target)
    readers = target.readers(written)
    text, notes = target.write(written, first_exact(target.lists(written, readers), readers))
    return Export(to, text, (*notes, *_lost_codes(written, target)), written.skip_modules)


def config_entries(manifest: Manifest, for_tool: str | None) -> list[str]:
    """The skip-list of a checkpoint's config under which transformers keeps exactly the manifest's layers.

    for_tool: a tool of `FOR` that has to do so as well, with names of its own in the same list; None for
    transformers alone. Raises ManifestError, naming the layer, where that cannot be said.
    """
    if for_tool is None:
        return exact_entries(transformers_readers(manifest), str, exact)
    target = export_targets()[for_tool]
    readers = target.readers(manifest)
    return first_exact(target.lists(manifest, readers), readers)


def _check_precision(manifest: Manifest, target: Target) -> None:
    name = manifest.format.four_bit_name
    if name not in target.precisions:
        raise ManifestError(
            f"The manifest is for {name}, and {target.name} takes {' or '.join(target.precisions)} only; "
            "scan in that format, or export to another tool."
        )


def _check_experts(manifest: Manifest, target: Target) -> None:
    names = [x.name for x in manifest.layers if x.is_experts and x.is_four_bit]
    if names and not target.takes_experts:
        raise ManifestError(
            f"{counted(len(names), 'weight')} of experts, first {names[0]}, "
            f"{is_or_are(len(names))} in 4-bit, which {target.name} cannot be told. Load the model with "
            "qprobe.load_dynamic_4bit, or scan with --experts 16-bit."
        )


def _lost_codes(manifest: Manifest, target: Target) -> tuple[str, ...]:
    """What a tool that makes the 4-bit weights itself loses of calibrated ones; nothing for plain NF4."""
    if not manifest.format.is_calibrated or target.of_checkpoint:
        return ()
    figure = f"The KL in the manifest is that of {manifest.format.precision.title}."
    if target.own_codes is not None:
        return (
            f"The calibrated weights are not carried over: the tool chooses 4-bit codes of its own, "
            f"{target.own_codes}. {figure}",
        )
    return (
        "The tool makes the 4-bit weights from 16-bit ones itself and rounds to nearest: to keep the "
        f"calibration, load the checkpoint that `qprobe quantize` writes. {figure}",
    )
