"""LLaVA, and Pixtral, which transformers loads by the same class: a vision tower, two linears, a decoder."""

from __future__ import annotations

from qprobe.models.entry import OPEN, on_the_hub
from qprobe.models.family import BARE_TOWER, SIDE_BY_SIDE, Family
from qprobe.models.published import unsloth_loader

FAMILY = Family(
    architectures=("LlavaForConditionalGeneration",),
    towers=SIDE_BY_SIDE,
    old_names=(BARE_TOWER,),
    entries=on_the_hub(
        "LlavaForConditionalGeneration",
        OPEN,
        ("pixtral-12b", "mistral-community/pixtral-12b", "pixtral-12b"),
        ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", "llava-1.5-7b"),
        published=(unsloth_loader("vision_tower", "multi_modal_projector"),),
    ),
)
