"""Finding and loading the 16-bit reference model, its processor and its identity."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import __version__ as transformers_version

from qprobe.errors import MachineError, ModelError
from qprobe.loading.config import catalogue_config
from qprobe.loading.inventory import fingerprint
from qprobe.loading.mapped import return_freed_memory
from qprobe.loading.spread import (
    check_layout,
    devices_of,
    free_bytes,
    is_too_large,
    needed_bytes,
    room_for_weights,
)
from qprobe.models.catalogue import entries, find, nearest
from qprobe.models.entry import Entry
from qprobe.records import ModelIdentity
from qprobe.system.wording import counted

SPREAD = "auto"  # the device that is every GPU there is
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_FOR_EXAMPLE = ("demo", "llama-3.2-11b-vision", "qwen2.5-vl-7b")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `location` is a folder or a hub id, `id` what we call it."""

    id: str
    location: str
    revision: str | None = None


@dataclass(frozen=True)
class Reference:
    """A loaded 16-bit model in eval mode with frozen parameters, and what belongs to it.

    processor: a processor for image + text models, a tokenizer for text models, None where neither exists.
    target: the device that it runs on, where its weights do not all lie there; None where they do.
    """

    model: Any  # transformers.PreTrainedModel
    processor: Any
    identity: ModelIdentity
    source: Source
    target: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.target or next(self.model.parameters()).device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that it runs on: several where it is spread over GPUs."""
        return (self.target,) if self.target else devices_of(self.model)


def resolve(model: str) -> Source:
    """The source behind a catalogue alias, a local folder or a hub id.

    Raises ModelError if it is none of them, or an alias and the name of a checkpoint's folder here.
    """
    if not model.strip():
        raise ModelError("The model is an empty name. Pass a folder, a hub id (owner/name) or a known name.")
    folder = Path(model).expanduser()
    entry = find(model)
    if _is_checkpoint(folder) and entry is not None and entry.alias == model.lower():
        elsewhere = f"pass {entry.hub_id}" if entry.hub_id else "run the command from another folder"
        raise ModelError(
            f"{model!r} is both a model that qprobe knows and a folder with a model here. Pass ./{model} for "
            f"the folder; for the known model {elsewhere}."
        )
    if folder.is_dir() and (entry is None or _is_checkpoint(folder)):
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"Folder {model} holds no config.json, so it is no model. Pass the checkpoint's folder."
            )
        return Source(folder.resolve().name, str(folder))
    if entry is not None and entry.hub_id is None:
        from qprobe.demo import demo_folder, outliers_folder

        embedded = {"demo": demo_folder, "demo-outliers": outliers_folder}
        return Source(entry.alias, str(embedded[entry.alias]()))
    if entry is not None and entry.hub_id is not None:
        return Source(entry.hub_id, entry.hub_id)
    if _HUB_ID.fullmatch(model) and not model.startswith((".", "/")):
        return Source(model, model)
    near = nearest(model)
    meant = f"Did you mean {', '.join(near)}?" if near else f"Some of them: {', '.join(_FOR_EXAMPLE)}."
    raise ModelError(
        f"No model {model!r}: it is no folder, no hub id (owner/name) and none of the {len(entries())} known "
        f"names. {meant} `qprobe models` lists what is known."
    )


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def at_revision(source: Source, revision: str | None) -> Source:
    """`source` at `revision`; unchanged where it is a folder, which has none."""
    return source if Path(source.location).is_dir() else replace(source, revision=revision)


def pick_device(device: str | None) -> torch.device:
    """`device`, or the first CUDA device, or the CPU. Raises MachineError if it cannot be used here."""
    if device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise MachineError(f"Device {device!r} is not a device name. Use cpu, cuda or cuda:1.") from error
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise MachineError(
            f"Device {device!r} is not here: {counted(count, 'CUDA device')} can be seen, numbered from 0. "
            f"Pass --device {'cuda:0 or ' if count else ''}cpu."
        )
    if picked.type not in ("cpu", "cuda"):
        raise MachineError(f"Device {device!r} is not supported. Use cpu or cuda.")
    return picked


def one_device(device: str | None) -> str | None:
    """`device` for what runs on one: the best there is in place of all GPUs."""
    return None if device == SPREAD else device


def load_reference(
    model: str,
    device: str | None = None,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    revision: str | None = None,
    on_host: bool = False,
) -> Reference:
    """The 16-bit model, processor and identity behind `model` (alias, folder or hub id).

    revision: commit, tag or branch on the hub; None for the newest; of no meaning for a folder.
    device: "auto" spreads it over all GPUs, as None does where the first one is too small.
    on_host: leave the weights on the CPU, in the files that are mapped there; else they go straight to the
    device. Only safetensors are read, no pickle and no remote code.
    Raises ModelError if it cannot be had, MachineError for a device that is not here and for too few GPUs.
    """
    source = at_revision(resolve(model), revision)
    place = pick_device(one_device(device))
    if on_host and place.type == "cpu":
        return_freed_memory()
    config = load_config(source)
    cls = model_class(config)
    with _explained(source):
        loaded = cls.from_pretrained(
            source.location,
            revision=source.revision or "main",
            dtype=DTYPES[dtype],
            **_layout(config, dtype, device, torch.device("cpu") if on_host else place),
            use_safetensors=True,
        )
        processor = load_processor(source)
    check_layout(getattr(loaded, "hf_device_map", {}) if place.type == "cuda" and not on_host else {})
    loaded.eval().requires_grad_(False)
    revision = source.revision or getattr(loaded.config, "_commit_hash", None)
    identity = ModelIdentity(source.id, revision, type(loaded).__name__, fingerprint(loaded))
    return Reference(loaded, processor, identity, source, place if on_host else None)


def _layout(config: Any, dtype: str, asked: str | None, place: torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained that say where the weights go: to `place`, or over all GPUs.

    asked: the device that the user named. Raises MachineError if all GPUs together are too few.
    """
    alone: dict[str, Any] = {"device_map": {"": place}}
    if asked not in (None, SPREAD) or place.type != "cuda" or torch.cuda.device_count() < 2:
        return alone
    needed, free = needed_bytes(meta_model(config, dtype)), free_bytes()
    if asked is None and not is_too_large(needed, free):
        return alone
    return {"device_map": "auto", "max_memory": room_for_weights(needed, free)}


