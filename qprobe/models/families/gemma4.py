"""Gemma 4 with vision; layers of full attention may have no values of their own, but read the keys."""

from __future__ import annotations

from qprobe.models.entry import OPEN, on_the_hub
from qprobe.models.family import FUSED, LANGUAGE, PROJECTOR, VISION, Family
from qprobe.models.published import unsloth_loader

FAMILY = Family(
    architectures=("Gemma4ForConditionalGeneration",),
    towers=(
        (VISION, r"^model\.vision_tower\."),
        (PROJECTOR, r"^model\.embed_vision\."),
        (LANGUAGE, r"^(model\.language_model\.|lm_head$)"),
    ),
    fused=(*FUSED, ("q_proj", "k_proj")),
    entries=on_the_hub(
        "Gemma4ForConditionalGeneration",
        OPEN,
        ("gemma-4-26b-a4b", "google/gemma-4-26B-A4B", "gemma-4-26b-a4b"),
        ("gemma-4-26b-a4b-it", "google/gemma-4-26B-A4B-it", "gemma-4-26b-a4b"),
        published=(unsloth_loader("vision_tower", "embed_vision"),),
    ),
)
