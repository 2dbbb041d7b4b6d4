"""LLaVA's processor, which writes as many tokens for an image as the model reads of it.

transformers 5.23 counts them by the pixels of all images of a call together, padded to the largest; a tower
of Pixtral's reads each image without that padding. Can go with the first that counts by `image_sizes`.
"""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import Any

COUNTS_PADDED = "LlavaProcessor"


def counting_each(processor: Any) -> Any:
    """`processor`, or a copy of it that counts the tokens of each image by that image's own size."""
    kind = type(processor)
    if all(x.__name__ != COUNTS_PADDED for x in kind.__mro__):
        return processor
    counting = copy(processor)
    counting.__class__ = _counting(kind)
    return counting


@cache
def _counting(kind: type) -> type:
    def replace_image_token(self: Any, image_inputs: dict[str, Any], image_idx: int, **more: Any) -> str:
        sizes = image_inputs.get("image_sizes")
        if sizes is not None:
            height, width = (int(x) for x in sizes[image_idx])
            pixels = image_inputs["pixel_values"][image_idx][..., :height, :width]
            image_inputs = {**image_inputs, "pixel_values": {image_idx: pixels}}
        return kind.replace_image_token(self, image_inputs, image_idx, **more)  # pyright: ignore[reportAttributeAccessIssue]

    return type(kind.__name__, (kind,), {"replace_image_token": replace_image_token})
