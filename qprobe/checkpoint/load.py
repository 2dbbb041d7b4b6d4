"""Loading a model in 4-bit with chosen layers in 16-bit, checked before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qprobe.checkpoint.codes import keep_codes_as_stored, put_calibrated
from qprobe.checkpoint.experts import four_bit
from qprobe.checkpoint.experts.packed import load_packed
from qprobe.checkpoint.hub import MANIFEST_FILE, fetched, manifest_in
from qprobe.checkpoint.matching import skip_keys
from qprobe.checkpoint.ready import ready_for_training
from qprobe.checkpoint.starts.attached import AskedAdapter, check_asked, with_adapter
from qprobe.checkpoint.starts.held import hold
from qprobe.checkpoint.trial.watch import prove_read
from qprobe.checkpoint.verify import ExpectedLayer, expected_layer, expected_layers, verify, verify_layers
from qprobe.errors import ManifestError, ModelError, QprobeError, VerificationError
from qprobe.formats.codes_file import checked
from qprobe.loading.device import pick_device
from qprobe.loading.inventory import refuse_rewriting
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.pretrained import check_files, load_pretrained, refuse_quantized
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import Skeleton, skeleton_of
from qprobe.loading.source import Source, at_revision, resolve
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest
from qprobe.options import DEFAULT_ADAPT, Start, path_of
from qprobe.records import FormatSpec
from qprobe.registry.precisions import SIXTEEN_BIT, measurable
from qprobe.system.devices import AskedDevice, parse_device
from qprobe.system.wording import counted, is_or_are

LOADER = "bitsandbytes"  # what `_load` has transformers convert linears with
BLOCKSIZE = 64  # transformers' BitsAndBytesConfig has no field for it; bitsandbytes defaults to 64


@quiet_models()
def load_dynamic_4bit(
    manifest: Manifest | str | Path,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    folder: str | Path | None = None,
    for_training: bool = False,
    start: Start | None = None,
    rank: int = 16,
    adapt: str = DEFAULT_ADAPT,
    trust_remote_code: bool = False,
    allow_downloads: bool = False,
) -> tuple[Any, Any]:
    """(model, processor) as `manifest` describes them, verified, in eval mode and frozen.

    With `start` the model is a PeftModel, ready for training, with an adapter that any trainer takes as its
    own (pass that no peft_config).

    manifest: also a folder that `qprobe quantize` wrote, or its hub id; its weights, which are in 4-bit, are
    loaded then. allow_downloads: fetch what the hub's cache lacks of that.
    model: where the 16-bit weights are (alias, hub id or folder); None for the id the manifest names.
    device: "cpu", "cuda", ...; None for the best there is.
    dtype: "bfloat16" or "float16" for everything in 16-bit; None for the manifest's.
    folder: where the manifest lies, from which it names its calibrated weights; None for that of the file
    `manifest`, or the working directory.
    for_training: recompute blocks and ask for gradients where adapters need them, see `ready_for_training`.
    start: where an adapter begins, "zero" or at the correction of calibrated weights that
    `scan --keep-correction` left, "corrected"; None for no adapter. rank: of what is trained. The adapter
    holds a correction beside that, so that its rank, and its alpha, is the sum of both; gradients there are
    0, so that optimizers which work number by number (SGD, AdamW) leave it as it is, unless weights decay.
    adapt: where it goes, as of `lora_targets`.
    trust_remote_code: run Python code that the checkpoint brings, for models that exist only as such code; it
    can do on this machine whatever you can.
    Raises ManifestError if the manifest was written for another model, or its calibrated weights or their
    correction are missing, changed, or of other weights; VerificationError if what was loaded is not what the
    manifest lists, or one forward of a small sample fails or reads a 4-bit weight without its layer.
    """
    place = parse_device(device)
    packed = None
    if isinstance(manifest, Manifest):
        written, beside = manifest, Path(folder or ".")
    else:
        given = fetched(path_of(manifest), allow_downloads)
        packed = given if (given / "config.json").is_file() else None
        path = manifest_in(given)
        written, beside = read_manifest(path), path.parent
    asked = None if start is None else AskedAdapter(start, rank, adapt)
    if asked is None and (rank, adapt) != (AskedAdapter.rank, AskedAdapter.adapt):
        raise QprobeError(
            "rank and adapt describe an adapter, and without a start the model gets none. Pass start='zero' "
            "or start='corrected' as well, or leave them out."
        )
    if asked is not None:
        check_asked(asked, written, beside)
    if packed is None:
        skeleton = check_model(written, model, trust_remote_code)
        loaded, processor = proven_4bit(written, beside, skeleton, place, dtype)
    else:
        loaded, processor = _packed(packed, written, model, place, dtype)
    if asked is not None:
        tuned, _ = with_adapter(ready_for_training(loaded), asked, written, beside)
        if asked.start == "corrected":
            hold(tuned, slice(asked.rank, None))
        return tuned, processor
    return (ready_for_training(loaded) if for_training else loaded), processor


def proven_4bit(
    manifest: Manifest, folder: str | Path | None, skeleton: Skeleton, device: AskedDevice, dtype: str | None
) -> tuple[Any, Any]:
    """(model, processor) as `load_dynamic_4bit` gives them, of the checked `skeleton`."""
    wanted = replace(manifest, format=with_dtype(manifest.format, dtype))
    loaded = dynamic_4bit(wanted, skeleton, device, codes_of(manifest, folder))
    processor = load_processor(skeleton.source)
    prove_read(loaded, processor)
    return loaded, processor


def _packed(
    folder: Path, manifest: Manifest, model: str | None, device: AskedDevice, dtype: str | None
) -> tuple[Any, Any]:
    """(model, processor) of the checkpoint that `qprobe quantize` wrote into `folder`, proven."""
    if model is not None or with_dtype(manifest.format, dtype) != manifest.format:
        raise QprobeError(
            f"{folder} holds weights in 4-bit, beside others in {manifest.format.compute_dtype}, so it is "
            f"loaded as it is. Leave model and dtype out, or pass {folder / MANIFEST_FILE} to load 16-bit "
            "weights."
        )
    _check_loads(manifest.format)
    skeleton = skeleton_of(resolve(str(folder)), manifest.format.compute_dtype)
    refuse_another_model(manifest, skeleton)
    loaded = packed_4bit(skeleton, manifest, device)
    verify(loaded, manifest)
    processor = load_processor(skeleton.source)
    prove_read(loaded, processor)
    return loaded, processor


def packed_4bit(skeleton: Skeleton, manifest: Manifest, device: AskedDevice) -> Any:
    """The 4-bit checkpoint of `skeleton`, which holds what `manifest` lists, in eval mode and frozen.

    Raises ModelError for tensors that its files lack.
    """
    experts = [x.name for x in manifest.layers if x.is_four_bit and x.is_experts]
    return _finished(skeleton, load_packed(skeleton, experts, pick_device(device)))


def dynamic_4bit(manifest: Manifest, skeleton: Skeleton, device: AskedDevice, codes: Path | None) -> Any:
    """The model as `manifest` describes it, verified, in eval mode and frozen.

    skeleton: of the manifest's model, in any 16-bit dtype; codes: the calibrated weights, if there are.
    Errors as of `load_dynamic_4bit`.
    """
    expected = expected_layers(manifest)
    _check_names(skeleton.model, expected)
    loaded = _load(skeleton, manifest.format, expected, device)
    if codes is not None:
        put_calibrated(loaded, codes, expected)
    verify(loaded, manifest)
    return loaded


@quiet_models()
def load_standard_4bit(
    model: str,
    format: FormatSpec | None = None,
    device: str | None = None,
    revision: str | None = None,
    codes: Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(model, processor) in standard 4-bit: only the layers that can never be quantized stay in 16-bit.

    model: alias, hub id or folder; format: None for NF4 with double quantization in bf16.
    revision: on the hub; None for the newest. codes: a file of calibrated weights to put in place.
    trust_remote_code: as of `load_dynamic_4bit`.
    Raises VerificationError if what was loaded is something else.
    """
    spec, place = format or FormatSpec(), parse_device(device)
    source = at_revision(resolve(model, trust_remote_code), revision)
    skeleton = skeleton_of(source, spec.compute_dtype)
    return standard_4bit(skeleton, spec, place, codes), load_processor(skeleton.source)


