"""An adapter as it lies in its folder: the layers it changes, by how much, and whether it does at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qprobe.checkpoint.adapters.record import RECORD, read_record
from qprobe.errors import RunError
from qprobe.loading.inventory import linear_modules
from qprobe.system.decoding import strict_json
from qprobe.system.foreign import check_foreign, read_foreign_if_there
from qprobe.system.wording import counted, is_or_are, named, shortened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 64 * 2**20  # a target_modules of every layer has about 60 bytes per layer
_MEGATRON = "megatron.core"  # what peft takes for the module that it imports
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")
_BEYOND = {  # peft 0.21, tuners/lora/config.py: what is more than a product B A for each linear layer
    "use_dora": "DoRA",
    "modules_to_save": "whole modules (modules_to_save)",
    "target_parameters": "parameters that are no linear layer, such as stacked experts (target_parameters)",
    "trainable_token_indices": "token embeddings (trainable_token_indices)",
    "layer_replication": "repeated layers (layer_replication)",
    "alora_invocation_tokens": "some tokens alone (alora_invocation_tokens)",
    "arrow_config": "a choice among adapters (arrow_config)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # how they begin: the base loses what they hold

Fit = Literal["fits", "zero", "not in the model", "another shape", "tied"]


@dataclass(frozen=True)
class Pair:
    """What LoRA adds to one linear: scaling * B A. a: (rank, in_features); b: (out_features, rank)."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it changes."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def is_zero(self) -> bool:
        """True if it changes nothing, as LoRA does before its first step."""
        return not (self.scaling and bool(self.a.any()) and bool(self.b.any()))

    def first(self, rank: int) -> Pair:
        """Its first `rank` rows of A and columns of B."""
        return Pair(self.a[:rank], self.b[:, :rank], self.scaling)

    def delta(self, device: torch.device) -> Tensor:
        """(out_features, in_features), float32: what it adds to the weight."""
        return self.scaling * (self.b.to(device).float() @ self.a.to(device).float())


@dataclass(frozen=True)
class Adapter:
    """A LoRA of linear layers. config: adapter_config.json; layers: by module name.

    learned: how many rows of A and columns of B were trained; those behind them hold a correction of the
    base's 4-bit weights (`qprobe.checkpoint.starts.held`). None where all were.
    """

    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    layers: Mapping[str, Pair] = field(repr=False)
    learned: int | None = None

    def on_16bit(self) -> Adapter:
        """What it adds to 16-bit weights, from which nothing is missing: no correction."""
        if self.learned is None:
            return self
        return replace(self, layers={n: x.first(self.learned) for n, x in self.layers.items()}, learned=None)

    def fits(self, model: nn.Module) -> dict[str, Fit]:
        """For each layer of the adapter whether it changes the 16-bit `model`, or why not."""
        linears = linear_modules(model)
        times = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        return {name: _fit(pair, linears.get(name), times) for name, pair in self.layers.items()}


def _fit(pair: Pair, module: nn.Linear | None, times: Mapping[int, int]) -> Fit:
    if module is None:
        return "not in the model"
    if tuple(module.weight.shape) != pair.shape:
        return "another shape"
    if times[id(module.weight)] > 1:
        return "tied"
    return "zero" if pair.is_zero else "fits"


def check_adapter(folder: Path) -> None:
    """Raises RunError where peft would take more of the adapter in `folder` than numbers."""
    _config(folder)
    check_foreign(folder / WEIGHTS, RunError, "Copy the adapter again; pickles are not read.", None)


def read_adapter(folder: Path) -> Adapter:
    """The adapter that peft or `qprobe finetune` wrote to `folder`.

    Raises RunError if there is none, or it is more than B A for each linear layer, or moved its base too, or
    files and config disagree, or it holds NaN or infinity.
    """
    config = _config(folder)
    _refuse_beyond(folder, config)
    layers = dict(_pairs(folder, config, _tensors(folder)))
    _refuse_nonfinite(folder, layers)
    return Adapter(folder, config, layers, _learned(folder))


def _refuse_nonfinite(folder: Path, layers: Mapping[str, Pair]) -> None:
    broken = [
        n for n, x in layers.items() if not all(bool(torch.isfinite(half).all()) for half in (x.a, x.b))
    ]
    if broken:
        raise RunError(
            f"The adapter in {folder} has NaN or infinity in {len(broken)} of "
            f"{counted(len(layers), 'layer')}: {named(broken)}, as where a training diverged. Pass one from "
            "before that, or train again with a lower learning rate."
        )


def _learned(folder: Path) -> int | None:
    record = read_record(folder)
    if record is None or record.spec.get("start") != "corrected":
        return None
    rank = record.spec.get("rank")
    if not isinstance(rank, int) or rank < 1:
        raise RunError(f"{folder / RECORD} says rank {rank!r}. Remove the folder and train again.")
    return rank


