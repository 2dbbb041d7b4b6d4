"""A processor of Qwen2-VL that takes videos, which transformers' own cannot without torchvision."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2VLProcessor

from tests import tiny

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


class FramesOnly:
    """Cuts frames of 40 x 56 pixels, of which 28 x 56 count, into patches as Qwen2VLVideoProcessor does."""

    merge_size, temporal_patch_size = 2, 2

    def __init__(self) -> None:
        self.given: list[tuple[Any, dict[str, Any]]] = []

    def __call__(self, videos: list[Any], **options: Any) -> dict[str, torch.Tensor]:
        self.given += [
            (x, {**options, "video_metadata": options["video_metadata"][i]}) for i, x in enumerate(videos)
        ]
        patches = [_patches(torch.from_numpy(x)[:, :28].permute(0, 3, 1, 2) / 255 - 0.5) for x in videos]
        grids = torch.tensor([[(len(x) + 1) // 2, 2, 4] for x in videos])
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": grids}


def _patches(frames: torch.Tensor) -> torch.Tensor:
    """(frames, 3, 28, 56) -> (patches, 3 * 2 * 14 * 14), in blocks of 2 x 2."""
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    cut = frames.view(len(frames) // 2, 2, 3, 1, 2, 14, 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cut.reshape(-1, 3 * 2 * 14 * 14)


class _Processor(Qwen2VLProcessor):
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None  # of its video half alone, which has no class without torchvision


_Processor.__name__ = "Qwen2VLProcessor"


def video_processor() -> Any:
    """One of its own; what it was given stands in `video_processor.given`."""
    tokenizer, images = tiny.qwen_parts()
    words = "{% elif part['type'] == 'text' %}"
    template = tokenizer.chat_template.replace(words, "{% elif part['type'] == 'video' %}" + VIDEO + words)
    return _Processor(images, tokenizer, FramesOnly(), chat_template=template)
