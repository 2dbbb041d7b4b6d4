"""Loading a model in 4-bit with chosen layers in 16-bit, checked before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qprobe.checkpoint.codes import put_calibrated
from qprobe.checkpoint.matching import skip_keys
from qprobe.checkpoint.ready import ready_for_training
from qprobe.checkpoint.verify import ExpectedLayer, expected_layer, expected_layers, verify, verify_layers
from qprobe.errors import ManifestError, ModelError, QprobeError, VerificationError
from qprobe.formats.codes_file import checked
from qprobe.loading.inventory import fingerprint, list_layers
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.reference import (
    Source,
    at_revision,
    load_processor,
    model_class,
    outline,
    pick_device,
    resolve,
)
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest
from qprobe.models.entry import Entry
from qprobe.records import FormatSpec
from qprobe.system.wording import counted, is_or_are

BLOCKSIZE = 64  # transformers' BitsAndBytesConfig has no field for it; bitsandbytes defaults to 64


@dataclass(frozen=True)
class Blueprint:
    """A model to be loaded: where from, its weightless twin in 16-bit, and how 4-bit is stored."""

    source: Source
    config: Any  # transformers.PreTrainedConfig
    skeleton: nn.Module
    format: FormatSpec


@quiet_models()
def load_dynamic_4bit(
    manifest: Manifest | str | Path,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    folder: str | Path | None = None,
    for_training: bool = False,
) -> tuple[Any, Any]:
    """(model, processor) as `manifest` describes them, verified, in eval mode and frozen.

    model: where the 16-bit weights are (alias, hub id or folder); None for the id the manifest names.
    device: "cpu", "cuda", ...; None for the best there is.
    dtype: "bfloat16" or "float16" for everything in 16-bit; None for the manifest's.
    folder: where the manifest lies, from which it names its calibrated weights; None for that of the file
    `manifest`, or the working directory.
    for_training: recompute blocks and ask for gradients where adapters need them, see `ready_for_training`.
    Raises ManifestError if the manifest was written for another model, or its calibrated weights are missing,
    changed, or of other weights; VerificationError if what was loaded is not what the manifest lists.
    """
    written = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    source = check_model(written, model).source
    wanted = replace(written, format=with_dtype(written.format, dtype))
    codes = codes_of(written, folder if isinstance(manifest, Manifest) else Path(manifest).parent)
    blueprint = draw(source, wanted.format)
    expected = expected_layers(wanted)
    _check_names(blueprint.skeleton, expected)
    loaded = _load(blueprint, expected, device)
    if codes is not None:
        put_calibrated(loaded, codes, expected)
    verify(loaded, wanted)
    return (ready_for_training(loaded) if for_training else loaded), load_processor(source)


@quiet_models()
def load_standard_4bit(
    model: str,
    format: FormatSpec | None = None,
    device: str | None = None,
    revision: str | None = None,
    codes: Path | None = None,
) -> tuple[Any, Any]:
    """(model, processor) in standard 4-bit: only the layers that can never be quantized stay in 16-bit.

    model: alias, hub id or folder; format: None for NF4 with double quantization in bf16.
    revision: on the hub; None for the newest. codes: a file of calibrated weights to put in place.
    Raises VerificationError if what was loaded is something else.
    """
    spec = format or FormatSpec()
    blueprint = draw(at_revision(resolve(model), revision), spec)
    inventory = list_layers(blueprint.skeleton, spec)
    expected = [
        expected_layer(x.name, x.shape, "bf16", x.bytes_16bit)
        if x.fixed
        else expected_layer(x.name, x.shape, "nf4", x.bytes_4bit)
        for x in inventory.layers
    ]
    loaded = _load(blueprint, expected, device)
    if codes is not None:
        put_calibrated(loaded, codes, expected)
    verify_layers(loaded, expected, inventory.uncovered, spec)
    return loaded, load_processor(blueprint.source)


def codes_of(manifest: Manifest, folder: str | Path | None) -> Path | None:
    """The file of calibrated weights that `manifest`, lying in `folder`, names; None if it names none.

    Raises ManifestError if it is missing or changed.
    """
    return None if manifest.codes is None else checked(manifest.codes, Path(folder or "."))


def with_dtype(spec: FormatSpec, dtype: str | None) -> FormatSpec:
    """`spec` with everything in 16-bit in `dtype`; unchanged for None. Raises QprobeError for another."""
    if dtype is None:
        return spec
    if dtype != "bfloat16" and dtype != "float16":
        raise QprobeError(
            f"dtype {dtype!r} is no 16-bit dtype. Use bfloat16, or float16 on cards without it."
        )
    return replace(spec, compute_dtype=dtype)


def draw(source: Source, spec: FormatSpec, entry: Entry | None = None) -> Blueprint:
    """The blueprint of `source`, from its config alone. Raises ModelError if that cannot be had.

    entry: of the catalogue, to draw from its geometry where the weights are not wanted.
    """
    if spec.blocksize != BLOCKSIZE:
        raise ManifestError(
            f"Blocks of {spec.blocksize} weights are wanted, but transformers loads bitsandbytes layers in "
            f"blocks of {BLOCKSIZE} only. Scan with that blocksize."
        )
    config, skeleton = outline(source, spec.compute_dtype, entry)
    return Blueprint(source, config, skeleton, spec)


def check_model(manifest: Manifest, model: str | None) -> Blueprint:
    """The blueprint of the model that `manifest` was written for.

    model: where its weights are; None for the id that the manifest names. Raises ModelError if it is
    not found, ManifestError, with both fingerprints, if it is another model.
    """
    blueprint = draw(source_of(manifest, model), manifest.format)
    refuse_another_model(manifest, blueprint.skeleton, blueprint.source.id)
    return blueprint


def refuse_another_model(manifest: Manifest | None, skeleton: nn.Module, name: str) -> str:
    """The fingerprint of `skeleton`, the model called `name`, on the meta device.

    Raises ManifestError, with both fingerprints, if `manifest` was written for another model.
    """
    found = fingerprint(skeleton)
    if manifest is not None and found != manifest.model.fingerprint:
        raise ManifestError(
            f"The manifest was written for {manifest.model.id} ({manifest.model.architecture}, fingerprint "
            f"{manifest.model.fingerprint[:16]}), but {name} is a {type(skeleton).__name__} with "
            f"fingerprint {found[:16]}. Pass the model that was scanned, or scan this one."
        )
    return found


def source_of(manifest: Manifest, model: str | None) -> Source:
    """Where the weights are: `model`, else the id and revision that the manifest names."""
    if model is not None:
        source = resolve(model)
    else:
        try:
            source = resolve(manifest.model.id)
        except ModelError as error:
            raise ModelError(
                f"The manifest names the model {manifest.model.id!r}, which is no known name and no hub id. "
                f"Pass the folder of its 16-bit weights as the model."
            ) from error
    if source.id == manifest.model.id and source.revision is None and not Path(source.location).is_dir():
        return replace(source, revision=manifest.model.revision)
    return source


def _check_names(skeleton: nn.Module, expected: Sequence[ExpectedLayer]) -> None:
    """Raises VerificationError for names that the model does not have, before gigabytes are read."""
    missing = [p.name for p in expected if p.name not in dict(skeleton.named_modules())]
    if missing:
        raise VerificationError(
            f"{len(missing)} of {counted(len(expected), 'layer')} of the manifest {is_or_are(len(missing))} "
            f"not in the model, first {', '.join(missing[:3])}. Names change between transformers versions; "
            f"scan again with this one."
        )


def _load(blueprint: Blueprint, expected: Sequence[ExpectedLayer], device: str | None) -> Any:
    """The model with the expected layers in 4-bit, eval mode, frozen; ties are checked, layers not yet."""
    from transformers import BitsAndBytesConfig

    spec, source = blueprint.format, blueprint.source
    dtype = getattr(torch, spec.compute_dtype)
    four_bit = [p.name for p in expected if p.precision == "nf4"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant_type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip_keys(blueprint.skeleton, four_bit),
    )
    place = pick_device(device)
    try:
        model = model_class(blueprint.config).from_pretrained(
            source.location,
            revision=source.revision or "main",
            dtype=dtype,
            device_map={"": place},
            use_safetensors=True,
            quantization_config=quantization,
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"Model {source.id!r} cannot be loaded in 4-bit: {first} Check that it is a complete 16-bit "
            f"checkpoint with safetensors files."
        ) from error
    _keep_codes_as_stored(model)
    model.eval().requires_grad_(False)
    _check_ties(blueprint.skeleton, model)
    return model


def _keep_codes_as_stored(model: nn.Module) -> None:
    """Turns off bitsandbytes' repacking on CPUs with AVX512-BF16.

    On its first forward there a 4-bit layer rewrites its codes and rounds its block scales to bf16, so
    that the model no longer holds what was verified; layers whose in_features are no multiple of the
    blocksize, or whose out_features are none of 32, fail. Without it the layer dequantizes, as elsewhere.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_ties(skeleton: nn.Module, model: nn.Module) -> None:
    """Raises VerificationError unless the same parameters share storage in both models."""
    wanted, found = _tied(skeleton), _tied(model)
    for names in (*(wanted - found), *(found - wanted)):
        what = "no longer tied" if names in wanted else "tied, but must not be"
        raise VerificationError(
            f"{' and '.join(sorted(names))} are {what} after loading in 4-bit. "
            f"Report this with the versions that `qprobe doctor` prints."
        )


def _tied(model: nn.Module) -> frozenset[frozenset[str]]:
    """Groups of names that reach one parameter."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return frozenset(frozenset(group) for group in names.values() if len(group) > 1)
