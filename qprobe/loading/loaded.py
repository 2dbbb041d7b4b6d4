"""A model that its user loaded, as the 16-bit reference: a second set of modules around the same weights.

The user's model itself is only read. What a scan does to a model (hooks, other forwards, another dtype for a
while) it does to the second set, so that nothing has to be put back, however the scan ends.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qprobe.errors import ModelError
from qprobe.loading.device import pick_device
from qprobe.loading.inventory import fingerprint
from qprobe.loading.processor import name_padding
from qprobe.loading.reference import Reference
from qprobe.loading.skeleton import Skeleton, meta_model
from qprobe.loading.source import Source, is_hub_id
from qprobe.loading.spread import devices_of
from qprobe.options import Dtype
from qprobe.records import ModelIdentity
from qprobe.system.devices import BEST, SPREAD, AskedDevice

PASS = "Pass a known name, a hub id, a folder, or a loaded transformers model with its processor."


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """What a user loaded. model: a transformers model; processor: its processor or tokenizer."""

    model: Any = field(repr=False)
    processor: Any = field(repr=False)

    @property
    def source(self) -> Source:
        """Its hub id and revision where transformers says that it came from there, else its class.

        A name of a local folder never enters it.
        """
        config = self.model.config
        name, commit = getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None)
        if commit is not None and is_hub_id(str(name)) and not Path(name).exists():
            return Source(name, name, commit)
        return Source(type(self.model).__name__, type(self.model).__name__)

    @property
    def dtype(self) -> Dtype:
        """The 16-bit dtype that it is measured in where none is asked for: its own, if that is one."""
        return "float16" if self.model.dtype == torch.float16 else "bfloat16"


def loaded_model(model: Any, processor: Any) -> LoadedModel:
    """`model` and `processor` as one value.

    Raises ModelError, in a sentence, for what is no transformers model with its 16-bit or 32-bit weights on
    one device, and for a processor that is none.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if hasattr(model, "merge_and_unload"):
        raise ModelError(
            f"The model is a {kind}, whose layers have adapters. Pass what its merge_and_unload() gives."
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"The model is a {kind}, which cannot be scanned. {PASS}")
    _check_weights(model)
    if processor is None:
        raise ModelError("A loaded model needs its processor, or its tokenizer. Pass processor= as well.")
    if not callable(processor):
        raise ModelError(
            f"The processor is a {type(processor).__name__}, which is none. Pass what AutoProcessor or "
            "AutoTokenizer loads."
        )
    return LoadedModel(model, processor)


def _check_weights(model: Any) -> None:
    weights = list(model.parameters())
    is_quantized = getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None)
    if is_quantized or any(p.itemsize < 2 or not p.is_floating_point() for p in weights):
        raise ModelError(
            "The model is quantized already, and a scan compares with its 16-bit weights. Load it without a "
            "quantization config, or pass the folder or the id of its 16-bit weights."
        )
    if any(p.is_meta for p in weights):
        has_map = bool(getattr(model, "hf_device_map", None))
        where = "is offloaded in part to the host or a disk" if has_map else "lies on the meta device"
        raise ModelError(
            f"The model {where}, so its weights are not there to be read. Load it onto one device, or pass "
            "its folder or id; max_memory then lets weights wait on the host."
        )
    devices = devices_of(model)
    if len(devices) > 1:
        raise ModelError(
            f"The model is spread over {', '.join(map(str, devices))}. Load it onto one device, or pass its "
            f"folder or id with device={SPREAD!r}."
        )


def loaded_skeleton(loaded: LoadedModel, dtype: str) -> Skeleton:
    """The skeleton of a loaded model, from its config.

    Raises ModelError if the model is not, or no longer, what its config builds.
    """
    config = copy.deepcopy(loaded.model.config)
    config.architectures = [type(loaded.model).__name__]
    config._attn_implementation = None  # as loading it for a scan would choose
    generation = copy.deepcopy(getattr(loaded.model, "generation_config", None))
    skeleton = Skeleton(loaded.source, config, dtype, generation=generation)
    _check_same(skeleton.model, loaded.model)
    return skeleton


