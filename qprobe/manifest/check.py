"""What must hold of a manifest that its JSON Schema cannot say: names, skip_modules and bytes agree."""

from __future__ import annotations

from collections import Counter
from math import prod

from qprobe.errors import ManifestError
from qprobe.manifest.records import Manifest
from qprobe.registry.precisions import SIXTEEN_BIT, packed_bytes
from qprobe.system.decoding import FORMULAS
from qprobe.system.wording import shortened


def check_manifest(manifest: Manifest) -> None:
    """Raises ManifestError, naming the key, if `manifest` contradicts itself."""
    _check_codes(manifest)
    _check_place(manifest)
    _check_names(manifest)
    _check_precisions(manifest)
    _check_bytes(manifest)
    _check_compared(manifest)


def _check_codes(manifest: Manifest) -> None:
    if manifest.format.is_calibrated != (manifest.codes is not None):
        what = "names no file of weights" if manifest.codes is None else "has no calibrated weights to name"
        raise ManifestError(
            f"codes: the format {manifest.format.name} {what}; make the manifest again with qprobe select."
        )


def _check_place(manifest: Manifest) -> None:
    """The file of codes may lie in another folder than the manifest, but is named from it."""
    file = "" if manifest.codes is None else manifest.codes.file
    is_absolute = file.startswith(("/", "\\")) or ":" in file
    if manifest.codes is not None and (is_absolute or not file.endswith(".safetensors")):
        raise ManifestError(
            f"codes: {shortened(repr(file), 80)} is no path of a .safetensors file from the manifest's "
            "folder; the file was changed by hand or is damaged."
        )


def _check_names(manifest: Manifest) -> None:
    named = (*manifest.layers, *manifest.uncovered)
    for name in (*(x.name for x in named), *(x.checkpoint_name for x in manifest.layers)):
        # It would begin a line of its own in what is exported, or be computed by a spreadsheet.
        if not name.isprintable() or name.startswith(FORMULAS):
            what = "holds a character that is not printable" if not name.isprintable() else "is no layer's"
            raise ManifestError(
                f"layers: the name {shortened(ascii(name), 80)} {what}; the file was changed by hand or is "
                "damaged."
            )
    for name, count in Counter(x.name for x in manifest.layers).items():
        if count > 1:
            raise ManifestError(f"layers: {name} is listed {count} times; each linear may stand there once.")
    kept = tuple(x.name for x in manifest.layers if not x.is_four_bit)
    if manifest.skip_modules == kept:
        return
    listed = set(manifest.skip_modules)
    missing = [x for x in kept if x not in listed]
    extra = [x for x in manifest.skip_modules if x not in set(kept)]
    kept_name = SIXTEEN_BIT.name
    what = (
        f"lacks {missing[0]}, which is {kept_name} in layers"
        if missing
        else f"names {extra[0]}, which is not {kept_name} in layers"
        if extra
        else "has the right names in another order or more than once"
    )
    raise ManifestError(
        f"skip_modules {what}; it must list the {len(kept)} {kept_name} layers in the order of layers."
    )


def _check_precisions(manifest: Manifest) -> None:
    four_bit = manifest.format.four_bit_name
    for layer in manifest.layers:
        if layer.precision not in (four_bit, SIXTEEN_BIT.name):
            raise ManifestError(
                f"layers: {layer.name} is in {layer.precision}, but a layer in 4-bit of the format "
                f"{manifest.format.name} is in {four_bit}; make the manifest again with qprobe select."
            )


def _check_bytes(manifest: Manifest) -> None:
    for layer in manifest.layers:
        weights = prod(layer.shape)
        # Tied weights are counted elsewhere and have 0 bytes here; transformers keeps some in float32.
        if not layer.is_four_bit and layer.bytes not in (0, 2 * weights, 4 * weights):
            raise ManifestError(
                f"layers: {layer.name} has {layer.bytes:,} bytes, but its {weights:,} weights take "
                f"{2 * weights:,} in 16-bit; the file was changed by hand or is damaged."
            )
        if layer.is_four_bit and layer.bytes < packed_bytes(layer.shape):
            raise ManifestError(
                f"layers: {layer.name} has {layer.bytes:,} bytes, but its {weights:,} weights take "
                f"at least {packed_bytes(layer.shape):,} in 4-bit; the file was changed by hand or is "
                "damaged."
            )
    budget = manifest.budget
    listed = sum(x.bytes for x in manifest.layers) + sum(x.bytes for x in manifest.uncovered)
    kept = sum(x.bytes for x in manifest.layers if not x.is_four_bit)
    if budget.total_bytes < listed:
        problem = (
            f"total_bytes {budget.total_bytes:,} is less than its layers and uncovered weights, {listed:,}"
        )
    elif budget.total_bytes > budget.limit_bytes:
        problem = f"total_bytes {budget.total_bytes:,} exceeds limit_bytes {budget.limit_bytes:,}"
    elif budget.standard_4bit_bytes > budget.limit_bytes:
        problem = (
            f"standard_4bit_bytes {budget.standard_4bit_bytes:,} exceeds limit_bytes {budget.limit_bytes:,}"
        )
    elif budget.total_bytes - budget.standard_4bit_bytes > kept:
        problem = (
            f"total_bytes {budget.total_bytes:,} exceeds standard_4bit_bytes {budget.standard_4bit_bytes:,} "
            f"by more than all its 16-bit layers take, {kept:,}"
        )
    else:
        return
    raise ManifestError(f"budget: {problem}; make the manifest again with qprobe select.")


def _check_compared(manifest: Manifest) -> None:
    chosen = [x for x in manifest.compared if x.chosen]
    if len(chosen) > 1:
        raise ManifestError(
            f"compared: {chosen[0].name} and {chosen[1].name} are both chosen; only one can be."
        )
    for one in chosen:
        if one.total_bytes != manifest.budget.total_bytes:
            raise ManifestError(
                f"compared: the chosen {one.name} has {one.total_bytes:,} bytes, but budget.total_bytes is "
                f"{manifest.budget.total_bytes:,}; the file was changed by hand or is damaged."
            )
