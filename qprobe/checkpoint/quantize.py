"""`qprobe quantize`: the model of a manifest as a checkpoint that transformers loads by itself."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qprobe.checkpoint.auditing.audit import audit_files
from qprobe.checkpoint.auditing.loaded import loaded_problems
from qprobe.checkpoint.card import model_card
from qprobe.checkpoint.experts.four_bit import four_bit_experts
from qprobe.checkpoint.hub import MANIFEST_FILE, push, refuse_to_push
from qprobe.checkpoint.load import check_model, codes_of, dynamic_4bit, with_dtype
from qprobe.checkpoint.matching import check_keys
from qprobe.checkpoint.new_folder import alone_at, new_folder, refuse_to_overwrite
from qprobe.checkpoint.storage import stored_bytes
from qprobe.errors import ModelError, VerificationError
from qprobe.exports.config_format import refused_by_others
from qprobe.exports.export import config_entries
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.source import Source, known, resolve
from qprobe.loading.stored import checkpoint_folder, weight_names
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest, moved, unmeasured
from qprobe.manifest.write import write_manifest
from qprobe.models.headers import read_headers
from qprobe.options import KeptExperts, Progress, no_progress
from qprobe.records import FormatSpec
from qprobe.registry.precisions import SIXTEEN_BIT, sixteen_bit_bytes
from qprobe.system.devices import AskedDevice, parse_device

# A shard of a model on a GPU passes through the memory of the host at once, so it must be small beside it.
MAX_SHARD = "2GB"


@dataclass(frozen=True)
class Quantized:
    """A checkpoint that was written. files: name -> bytes; pushed: the address of the commit on the hub, None
    where it was not asked for; the rest as in `StoredBytes`.
    """

    out: Path
    layers_4bit: int
    layers_16bit: int
    parameter_bytes: int
    total_bytes: int
    files: dict[str, int]
    pushed: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of `quantize --json`."""
        return {**asdict(self), "out": str(self.out)}


@quiet_models()
def quantize(
    manifest: Manifest | str | Path,
    out: Path | str,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    folder: Path | str | None = None,
    trust_remote_code: bool = False,
    experts: KeptExperts | None = None,
    for_tool: str | None = None,
    push_to_hub: str | None = None,
    progress: Progress = no_progress,
) -> Quantized:
    """Writes the model that `manifest` describes into the new folder `out`; `from_pretrained` loads it alone.

    The weights are read one by one and kept in 4-bit. On a GPU the peak is the 4-bit model; in host memory
    transformers reads ahead, on a fast disk most of the 16-bit model. The folder has its name only once it is
    complete, audited, loaded as a user loads it, and run on a small sample; what a killed run leaves beside
    it, a hidden `.NAME.*.tmp`, the next one removes.
    With experts in 4-bit the folder is one that `load_dynamic_4bit` alone loads, and others refuse;
    experts="16-bit" keeps them all in 16-bit instead.
    for_tool: "vllm" for a config whose list has vLLM's names of the layers as well, as `qprobe export --to
    vllm` writes it; every transformers ignores them.
    push_to_hub: owner/name, to which the whole folder is uploaded as well once it is written; made private
    where it is new.
    Arguments and errors as of `load_dynamic_4bit`; ModelError if `out` is there already and not empty,
    cannot be written, or another process writes it; ManifestError if no list of entries means the same to
    every transformers 5.
    """
    target, asked = Path(out), parse_device(device)
    refuse_to_overwrite(target)
    if push_to_hub is not None:
        refuse_to_push(push_to_hub)
    with alone_at(target):
        given = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
        given = given if experts is None else _with_experts_kept(given)
        origin = Path(folder or ".") if isinstance(manifest, Manifest) else Path(manifest).parent
        skeleton = check_model(given, model, trust_remote_code)
        made_from = _made_from(given, model, skeleton.source)
        job = _Job(_computing_in(given, dtype, skeleton), origin, skeleton, asked, made_from, for_tool)
        done = _quantize(job, target, progress)
    return done if push_to_hub is None else replace(done, pushed=push(target, push_to_hub))


