"""Loading a 4-bit checkpoint whose fused weights of experts may be in 4-bit as well."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qprobe.checkpoint.experts.four_bit import read_states
from qprobe.loading.config import model_class
from qprobe.loading.pretrained import REPORT, refuse_incomplete
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.source import explained
from qprobe.system.log_filters import without_remarks


def load_packed(skeleton: Skeleton, experts: Sequence[str], place: torch.device) -> Any:
    """The model of `skeleton`, a folder with linears and `experts` (names of parameters) in 4-bit.

    place: the device. transformers loads all but the quantization states of experts. Raises ModelError for
    tensors that the files lack.
    """
    from qprobe.checkpoint.experts import quantizer  # transformers knows it once it is imported

    source, config = skeleton.source, copy.deepcopy(skeleton.config)
    given: dict[str, Any] = config.quantization_config
    config.quantization_config = {
        **{key: value for key, value in given.items() if not key.removeprefix("_").startswith("load_in_")},
        "quant_method": quantizer.METHOD,
        "bnb_4bit_compute_dtype": skeleton.dtype,
        "experts": list(experts),
    }
    with explained(source), without_remarks(REPORT):
        model, found = model_class(config).from_pretrained(
            source.location,
            config=config,
            dtype=getattr(torch, skeleton.dtype),
            device_map={"": place},
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    states = tuple(f"{name}." for name in experts)
    found["unexpected_keys"] = {x for x in found["unexpected_keys"] if not x.startswith(states)}
    refuse_incomplete(source, model, found)
    read_states(model, Path(source.location), experts)
    return model
