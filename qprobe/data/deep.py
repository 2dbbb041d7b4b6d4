"""Colour images with 16 bits per value, of which Pillow reads the upper 8.

Its unpackers take the first byte of a big-endian value and the second of a little-endian one. Reading a
file a second time as if its byte order were the other one gives the lower bytes. PPM it scales to 8 bits by
the maximum that the file names; here its values are scaled to 16, as it does itself where they are grey.
"""

from __future__ import annotations

import io
import re
import sys
from typing import TYPE_CHECKING, Any

from qprobe.data.reasons import Refused

if TYPE_CHECKING:
    from PIL.Image import Image

_FOREIGN = "16B" if sys.byteorder == "little" else "16L"
_OTHER_ORDER = {"16B": "16L", "16L": "16B", "16N": _FOREIGN}


def is_deep(image: Image) -> bool:
    """Whether `image`, opened and not yet decoded, has 16 bits per colour."""
    tiles = getattr(image, "tile", ())
    return image.mode in ("RGB", "RGBA") and any(";16" in _raw_mode(x) or _is_ppm(x) for x in tiles)


def deep_values(data: bytes) -> Any:
    """(height, width, 3 or 4) uint16: the values of the file. Raises Refused for an unknown layout."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        if _is_ppm(image.tile[0]):
            return _ppm_values(data, image.tile[0], image.size)
        upper = np.asarray(image).astype(np.uint16)
    with Image.open(io.BytesIO(data)) as image:
        tiles: list[Any] = getattr(image, "tile", [])
        for i, tile in enumerate(tiles):
            tiles[i] = tile._replace(args=_swapped(tile))
        lower = np.asarray(image)
    return upper << 8 | lower


def _is_ppm(tile: Any) -> bool:
    return tile.codec_name in ("ppm", "ppm_plain") and tile.args[-1] > 255


def _ppm_values(data: bytes, tile: Any, size: tuple[int, int]) -> Any:
    import numpy as np

    width, height = size
    count, largest = width * height * 3, tile.args[-1]
    if tile.codec_name == "ppm":
        values = np.frombuffer(data, ">u2", count, tile.offset)
    else:
        words = re.sub(rb"#[^\r\n]*", b"", data[tile.offset :]).split()
        values = np.array([int(x) for x in words[:count]])
    if len(values) < count or values.min() < 0 or values.max() > largest:
        raise Refused("is cut short, or holds values beyond the maximum that it names")
    return np.rint(values / largest * 65535).astype(np.uint16).reshape(height, width, 3)


def _raw_mode(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else str(tile.args[0] if tile.args else "")


def _swapped(tile: Any) -> Any:
    mode, _, depth = _raw_mode(tile).partition(";")
    if depth not in _OTHER_ORDER or mode not in ("RGB", "RGBA", "RGBX"):
        raise Refused(f"holds 16-bit colour in a layout that is not read ({mode};{depth})")
    swapped = f"{mode};{_OTHER_ORDER[depth]}"
    return swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:])
