"""PaliGemma and PaliGemma 2: a SigLIP tower, one linear, a Gemma decoder."""

from __future__ import annotations

from qprobe.models.entry import GATED, on_the_hub
from qprobe.models.family import BARE_TOWER, SIDE_BY_SIDE, Family
from qprobe.models.published import unsloth_loader

FAMILY = Family(
    architectures=("PaliGemmaForConditionalGeneration",),
    towers=SIDE_BY_SIDE,
    old_names=(BARE_TOWER,),
    entries=on_the_hub(
        "PaliGemmaForConditionalGeneration",
        GATED,
        ("paligemma", "google/paligemma-3b-pt-224", "paligemma-3b"),
        ("paligemma-3b", "google/paligemma-3b-pt-224", "paligemma-3b"),
        ("paligemma2-3b", "google/paligemma2-3b-pt-224", "paligemma2-3b"),
        published=(unsloth_loader("vision_tower", "multi_modal_projector"),),
    ),
)