@dataclass(frozen=True)
class _Job:
    """What is quantized: `skeleton` as `manifest` lists it. folder: where the manifest's codes lie, if it has
    some. made_from: see `_made_from`. for_tool: see `config_entries`.
    """

    manifest: Manifest
    folder: Path
    skeleton: Skeleton
    device: AskedDevice
    made_from: str | None
    for_tool: str | None


def _quantize(job: _Job, target: Path, progress: Progress) -> Quantized:
    """What was written into `target`, which no other process writes."""
    manifest, skeleton = job.manifest, job.skeleton
    four_bit = [x for x in manifest.layers if x.is_four_bit]
    if not any(x.is_experts for x in four_bit):  # else only qprobe reads it
        refuse_rewritten(skeleton.model)
    entries = config_entries(manifest, job.for_tool)
    progress("load in 4-bit", 0, 3)
    refuse_nonfinite(skeleton, [x.name for x in four_bit])
    loaded = dynamic_4bit(manifest, skeleton, job.device, codes_of(manifest, job.folder))
    processor = load_processor(skeleton.source)
    check_keys(skeleton.model, entries, manifest)
    progress("write", 1, 3)
    with new_folder(target) as place:
        save_four_bit(loaded, processor, moved(manifest, job.folder, target), entries, place)
        card = model_card(manifest, skeleton.architecture, job.made_from)
        (place / "README.md").write_text(card, "utf-8")
        progress("audit", 2, 3)
        stored = stored_bytes(loaded)
        del loaded  # makes room for the one that is loaded from the files
        gc.collect()
        _check_written(job, place)
        files = {x.name: x.stat().st_size for x in sorted(place.iterdir())}
    progress("done", 3, 3)
    kept = len(manifest.skip_modules)
    return Quantized(target, len(four_bit), kept, stored.parameter_bytes, stored.total_bytes, files)


def _check_written(job: _Job, place: Path) -> None:
    """Raises VerificationError unless the files in `place` are, and load as, what the manifest lists."""
    copied = job.skeleton.of_copy(resolve(str(place), job.skeleton.source.trusts_code))
    found = audit_files(place, copied, job.manifest, job.folder)
    for problem in found.problems or loaded_problems(copied, found.layers, job.manifest, job.device):
        raise VerificationError(
            f"The checkpoint that was written is not what its manifest lists: {problem} "
            f"Nothing was kept; report this with the versions that `qprobe doctor` prints."
        )


def refuse_rewritten(model: nn.Module) -> None:
    """Raises ModelError if transformers puts other modules in place of some when it reads a 4-bit checkpoint.

    What was measured and saved is then not what is loaded, as of Llama 4, whose experts it takes apart.
    """
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as REWRITTEN
    from transformers.utils.quantization_config import QuantizationMethod

    for name, module in model.named_modules():
        entry = REWRITTEN.get(type(module).__name__)
        if entry is not None and QuantizationMethod.BITS_AND_BYTES in entry["quantization_methods"]:
            raise ModelError(
                f"transformers puts a {entry['module_name'].__name__} in place of {name}, a "
                f"{type(module).__name__}, when it reads a 4-bit checkpoint, so it would not load what was "
                "measured. Load the model with load_dynamic_4bit instead."
            )


def refuse_nonfinite(skeleton: Skeleton, names: Iterable[str]) -> None:
    """Raises ModelError, naming it, for one of the linears `names` whose 16-bit weight has NaN or infinity.

    In 4-bit it would spoil its whole block, in silence.
    """
    folder = checkpoint_folder(skeleton.source)
    tensors = read_headers(folder)
    stored = weight_names(skeleton.model, skeleton.inventory(FormatSpec()), tensors)
    for name in names:
        tensor = stored.get(name)
        if tensor is None:  # stored with others, under another name
            continue
        with safe_open(folder / tensors[tensor].file, framework="pt") as file:
            if not bool(torch.isfinite(file.get_tensor(tensor)).all()):
                raise ModelError(
                    f"{tensor} in {skeleton.source.id!r} has NaN or infinity, which 4-bit cannot hold. "
                    "Repair the checkpoint, or keep this layer in 16-bit."
                )


