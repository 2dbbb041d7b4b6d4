"""Manifests for the tiny models, made without a scan: the test says which layers are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qprobe.loading.config import load_config
from qprobe.loading.inventory import fingerprint, list_layers
from qprobe.loading.skeleton import meta_model
from qprobe.loading.source import resolve
from qprobe.manifest.records import MadeBy, Manifest, ManifestBudget, ManifestLayer, Quality
from qprobe.records import FormatSpec, Inventory, ModelIdentity


def inventory_of(folder: Path, spec: FormatSpec | None = None) -> Inventory:
    """The inventory of the model in `folder`, from its config alone."""
    spec = spec or FormatSpec()
    return list_layers(meta_model(load_config(resolve(str(folder))), spec.compute_dtype), spec)


def manifest_for(folder: Path, kept: Iterable[str] = (), spec: FormatSpec | None = None) -> Manifest:
    """The manifest that a scan of the model in `folder` would write had it chosen the layers `kept`."""
    spec = spec or FormatSpec()
    source = resolve(str(folder))
    model = meta_model(load_config(source), spec.compute_dtype)
    inventory = list_layers(model, spec)
    names = frozenset(kept)
    layers = tuple(
        ManifestLayer(
            name=x.name,
            checkpoint_name=x.checkpoint_name,
            shape=x.shape,
            precision="bf16" if x.fixed or x.name in names else "nf4",
            bytes=x.bytes_16bit if x.fixed or x.name in names else x.bytes_4bit,
            sensitivity_kl=None,
            reason=x.fixed or "test",
        )
        for x in inventory.layers
    )
    total = inventory.total_bytes(names)
    return Manifest(
        model=ModelIdentity(source.id, None, type(model).__name__, fingerprint(model)),
        format=spec,
        budget=ManifestBudget("test", total, total, inventory.standard_4bit_bytes),
        quality=Quality(),
        layers=layers,
        uncovered=inventory.uncovered,
        skip_modules=tuple(x.name for x in layers if x.precision == "bf16"),
        made_by=MadeBy("0", "test"),
    )


def every_third(folder: Path) -> tuple[str, ...]:
    """A third of the layers of the model in `folder`, from all of its towers."""
    return tuple(x.name for x in inventory_of(folder).layers)[1::3]


def with_layer(manifest: Manifest, layer: str, **changes: Any) -> Manifest:
    """`manifest` with some fields of one layer changed."""
    layers = tuple(replace(x, **changes) if x.name == layer else x for x in manifest.layers)
    return replace(manifest, layers=layers)