def standard_4bit(skeleton: Skeleton, spec: FormatSpec, device: AskedDevice, codes: Path | None) -> Any:
    """The model of `skeleton`, in the dtype of `spec`, as `load_standard_4bit` gives it, and its errors."""
    _check_loads(spec)
    inventory = skeleton.inventory(spec)
    expected = [
        expected_layer(x.name, x.shape, SIXTEEN_BIT.name, x.bytes_16bit)
        if x.fixed
        else expected_layer(x.name, x.shape, spec.four_bit_name, x.bytes_4bit)
        for x in inventory.layers
    ]
    loaded = _load(skeleton, spec, expected, device)
    if codes is not None:
        put_calibrated(loaded, codes, expected)
    verify_layers(loaded, expected, inventory.uncovered, spec)
    return loaded


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


def _check_loads(spec: FormatSpec) -> None:
    """Raises ManifestError for a format in which transformers cannot load a model."""
    if spec.precision.loader != LOADER:
        raise ManifestError(
            f"A model with layers in {spec.name} cannot be loaded: {LOADER} has no such layers. Scan in "
            f"{' or '.join(x.name for x in measurable() if x.loader == LOADER)}."
        )
    if spec.blocksize != BLOCKSIZE:
        raise ManifestError(
            f"Blocks of {spec.blocksize} weights are wanted, but transformers loads bitsandbytes layers in "
            f"blocks of {BLOCKSIZE} only. Scan with that blocksize."
        )