def _save(loaded: Any, place: Path) -> None:
    """`loaded` into the folder `place`, which says that other loaders must not read it if they cannot.

    Experts in 4-bit keep the names of the parameters that hold them: files of 16-bit ones, which transformers
    would write, hold many tensors for each, and packed codes cannot be cut.
    """
    experts = four_bit_experts(loaded)
    loaded.save_pretrained(place, max_shard_size=MAX_SHARD, save_original_format=not experts)
    if experts:
        path = place / "config.json"
        config = json.loads(path.read_text("utf-8"))
        found = config["quantization_config"]
        found["bnb_4bit_compute_dtype"] = refused_by_others(found["bnb_4bit_compute_dtype"])
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def save_four_bit(model: Any, processor: Any, manifest: Manifest, entries: list[str], folder: Path) -> None:
    """`model`, which is as `manifest` lists it, into `folder` with its processor and `manifest`.

    entries: the skip-list of its config.
    """
    model.config.quantization_config.llm_int8_skip_modules = entries
    _save(model, folder)
    save_processor(processor, folder)
    write_manifest(folder / MANIFEST_FILE, manifest)


def _computing_in(manifest: Manifest, dtype: str | None, skeleton: Skeleton) -> Manifest:
    """`manifest` with another 16-bit type, and then without what was measured in its own.

    skeleton: of its model, which in another type has another fingerprint.
    """
    spec = with_dtype(manifest.format, dtype)
    if spec == manifest.format:
        return manifest
    model = replace(manifest.model, fingerprint=skeleton.in_dtype(spec.compute_dtype).fingerprint)
    return replace(unmeasured(manifest), format=spec, model=model)


def _with_experts_kept(manifest: Manifest) -> Manifest:
    """`manifest` with all experts in 16-bit, and without what was measured with others in 4-bit."""
    layers = tuple(
        replace(x, precision=SIXTEEN_BIT.name, bytes=sixteen_bit_bytes(x.shape), reason="as asked")
        if x.is_experts and x.is_four_bit
        else x
        for x in manifest.layers
    )
    if layers == manifest.layers:
        return manifest
    more = sum(x.bytes for x in layers) - sum(x.bytes for x in manifest.layers)
    total = manifest.budget.total_bytes + more
    return replace(
        unmeasured(manifest),
        format=replace(manifest.format, experts="16-bit"),
        budget=replace(
            manifest.budget, total_bytes=total, limit_bytes=max(total, manifest.budget.limit_bytes)
        ),
        layers=layers,
        skip_modules=tuple(x.name for x in layers if not x.is_four_bit),
    )


def _made_from(manifest: Manifest, model: str | None, source: Source) -> str | None:
    """The name of the weights behind `model` where they need not be those that were measured, else None.

    A manifest knows the model by its name and shapes. A name on the hub is the same weights; what lies in a
    folder may be a fine-tuned copy.
    """
    is_users_folder = Path(source.location).is_dir() and known(model or manifest.model.id) is None
    return source.id if source.id != manifest.model.id or is_users_folder else None


def save_processor(processor: Any, folder: Path) -> None:
    """`processor`, a tokenizer or None, into `folder`, as transformers reads it again.

    One that lacks a part, as Qwen2-VL's lacks its video half on a machine without torchvision, cannot be
    saved whole; its parts then lie in the folder as they do in checkpoints on the hub, and its own arguments
    in processor_config.json.
    """
    if processor is None:
        return
    names = processor.get_attributes() if hasattr(processor, "get_attributes") else ()
    parts = [getattr(processor, name, None) for name in names]
    if None not in parts:
        processor.save_pretrained(folder)
        return
    if processor.chat_template:
        (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
    for part in parts:
        if part is not None:
            part.save_pretrained(folder)
    own = {key: value for key, value in processor.to_dict().items() if key not in names}
    (folder / "processor_config.json").write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
