"""LLaVA-NeXT (1.6): LLaVA with the image in tiles, and a learned mark at the end of each row."""

from __future__ import annotations

from qprobe.models.entry import OPEN, on_the_hub
from qprobe.models.family import BARE_TOWER, SIDE_BY_SIDE, Family
from qprobe.models.published import unsloth_loader

_HUB_ID, _GEOMETRY = "llava-hf/llava-v1.6-mistral-7b-hf", "llava-v1.6-mistral-7b"

FAMILY = Family(
    architectures=("LlavaNextForConditionalGeneration",),
    towers=SIDE_BY_SIDE,
    old_names=(BARE_TOWER,),
    entries=on_the_hub(
        "LlavaNextForConditionalGeneration",
        OPEN,
        ("llava-next", _HUB_ID, _GEOMETRY),
        ("llava-v1.6-mistral-7b", _HUB_ID, _GEOMETRY),
        published=(unsloth_loader("vision_tower", "multi_modal_projector"),),
    ),
)