def _check_same(built: nn.Module, model: nn.Module) -> None:
    """Raises ModelError, with the first difference, unless both have the same parameters, tied alike."""
    if type(built) is not type(model):
        raise ModelError(
            f"The model is a {type(model).__name__}, but its config builds a {type(built).__name__}, which "
            f"is what would be loaded in 4-bit. {PASS}"
        )
    wanted, found = _parameters(built), _parameters(model)
    advice = "Merge adapters and take back other changes, or save it and pass its folder."
    for name in (*wanted, *found):
        here = "has no" if name not in found else "has a" if name not in wanted else None
        if here is not None:
            raise ModelError(f"The model {here} parameter {name}, unlike what its config builds. {advice}")
        if wanted[name].shape != found[name].shape:
            raise ModelError(
                f"The model's {name} has the shape {tuple(found[name].shape)}, but its config builds "
                f"{tuple(wanted[name].shape)}. {advice}"
            )
    first: dict[int, str] = {}
    for name, parameter in wanted.items():
        other = first.setdefault(id(parameter), name)
        if other != name and found[name].data_ptr() != found[other].data_ptr():
            raise ModelError(
                f"The model's {name} and {other} are one weight by its config, but two here. Tie them with "
                "tie_weights(), or say tie_word_embeddings=False in its config."
            )


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def loaded_reference(
    loaded: LoadedModel, skeleton: Skeleton, device: AskedDevice = BEST, processor: Any = None
) -> Reference:
    """The reference of `skeleton` (from `loaded_skeleton`), which shares the weights of the loaded model.

    Those of another dtype than the skeleton's, or on another device, are copied; buffers always are.
    device: the best there is means the one that the model is on. processor: a copy of the user's, if made
    already.
    Raises MachineError for a device that is not here.
    """
    shell: Any = meta_model(skeleton.config, skeleton.dtype)
    place = next(loaded.model.parameters()).device if device.kind is None else pick_device(device)
    _share_parameters(shell, loaded.model, place)
    _copy_tensors(shell, loaded.model, place)
    if hasattr(loaded.model, "generation_config"):
        shell.generation_config = copy.deepcopy(loaded.model.generation_config)
    shell.eval().requires_grad_(False)
    source = skeleton.source
    identity = ModelIdentity(source.id, source.revision, type(shell).__name__, fingerprint(shell))
    own = processor or copy.deepcopy(loaded.processor)
    name_padding(shell, own)
    return Reference(shell, own, identity, skeleton)


def _share_parameters(shell: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Give `shell`, on the meta device, the weights of `model`; names that are tied stay tied."""
    theirs, empties = _parameters(model), _parameters(shell)
    made: dict[int, nn.Parameter] = {}
    for name, empty in empties.items():
        if id(empty) not in made:
            weight = theirs[name].detach().to(device, empty.dtype)
            made[id(empty)] = nn.Parameter(weight, requires_grad=False)
        module, leaf = _place(shell, name)
        module._parameters[leaf] = made[id(empty)]


def _copy_tensors(shell: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Give `shell` copies of the buffers of `model`, and of other tensors that its modules hold."""
    for name, empty in list(shell.named_buffers(remove_duplicate=False)):
        module, leaf = _place(shell, name)
        module._buffers[leaf] = _copied(model.get_buffer(name), empty, device)
    for path, leaf, empty in list(_plain_tensors(shell)):
        theirs = getattr(model.get_submodule(path), leaf)
        setattr(shell.get_submodule(path), leaf, _copied(theirs, empty, device))


def _copied(theirs: Tensor, empty: Tensor, device: torch.device) -> Tensor:
    return theirs.detach().clone().to(device, empty.dtype)


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(module, attribute, tensor) of those that are neither parameters nor buffers."""
    for path, module in model.named_modules():
        for leaf, value in vars(module).items():
            if isinstance(value, Tensor):
                yield path, leaf, value


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
