"""Manifests of made-up layers, and of real module trees, without weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qprobe.manifest.records import MadeBy, Manifest, ManifestBudget, ManifestLayer, Quality
from qprobe.records import FormatSpec, ModelIdentity, Uncovered
from tests.models import trees


def manifest_of(
    kept: Mapping[str, bool],
    architecture: str = "MadeUpModel",
    in_files: Mapping[str, str] | None = None,
    uncovered: Iterable[Uncovered] = (),
    reasons: Mapping[str, str] | None = None,
) -> Manifest:
    """A manifest of 64 x 64 layers: by name, whether it stays in 16-bit (8,192 B) or not (2,116 B)."""
    layers = tuple(
        ManifestLayer(
            name=name,
            checkpoint_name=(in_files or {}).get(name, name),
            shape=(64, 64),
            precision="bf16" if is_kept else "nf4",
            bytes=8192 if is_kept else 2048 + 64 + 4,
            sensitivity_kl=None,
            reason=(reasons or {}).get(name, "test"),
        )
        for name, is_kept in kept.items()
    )
    others = tuple(uncovered)
    total = sum(x.bytes for x in layers) + sum(x.bytes for x in others)
    standard = 2116 * len(layers) + sum(x.bytes for x in others)
    return Manifest(
        model=ModelIdentity("owner/model", None, architecture, "0" * 64),
        format=FormatSpec(),
        budget=ManifestBudget("test", total, total, standard),
        quality=Quality(),
        layers=layers,
        uncovered=others,
        skip_modules=tuple(x.name for x in layers if x.precision == "bf16"),
        made_by=MadeBy("0", "test"),
    )


def of_tree(architecture: str, kept: Iterable[str]) -> Manifest:
    """A manifest for the small model of that architecture, with today's names; the fixed layers stay too."""
    inventory, names = trees.inventory(architecture), frozenset(kept)
    return manifest_of(
        {x.name: x.name in names or x.fixed is not None for x in inventory.layers},
        architecture,
        {x.name: x.checkpoint_name for x in inventory.layers},
        inventory.uncovered,
        {x.name: x.fixed for x in inventory.layers if x.fixed},
    )
