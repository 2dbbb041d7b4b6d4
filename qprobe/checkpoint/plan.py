"""Exact bytes of every layout of a model, from its config alone: no weights, no network for known models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qprobe.checkpoint.load import refuse_another_model
from qprobe.checkpoint.sizes import Bytes, Layout, Outside, bytes_of, everything_outside, standard_layouts
from qprobe.errors import ManifestError
from qprobe.loading.skeleton import Skeleton, skeleton_of
from qprobe.loading.source import Source, known, resolve
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest
from qprobe.models.entry import Entry, PublishedSize
from qprobe.models.family import CROSS, LANGUAGE, OTHER, PROJECTOR, VISION
from qprobe.models.towers import tower_of
from qprobe.options import Experts
from qprobe.records import FormatSpec, Inventory, Linear
from qprobe.system.wording import counted

MANIFEST = "manifest"  # the layout of the given manifest


@dataclass(frozen=True)
class LayoutSize:
    """Bytes of one layout (`qprobe.checkpoint.sizes`); published_gib: a figure for its parameter_bytes."""

    name: str
    layers_4bit: int
    parameter_bytes: int
    total_bytes: int
    double_quant: bool | None
    published_gib: float | None


@dataclass(frozen=True)
class TowerSize:
    """One tower: its linears, its parameters (in linears and beside them), its bytes by layout name."""

    name: str
    linear_layers: int
    parameters: int
    layouts: dict[str, Bytes]


@dataclass(frozen=True)
class SizePlan:
    """What `plan` found. model: alias, hub id or the folder's name; notes are sentences a reader must see.

    outside: every parameter and saved buffer that is no weight of a linear, with its tower.
    """

    model: str
    hub_id: str | None
    architecture: str
    fingerprint: str
    parameters: int
    linear_layers: int
    layouts: tuple[LayoutSize, ...]
    towers: tuple[TowerSize, ...]
    outside: tuple[tuple[Outside, str], ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `plan --json`."""
        return {
            "model": self.model,
            "hub_id": self.hub_id,
            "architecture": self.architecture,
            "fingerprint": self.fingerprint,
            "parameters": self.parameters,
            "linear_layers": self.linear_layers,
            "layouts": [vars(x) for x in self.layouts],
            "towers": [
                {
                    "name": t.name,
                    "linear_layers": t.linear_layers,
                    "parameters": t.parameters,
                    "layouts": [{"name": name, **vars(size)} for name, size in t.layouts.items()],
                }
                for t in self.towers
            ],
            "outside": [
                {"name": x.name, "tower": tower, "bytes": x.bytes, "why": x.why} for x, tower in self.outside
            ],
            "notes": list(self.notes),
        }


def plan(
    model: str,
    manifest: Manifest | str | Path | None = None,
    trust_remote_code: bool = False,
    experts: Experts = "4-bit",
) -> SizePlan:
    """Exact bytes of `model` (alias, hub id, folder) in 16-bit, NF4, FP4, by published lists and `manifest`.

    Reads a config only: the catalogue's for a known name, else that of the folder or of the hub.
    trust_remote_code: as of `qprobe.load_dynamic_4bit`. experts: what fused weights of experts may be in,
    where no manifest says it.
    Raises ModelError if the model cannot be had or built, ManifestError, with both fingerprints, if the
    manifest was written for another model.
    """
    written = manifest if isinstance(manifest, Manifest) or manifest is None else read_manifest(manifest)
    spec = FormatSpec(experts=experts)
    return sizes_of(planned_skeleton(model, written, trust_remote_code), written, spec)


def planned_skeleton(model: str, manifest: Manifest | None, trusts_code: bool = False) -> Skeleton:
    """The skeleton of `model`, of a known one from the catalogue's geometry. Errors as of `plan`."""
    entry = known(model)
    source = (
        resolve(model, trusts_code) if entry is None else Source(entry.alias, entry.hub_id or entry.alias)
    )
    skeleton = skeleton_of(source, (manifest.format if manifest else FormatSpec()).compute_dtype, entry)
    if manifest is not None:
        refuse_another_model(manifest, skeleton)
    return skeleton


def sizes_of(
    skeleton: Skeleton,
    manifest: Manifest | None,
    spec: FormatSpec = FormatSpec(),  # noqa: B008  frozen
) -> SizePlan:
    """Exact bytes of the layouts of `skeleton`, see `plan`; spec: where no manifest says it."""
    inventory, entry = skeleton.inventory(manifest.format if manifest else spec), skeleton.entry
    layouts = [*standard_layouts(inventory), *_published(entry, inventory)]
    if manifest is not None:
        layouts.append(_chosen(manifest, inventory))
    beside = everything_outside(skeleton.model)
    figures = entry.published_sizes if entry else ()
    return SizePlan(
        model=skeleton.source.id,
        hub_id=_hub_id(skeleton),
        architecture=skeleton.architecture,
        fingerprint=skeleton.fingerprint,
        parameters=sum(p.numel() for p in skeleton.model.parameters()),
        linear_layers=len(inventory.layers),
        layouts=tuple(_size(x, bytes_of(inventory.layers, beside, x), figures) for x in layouts),
        towers=_towers(inventory, beside, layouts, skeleton.architecture),
        outside=tuple(zip(beside, _towers_of(beside, inventory, skeleton.architecture), strict=True)),
        notes=_notes(skeleton, layouts, inventory),
    )


