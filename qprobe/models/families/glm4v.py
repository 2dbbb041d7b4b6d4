"""GLM-4.5V: experts in all layers but the first, and a merger of gated linears behind the vision tower."""

from __future__ import annotations

from qprobe.models.entry import OPEN, on_the_hub
from qprobe.models.family import MERGER, Family
from qprobe.models.grid import grid_of_thw
from qprobe.models.published import unsloth_loader

FAMILY = Family(
    architectures=("Glm4vMoeForConditionalGeneration",),
    towers=MERGER,
    image_grid=grid_of_thw,
    entries=on_the_hub(
        "Glm4vMoeForConditionalGeneration",
        OPEN,
        ("glm-4.5v", "zai-org/GLM-4.5V", "glm-4.5v"),
        published=(unsloth_loader("visual"),),
    ),
)