def load_config(source: Source) -> Any:
    """The transformers config of `source`. Raises ModelError if it cannot be had."""
    from transformers import AutoConfig

    with _explained(source):
        # Said in full: left out, transformers would ask on the terminal whether to run the code.
        return AutoConfig.from_pretrained(
            source.location, revision=source.revision or "main", trust_remote_code=False
        )


def model_class(config: Any) -> Any:
    """The auto class that builds `config`: image + text to text, causal text, or a bare encoder."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    wanted = (getattr(config, "architectures", None) or [""])[0]
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        mapped: Any = auto._model_mapping.get(type(config), None)  # the public API has no lookup by config
        if mapped is not None and wanted in ("", mapped.__name__):
            return auto
    return AutoModel


def meta_model(config: Any, dtype: str) -> nn.Module:
    """The model of `config` without weights, on the meta device; dtypes as loading would give them."""
    with torch.device("meta"):
        built = model_class(config).from_config(config, dtype=DTYPES[dtype])
    # Loading keeps what a class names in float32; building from a config does not.
    for pattern, kept in built._get_dtype_plan(DTYPES[dtype]).items():
        for name, parameter in built.named_parameters():
            if re.search(pattern.replace("*", ".*"), name):
                parameter.data = parameter.data.to(kept)
    built.tie_weights()
    return built.eval()


def known(model: str) -> Entry | None:
    """The catalogue's entry for `model`; None for a folder, and for what the catalogue does not know."""
    return None if _is_checkpoint(Path(model).expanduser()) else find(model)


def outline(source: Source, dtype: str, entry: Entry | None = None) -> tuple[Any, nn.Module]:
    """(config, model without weights) of `source`.

    entry: the catalogue's, whose geometry, if it has one, takes the place of the config of `source`, so that
    no network is needed. Raises ModelError if the config cannot be had or builds nothing.
    """
    try:
        config = load_config(source) if entry is None or entry.geometry is None else catalogue_config(entry)
        return config, meta_model(config, dtype)
    except ModelError:
        raise
    except Exception as error:  # a config can be wrong in as many ways as there are model classes
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"Model {source.id!r} cannot be built from its config.json: {said.rstrip('.')}. "
            f"Check that this transformers knows its architecture and that the file is as published."
        ) from error


def load_processor(source: Source) -> Any:
    """The processor of `source`, its tokenizer if it has no processor, None if it has neither.

    Raises ModelError where the running transformers has it with torchvision only.
    """
    try:
        return _processor(source)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        raise ModelError(
            f"The processor of {source.id!r} needs torchvision with transformers {transformers_version}. "
            "Install it with `pip install torchvision`, or a newer transformers."
        ) from error


def _processor(source: Source) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    revision = source.revision or "main"
    try:
        return AutoProcessor.from_pretrained(source.location, revision=revision)
    except ImportError as error:
        if "VideoProcessor" not in str(error):
            raise
        return _without_video(source)
    except (OSError, ValueError, KeyError):
        pass
    try:
        return AutoTokenizer.from_pretrained(source.location, revision=revision)
    except (OSError, ValueError, KeyError):
        return None


def reads_images(reference: Reference) -> bool:
    """True if the model's processor takes images."""
    return hasattr(reference.processor, "image_processor")


def _without_video(source: Source) -> Any:
    """The processor of `source` without its video half, for machines without torchvision.

    Qwen2-VL's processor insists on a video processor, which needs torchvision; images alone do not.
    Can go when transformers ships a video processor on Pillow, as it does for images.
    """
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    full: Any = PROCESSOR_MAPPING[type(load_config(source))]

    def check(self: Any, name: str, argument: Any) -> Any:
        is_missing_video = argument is None and "video" in name
        return None if is_missing_video else full.check_argument_for_proper_class(self, name, argument)

    images_only = type(full.__name__, (full,), {"check_argument_for_proper_class": check})
    revision = source.revision or "main"
    tokenizer = AutoTokenizer.from_pretrained(source.location, revision=revision)
    images = AutoImageProcessor.from_pretrained(source.location, revision=revision)
    return images_only(images, tokenizer, None, chat_template=tokenizer.chat_template)


class _explained:
    """Turns what transformers raises for a model it cannot load into one sentence."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, ValueError, KeyError, ImportError)):
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            advice = _advice(self.source)
            raise ModelError(f"Model {self.source.id!r} cannot be loaded: {first} {advice}") from error


def _advice(source: Source) -> str:
    """What to do when the files of `source` cannot be had."""
    if Path(source.location).exists():
        return "Check that the folder is a complete transformers checkpoint with safetensors files."
    entry = find(source.location)
    if entry is None:
        return (
            "Check the name and the network; for a gated model accept its licence on the hub "
            "and run `hf auth login`, or pass a local folder."
        )
    licence = f"accept its licence at https://huggingface.co/{entry.hub_id}, run `hf auth login`, and "
    return (
        f"To have its weights, {licence if entry.is_gated else ''}check the network, or pass a local folder; "
        f"`qprobe plan --model {entry.alias}` needs neither."
    )
