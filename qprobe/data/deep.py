"""Colour images with 16 bits per value, of which Pillow reads the upper 8.

Pillow's unpackers take the first byte of a big-endian value and the second of a little-endian one. Reading a
file a second time as if its byte order were the other one gives the lower bytes.
"""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

from qprobe.data.reasons import Refused

if TYPE_CHECKING:
    from PIL.Image import Image

_FOREIGN = "16B" if sys.byteorder == "little" else "16L"
_OTHER_ORDER = {"16B": "16L", "16L": "16B", "16N": _FOREIGN}


def is_deep(image: Image) -> bool:
    """Whether `image`, opened and not yet decoded, has 16 bits per colour."""
    return image.mode in ("RGB", "RGBA") and any(";16" in _raw_mode(x) for x in getattr(image, "tile", ()))


def deep_values(data: bytes) -> Any:
    """(height, width, 3 or 4) uint16: the values of the file. Raises Refused for an unknown layout."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        upper = np.asarray(image).astype(np.uint16)
    with Image.open(io.BytesIO(data)) as image:
        tiles: list[Any] = getattr(image, "tile", [])
        for i, tile in enumerate(tiles):
            tiles[i] = tile._replace(args=_swapped(tile))
        lower = np.asarray(image)
    return upper << 8 | lower


def _raw_mode(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else str(tile.args[0] if tile.args else "")


def _swapped(tile: Any) -> Any:
    mode, _, depth = _raw_mode(tile).partition(";")
    if depth not in _OTHER_ORDER or mode not in ("RGB", "RGBA", "RGBX"):
        raise Refused(f"holds 16-bit colour in a layout that is not read ({mode};{depth})")
    swapped = f"{mode};{_OTHER_ORDER[depth]}"
    return swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:])
