"""How an image was cut into patches, told from the shapes of the processor's tensors; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Grid:
    """How a vision tower cuts one image: `tiles` pictures of `rows` x `columns` patches each.

    merge: patches come in blocks of merge x merge, block after block (1: line after line).
    """

    tiles: int
    rows: int
    columns: int
    merge: int = 1


@dataclass(frozen=True)
class ImageTensors:
    """What a batch with one image per sample says of one of them.

    samples: of the batch. thw: frames, rows and columns of the image, where the processor gives
    `image_grid_thw`. pixels: shape of `pixel_values`, None without. patch, merge: `patch_size` and
    `spatial_merge_size` of the vision config, None without.
    """

    samples: int
    thw: tuple[int, int, int] | None
    pixels: tuple[int, ...] | None
    patch: int | None
    merge: int | None


def grid_of_thw(tensors: ImageTensors) -> Grid | None:
    """The grid that `image_grid_thw` states, in blocks of spatial_merge_size; None without such a tensor."""
    return None if tensors.thw is None else Grid(*tensors.thw, tensors.merge or 1)


def grid_of_pixels(tensors: ImageTensors) -> Grid | None:
    """The grid of pixels (B, ..., channels, height, width) cut into square patches; None if they are not."""
    shape, patch = tensors.pixels, tensors.patch
    if shape is None or patch is None or len(shape) < 4:
        return None
    pictures, (height, width) = prod(shape[:-3]), shape[-2:]
    if pictures % tensors.samples or min(height, width) < patch:
        return None
    return Grid(pictures // tensors.samples, height // patch, width // patch)
