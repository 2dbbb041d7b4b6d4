"""The skeleton of a model: the model without its weights, and what follows from its names and shapes.

A command makes one skeleton and hands it on; what is asked of it is derived once, when it is first asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from qprobe.errors import ModelError
from qprobe.loading.config import build, catalogue_config, load_config, load_generation
from qprobe.loading.device import DTYPES
from qprobe.loading.inventory import fingerprint, list_layers, settle
from qprobe.loading.source import Source
from qprobe.models.entry import Entry
from qprobe.records import FormatSpec, Inventory
from qprobe.system.wording import SAID, shortened

_OF_STORAGE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without its weights.

    config: transformers'. dtype: of what is in 16-bit, "bfloat16" or "float16". entry: the catalogue's, where
    the model was looked up there. twin: the skeleton of another checkpoint of this model, which lends its
    modules. generation: transformers' config of how it generates; None for what follows from `config`.
    """

    source: Source
    config: Any = field(repr=False)  # transformers.PreTrainedConfig
    dtype: str
    entry: Entry | None = None
    twin: Skeleton | None = None
    generation: Any = field(default=None, repr=False)  # transformers.GenerationConfig
    _inventories: dict[FormatSpec, Inventory] = field(default_factory=dict, repr=False)

    @cached_property
    def model(self) -> nn.Module:
        """The modules on the meta device. Raises ModelError if the config builds none."""
        if self.twin is not None:
            return self.twin.model
        try:
            built = meta_model(self.config, self.dtype, self.source.trusts_code)
            if self.generation is not None:
                built.generation_config = self.generation
            return built
        except ModelError:
            raise
        except Exception as error:  # a config can be wrong in as many ways as there are model classes
            raise _unbuildable(self.source, error) from error

    @cached_property
    def is_buildable(self) -> bool:
        """False where only loading the model, or failing to, says what is wrong with its config."""
        try:
            return self.model is not None
        except ModelError:
            return False

    @cached_property
    def fingerprint(self) -> str:
        """See `qprobe.loading.inventory.fingerprint`."""
        return fingerprint(self.model)

    @property
    def architecture(self) -> str:
        """The name of the model's class."""
        return type(self.model).__name__

    def inventory(self, spec: FormatSpec) -> Inventory:
        """Every linear and its bytes under `spec`, see `qprobe.loading.inventory.list_layers`."""
        if spec not in self._inventories:
            self._inventories[spec] = list_layers(self.model, spec)
        return self._inventories[spec]

    def in_dtype(self, dtype: str) -> Skeleton:
        """The skeleton with everything in 16-bit in `dtype`: this one if it has it, else another."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, twin=None, _inventories={})

    def of_copy(self, source: Source) -> Skeleton:
        """The skeleton of `source`, where this model was saved; its own if its config differs."""
        config = load_config(source)
        if _meaning(config.to_dict()) != _meaning(self.config.to_dict()):
            return Skeleton(source, config, self.dtype, generation=load_generation(source, config))
        return replace(self, source=source, config=config, twin=self)


def skeleton_of(source: Source, dtype: str, entry: Entry | None = None) -> Skeleton:
    """The skeleton of `source`, from its config alone.

    entry: the catalogue's, whose geometry takes the place of the config of `source`, so that no network is
    needed. Raises ModelError if the config cannot be had.
    """
    if entry is None:
        try:
            config = load_config(source)
            return Skeleton(source, config, dtype, entry, generation=load_generation(source, config))
        except ModelError:
            raise
        except Exception as error:  # validators of transformers raise errors of their own
            raise _unbuildable(source, error) from error
    return Skeleton(source, catalogue_config(entry), dtype, entry)


def _meaning(config: Any) -> Any:
    """What a config says of the modules: all but where it lies, and how the weights are stored."""
    if not isinstance(config, dict):
        return config
    return {key: _meaning(value) for key, value in config.items() if key not in _OF_STORAGE}


def _unbuildable(source: Source, error: Exception) -> ModelError:
    said = shortened(" ".join(str(error).split()) or type(error).__name__, SAID)
    return ModelError(
        f"Model {source.id!r} cannot be built from its config.json: {said.rstrip('.')}. "
        f"Check that this transformers knows its architecture and that the file is as published."
    )


def meta_model(config: Any, dtype: str, trusts_code: bool = False) -> nn.Module:
    """The model of `config` without weights, on the meta device; dtypes as loading would give them."""
    with torch.device("meta"):
        built = build(config, DTYPES[dtype], trusts_code)
    # Loading keeps what a class names in float32; building from a config does not.
    for pattern, kept in built._get_dtype_plan(DTYPES[dtype]).items():
        for name, tensor in (*built.named_parameters(), *built.named_buffers()):
            if re.search(pattern.replace("*", ".*"), name):
                tensor.data = tensor.data.to(kept)
    built.tie_weights()
    settle(built)
    return built.eval()
