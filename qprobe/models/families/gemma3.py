"""Gemma 3 with vision: a SigLIP tower, and a projector that is a bare parameter, so without a linear."""

from __future__ import annotations

from qprobe.models.entry import GATED, on_the_hub
from qprobe.models.family import BARE_TOWER, SIDE_BY_SIDE, Family
from qprobe.models.published import unsloth_loader

FAMILY = Family(
    architectures=("Gemma3ForConditionalGeneration",),
    towers=SIDE_BY_SIDE,
    old_names=(BARE_TOWER,),
    entries=on_the_hub(
        "Gemma3ForConditionalGeneration",
        GATED,
        ("gemma-3-4b", "google/gemma-3-4b-pt", "gemma-3-4b"),
        ("gemma-3-4b-it", "google/gemma-3-4b-it", "gemma-3-4b"),
        ("gemma-3-12b", "google/gemma-3-12b-pt", "gemma-3-12b"),
        ("gemma-3-12b-it", "google/gemma-3-12b-it", "gemma-3-12b"),
        ("gemma-3-27b", "google/gemma-3-27b-pt", "gemma-3-27b"),
        ("gemma-3-27b-it", "google/gemma-3-27b-it", "gemma-3-27b"),
        published=(unsloth_loader("vision_tower"),),
    ),
)