def _config(folder: Path) -> dict[str, Any]:
    fix = "Copy the adapter again."
    data = (
        read_foreign_if_there(folder / CONFIG, RunError, fix, MAX_CONFIG_BYTES) if folder.is_dir() else None
    )
    if data is None:
        raise RunError(
            f"{folder} holds no adapter: there is no {CONFIG}. Pass the --out of qprobe finetune, or a "
            "folder that peft wrote."
        )
    try:
        config = strict_json(data)
    except ValueError as error:
        raise RunError(f"{folder / CONFIG} is damaged ({error}). {fix}") from None
    if not isinstance(config, dict):
        raise RunError(f"{folder / CONFIG} holds no JSON object. {fix}")
    module = config.get("megatron_core", _MEGATRON)
    if config.get("megatron_config") and module != _MEGATRON:
        raise RunError(
            f"{folder / CONFIG} names the Python module {shortened(repr(module), 80)} (megatron_core), which "
            "would be imported, and so run. Take megatron_core and megatron_config out."
        )
    return config


def _refuse_beyond(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RunError(f"The adapter in {folder} is {kind!r}; only LoRA can be read. Train a LoRA adapter.")
    beyond = [what for key, what in _BEYOND.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append("biases (bias)")
    if beyond:
        raise RunError(
            f"The adapter in {folder} is more than a product for each linear layer: {', '.join(beyond)}. "
            "Merge it with peft (merge_and_unload), or train without."
        )
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(_MOVES_BASE):
        raise RunError(
            f"The adapter in {folder} began as {begun} (init_lora_weights), which takes from the base's "
            "weights what it gives to the adapter, so it belongs to other weights than its base's. Save it "
            "with peft's save_pretrained(path_initial_model_for_weight_conversion=...), or merge it with "
            "merge_and_unload."
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    check_foreign(path, RunError, "Copy the adapter again; pickles are not read.", None)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}). Copy the adapter again.") from None


def _pairs(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Pair]]:
    """(layer, what is added to it) in the order of the file."""
    halves: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None or tensor.ndim != 2:
            strange.append(key)
        else:
            halves.setdefault(found["layer"], {})[found["half"]] = tensor
    strange += [f"{name} without its other half" for name, both in halves.items() if len(both) != 2]
    if strange or not halves:
        what = named(strange) if strange else "nothing"
        raise RunError(
            f"{folder / WEIGHTS} holds {what}, where pairs of lora_A and lora_B of linear layers belong. "
            "Train an adapter on linear layers alone."
        )
    for name, both in halves.items():
        rank = _of_pattern(config, "rank_pattern", "r", name)
        alpha = _of_pattern(config, "alpha_pattern", "lora_alpha", name)
        ranks = (both["A"].shape[0], both["B"].shape[1])
        if ranks != (rank, rank):
            raise RunError(
                f"The adapter of {name} in {folder} has rank {ranks[0]}"
                + (f" and {ranks[1]}" if ranks[0] != ranks[1] else "")
                + f", but {CONFIG} says {rank}. Put the two files together that belong together."
            )
        yield name, Pair(both["A"], both["B"], alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _of_pattern(config: Mapping[str, Any], patterns: str, key: str, name: str) -> float:
    """The rank or the alpha of a layer as peft reads it (0.21, utils/other.py, `get_pattern_key`)."""
    from peft.utils.other import get_pattern_key

    found = config.get(patterns) or {}
    value = found.get(get_pattern_key(list(found), name), config.get(key))
    if not isinstance(value, int | float) or value <= 0:
        raise RunError(f"{CONFIG} says {key} {value!r}, which is no number above 0. Copy the adapter again.")
    return value


def refuse_without_effect(adapter: Adapter, fits: Mapping[str, Fit], model_id: str) -> None:
    """Raises RunError, naming layers, unless every tensor of `adapter` reaches a layer and some change it."""
    lost = [name for name, fit in fits.items() if fit in ("not in the model", "another shape")]
    if lost:
        first = adapter.layers[lost[0]].shape
        why = (
            "are not in it"
            if fits[lost[0]] == "not in the model"
            else f"have another shape, not {list(first)}"
        )
        raise RunError(
            f"{len(lost)} of {counted(len(fits), 'layer')} of the adapter in {adapter.folder} would take no "
            f"effect on {model_id}: {named(lost)} {why}. Pass the model that it was trained on; names of "
            "layers also change between versions of transformers."
        )
    tied = [name for name, fit in fits.items() if fit == "tied"]
    if tied:
        raise RunError(
            f"The adapter in {adapter.folder} is on {named(tied)}, which {is_or_are(len(tied))} tied to the "
            "embedding, so merging would change that too. Untie them first, or train without them."
        )
    if all(fit == "zero" for fit in fits.values()):
        raise RunError(
            f"The adapter in {adapter.folder} takes no effect: lora_B is zero in all of its "
            f"{counted(len(fits), 'layer')} ({named(list(fits))}), as before the first step of a training. "
            "Pass a trained one."
        )
