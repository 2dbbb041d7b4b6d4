"""InternVL3: a tower of its own kind, a projector of two linears, a Qwen2 decoder."""

from __future__ import annotations

from qprobe.models.entry import OPEN, on_the_hub
from qprobe.models.family import SIDE_BY_SIDE, Family
from qprobe.models.published import unsloth_loader

FAMILY = Family(
    architectures=("InternVLForConditionalGeneration",),
    towers=SIDE_BY_SIDE,
    entries=on_the_hub(
        "InternVLForConditionalGeneration",
        OPEN,
        ("internvl3-1b", "OpenGVLab/InternVL3-1B-hf", "internvl3-1b"),
        ("internvl3-2b", "OpenGVLab/InternVL3-2B-hf", "internvl3-2b"),
        ("internvl3-8b", "OpenGVLab/InternVL3-8B-hf", "internvl3-8b"),
        published=(unsloth_loader("vision_tower", "multi_modal_projector"),),
    ),
)