def _hub_id(skeleton: Skeleton) -> str | None:
    """The id on the hub; None for what is embedded and for a folder."""
    if skeleton.entry is not None:
        return skeleton.entry.hub_id
    return None if Path(skeleton.source.location).is_dir() else skeleton.source.location


def _published(entry: Entry | None, inventory: Inventory) -> list[Layout]:
    """One layout a published list, with double quantization, as those checkpoints have it."""
    return [
        Layout(
            x.author,
            frozenset(y.name for y in inventory.layers if not y.fixed) - x.kept(inventory),
            True,
            note=_dead(x.author, x.dead(inventory), len(x.entries)),
        )
        for x in (entry.published if entry else ())
    ]


def _dead(author: str, dead: tuple[str, ...], entries: int) -> str:
    if not dead:
        return ""
    verb = "matches" if len(dead) == 1 else "match"
    return f"{len(dead)} of {entries} entries of {author}'s list {verb} nothing here: {', '.join(dead)}."


def _chosen(manifest: Manifest, inventory: Inventory) -> Layout:
    """The layout of `manifest`. Raises ManifestError unless it lists exactly the model's linears."""
    is_four_bit = {x.name: x.is_four_bit for x in manifest.layers}
    names = [x.name for x in inventory.layers]
    wrong = sorted(is_four_bit.keys() ^ set(names))
    if wrong:
        raise ManifestError(
            f"The manifest lists {counted(len(is_four_bit), 'layer')} and the model has {len(names)}; "
            f"{wrong[0]} is in only one of them. Names change between transformers versions; scan again "
            f"with this one."
        )
    four_bit = frozenset(name for name in names if is_four_bit[name])
    return Layout(MANIFEST, four_bit, manifest.format.double_quant, manifest.format.blocksize)


def _size(layout: Layout, size: Bytes, figures: Iterable[PublishedSize]) -> LayoutSize:
    published = next((x.gib for x in figures if x.layout == layout.name), None)
    return LayoutSize(
        layout.name, size.layers_4bit, size.parameter_bytes, size.total_bytes, layout.double_quant, published
    )


def _towers_of(beside: Iterable[Outside], inventory: Inventory, architecture: str) -> list[str]:
    """The tower of each thing beside the linears, by its name or its module's."""
    has_vision = any(x.tower == VISION for x in inventory.layers)
    towers = []
    for item in beside:
        by_name = tower_of(item.name, architecture, has_vision)
        module = item.name.rpartition(".")[0]
        towers.append(tower_of(module, architecture, has_vision) if by_name == OTHER else by_name)
    return towers


def _towers(
    inventory: Inventory, beside: tuple[Outside, ...], layouts: list[Layout], architecture: str
) -> tuple[TowerSize, ...]:
    """Each tower that holds something; their bytes sum to those of the model."""
    of_beside = _towers_of(beside, inventory, architecture)
    found = []
    for tower in (VISION, PROJECTOR, CROSS, LANGUAGE, OTHER):
        layers: list[Linear] = [x for x in inventory.layers if x.tower == tower]
        own = [x for x, name in zip(beside, of_beside, strict=True) if name == tower]
        if not layers and not own:
            continue
        elements = sum(prod(x.shape) for x in layers) + sum(x.elements for x in own)
        sizes = {layout.name: bytes_of(layers, own, layout) for layout in layouts}
        found.append(TowerSize(tower, len(layers), elements, sizes))
    return tuple(found)


def _notes(skeleton: Skeleton, layouts: list[Layout], inventory: Inventory) -> tuple[str, ...]:
    notes = [x.note for x in layouts if x.note]
    names = {x.name for x in layouts}
    for figure in skeleton.entry.published_sizes if skeleton.entry else ():
        if figure.layout not in names:
            notes.append(
                f"{figure.layout} publishes {figure.gib} GiB for a list of its own that is not known here "
                f"({figure.source})."
            )
    if getattr(skeleton.config, "quantization_config", None) is not None:
        notes.append("Its config.json says it is quantized already; these sizes are of its 16-bit model.")
    fixed = [x for x in inventory.layers if x.fixed]
    if len(fixed) == len(inventory.layers):
        beside = inventory.uncovered[0] if inventory.uncovered else None
        why = "" if beside is None else f" ({beside.name}: {beside.why})"
        notes.append(
            f"No layer of {skeleton.architecture} is ever in 4-bit{why}: every layout is the 16-bit one."
        )
    if fixed:
        names_of = ", ".join(x.name if x.name == x.fixed else f"{x.name} ({x.fixed})" for x in fixed[:3])
        more = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
        notes.append(f"In 16-bit in every standard layout: {names_of}{more}.")
    return tuple(notes)