def check_model(manifest: Manifest, model: str | None, trusts_code: bool = False) -> Skeleton:
    """The skeleton of the model that `manifest` was written for, in its 16-bit dtype.

    model: where its weights are; None for the id that the manifest names. trusts_code: see `Source`. Raises
    ModelError if it is
    not found or its files are incomplete, ManifestError, with both fingerprints, if it is another model.
    """
    _check_loads(manifest.format)
    skeleton = skeleton_of(source_of(manifest, model, trusts_code), manifest.format.compute_dtype)
    refuse_quantized(skeleton)
    refuse_another_model(manifest, skeleton)
    refuse_rewriting(skeleton.model)
    check_files(skeleton)
    return skeleton


def refuse_another_model(manifest: Manifest, skeleton: Skeleton) -> None:
    """Raises ManifestError, with both fingerprints, if `manifest` was written for another model."""
    found = skeleton.fingerprint
    if found != manifest.model.fingerprint:
        raise ManifestError(
            f"The manifest was written for {manifest.model.id} ({manifest.model.architecture}, fingerprint "
            f"{manifest.model.fingerprint[:16]}), but {skeleton.source.id} is a {skeleton.architecture} with "
            f"fingerprint {found[:16]}. Pass the model that was scanned, or scan this one."
        )


def source_of(manifest: Manifest, model: str | None, trusts_code: bool = False) -> Source:
    """Where the weights are: `model`, else the id and revision that the manifest names."""
    if model is not None:
        source = resolve(model, trusts_code)
    else:
        try:
            source = resolve(manifest.model.id, trusts_code)
        except ModelError as error:
            raise ModelError(
                f"The manifest names the model {manifest.model.id!r}, which is no known name and no hub id. "
                f"Pass model=, or --model, with the folder of its 16-bit weights."
            ) from error
    if source.id == manifest.model.id and source.revision is None and not Path(source.location).is_dir():
        return replace(source, revision=manifest.model.revision)
    return source


def _check_names(model: nn.Module, expected: Sequence[ExpectedLayer]) -> None:
    """Raises VerificationError for names that the model does not have, before gigabytes are read."""
    there = {*dict(model.named_modules()), *dict(model.named_parameters())}
    missing = [p.name for p in expected if p.name not in there]
    if missing:
        raise VerificationError(
            f"{len(missing)} of {counted(len(expected), 'layer')} of the manifest {is_or_are(len(missing))} "
            f"not in the model, first {', '.join(missing[:3])}. Names change between transformers versions; "
            f"scan again with this one."
        )


def _load(
    skeleton: Skeleton, spec: FormatSpec, expected: Sequence[ExpectedLayer], device: AskedDevice
) -> Any:
    """The model with the expected layers in 4-bit, eval mode, frozen; ties are checked, layers not yet."""
    dtype = getattr(torch, spec.compute_dtype)
    config, place = _quantization(skeleton, spec, expected), pick_device(device)
    model = load_pretrained(skeleton, dtype=dtype, device_map={"": place}, quantization_config=config)
    return _finished(skeleton, model)


def _quantization(skeleton: Skeleton, spec: FormatSpec, expected: Sequence[ExpectedLayer]) -> Any:
    """The config with which transformers puts exactly the expected layers in 4-bit."""
    options = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": spec.quant_type,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": getattr(torch, spec.compute_dtype),
        "llm_int8_skip_modules": skip_keys(
            skeleton.model, [p.name for p in expected if p.is_four_bit and not p.is_experts]
        ),
    }
    if any(p.is_experts for p in expected):
        from qprobe.checkpoint.experts import quantizer

        config: Any = quantizer.ExpertsConfig  # the decorator that registers it hides its type
        return config([p.name for p in expected if p.is_four_bit and p.is_experts], **options)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def _finished(skeleton: Skeleton, model: Any) -> Any:
    """`model` in eval mode and frozen; raises VerificationError if its ties are not those of `skeleton`."""
    if model.quantization_method == four_bit.METHOD:
        four_bit.as_bitsandbytes(model)
    keep_codes_as_stored(model)
    model.eval().requires_grad_(False)
    _check_ties(skeleton.model, model)
    return model


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
