"""A checkpoint loaded as a user loads it, by transformers alone."""

from __future__ import annotations

from typing import Any

import torch

from qprobe.loading.config import model_class
from qprobe.loading.pretrained import REPORT
from qprobe.loading.skeleton import Skeleton
from qprobe.system.log_filters import without_remarks


def load_plainly(skeleton: Skeleton, place: torch.device) -> tuple[Any, dict[str, Any]]:
    """(model, what transformers says of loading it): the checkpoint behind `skeleton` as a user loads it."""
    with without_remarks(REPORT):
        return model_class(skeleton.config).from_pretrained(
            skeleton.source.location,
            device_map={"": place},
            use_safetensors=True,
            dtype="auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=skeleton.source.trusts_code,
        )
