"""The pixels of an image file, the same in every command and, by `qprobe.load_image`, at inference.

8-bit files without transparency give what `transformers.image_utils.load_image` gives: upright by their EXIF
orientation, in RGB. What that would destroy follows a rule of `RULES`, which is noted once per data file.
"""

from __future__ import annotations

import errno
import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qprobe.data.deep import deep_values, is_deep
from qprobe.data.reasons import Refused, shown
from qprobe.errors import SampleError
from qprobe.system.foreign import read_foreign
from qprobe.system.wording import counted

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
"""Of an image that is decoded: RGB takes 300 MB then, and a small file may claim far more."""
MAX_BYTES = 2**30  # of an image file: 100 megapixels of three 16-bit values are 600 MB uncompressed
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF",
    "WEBP",
)  # fmt: skip
"""What is decoded. Pillow knows more, of which some start other programs (EPS)."""
RULES = {
    "wide": (
        "with more than 8 bits per value: divided by the smallest of 2^8, 2^10, 2^12 and 2^16 above the "
        "file's maximum, other integers by their range"
    ),
    "float": "with floating-point values: their range became 0 to 255",
    "transparent": "with transparency: laid on white",
    "frames": "with several frames: the first one was taken",
}
"""What is done about values that 8 bits of RGB do not hold, by name."""
_DEPTHS = (8, 10, 12, 16)
_SIGNED, _SAMPLE_FORMAT = 2, 339  # of the tags of TIFF: what kind of number a value is
_SAVE = "which is not read; save it as PNG or JPEG"
_UNREAD = (
    (rb"version https://git-lfs", "is a pointer of Git LFS in place of the image; git lfs pull fetches it"),
    (rb"....ftyp(?:hei|hev|mif1|msf1)", f"is a HEIC image, {_SAVE}"),
    (rb"....ftyp|\x1aE\xdf\xa3", "is a video, and no image; call its field video to have it read"),
    (rb"II\*\0|MM\0\*", f"is a TIFF image of a kind {_SAVE}"),
    (rb"%PDF", f"is a PDF document, {_SAVE}"),
    (rb"\s*(?:<\?xml[^>]*>\s*)?<svg", f"is an SVG drawing, {_SAVE}"),
    (rb"(?i)\s*<(?:!doctype )?html", "is a web page, and no image"),
)
"""How files begin that take an image's place, and what is said of them."""


class Decoded(NamedTuple):
    """An image in RGB, and the names of the `RULES` that were needed."""

    image: Image
    rules: tuple[str, ...]


def load_image(source: str | Path | bytes | Any) -> Image:
    """The image in RGB, as qprobe's commands give it to a model's processor.

    source: a file, the bytes of one, an image of Pillow or an array (H, W) or (H, W, channels). EXIF
    orientation is applied; 16-bit, floating-point and transparent images follow the `RULES` of this module.
    Raises SampleError if it is no regular file, no image, or has more than 100 megapixels.
    """
    try:
        if isinstance(source, str | Path):
            return decode(file_bytes(Path(source))).image
        return decode(source).image if isinstance(source, bytes) else in_memory(source).image
    except Refused as problem:
        raise SampleError(f"The image cannot be used: it {problem}. Pass an image file.") from None


def file_bytes(path: Path) -> bytes:
    """What the image file holds. Raises Refused, a clause without its subject, for anything but a file."""
    try:
        return read_foreign(path, SampleError, "", MAX_BYTES)
    except SampleError as problem:
        why = str(problem).removeprefix(f"{path} ").strip().removesuffix(".")
        raise Refused("does not exist" if os.strerror(errno.ENOENT) in why else why) from None


def decode(data: bytes) -> Decoded:
    """The image of a file's bytes. Raises Refused, a clause without its subject."""
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are checked here, and of odd but readable metadata
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.width * image.height)
                return _deep_in_rgb(image, data) if is_deep(image) else _in_rgb(image)
        except Refused:
            raise
        except UnidentifiedImageError:
            said = (said for begins, said in _UNREAD if re.match(begins, data, re.DOTALL))
            raise Refused(next(said, "is no image")) from None
        except Image.DecompressionBombError:
            raise Refused("has more than 179 megapixels, and 100 are safe to decode") from None
        except Exception as error:  # decoders raise what they like at bytes that nobody wrote on purpose
            raise Refused(f"cannot be read ({shown(str(error)) or type(error).__name__})") from None


def in_memory(value: Any) -> Decoded:
    """The image of Pillow's or of an array, as `decode` gives a file's. Raises Refused."""
    from PIL import Image

    try:
        image = value if isinstance(value, Image.Image) else _of_array(value)
        _check_size(image.width * image.height)
        return _in_rgb(image)
    except Refused:
        raise
    except Exception as error:  # of arrays of any shape and type
        raise Refused(f"is no image ({shown(str(error)) or type(error).__name__})") from None


def _of_array(value: Any) -> Image:
    import numpy as np
    from PIL import Image as pillow

    array = np.asarray(value)
    is_8_bit = array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    if not is_8_bit and (array.ndim != 2 or array.dtype.kind not in "uif"):
        shape = " x ".join(map(str, array.shape)) or "no"
        raise Refused(f"is an array of {shape} values of {array.dtype}; pass height x width x 3 of uint8")
    return pillow.fromarray(array)


def png(image: Image) -> bytes:
    """`image` as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def rule_notes(used: Mapping[str, int]) -> tuple[str, ...]:
    """A sentence for each of the `RULES` that images needed. used: how many needed each."""
    return tuple(
        f"{counted(count, 'image')} {RULES[rule]}. qprobe.load_image does the same at inference."
        for rule, count in sorted(used.items())
    )


def _check_size(pixels: int) -> None:
    if pixels == 0:
        raise Refused("has no pixels")
    if pixels > MAX_PIXELS:
        raise Refused(
            f"has {pixels / 1e6:.0f} megapixels, more than the {MAX_PIXELS / 1e6:.0f} that are safe to decode"
        )


def _in_rgb(image: Image) -> Decoded:
    from PIL import ImageOps

    more = _frames(image)
    if image.mode == "L" and getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT) == (_SIGNED,):
        raise Refused("holds signed values of 8 bits, which are not read; save it as PNG")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "I" or upright.mode.startswith("I;"):
        return Decoded(_narrowed(upright), ("wide", *more))
    if upright.mode == "F":
        return Decoded(_of_range(upright), ("float", *more))
    if upright.has_transparency_data:
        return _on_white(upright, more)
    return Decoded(upright.convert("RGB"), more)


def _deep_in_rgb(image: Image, data: bytes) -> Decoded:
    """As `_in_rgb`, of 16 bits per colour: all channels by the depth that covers the largest."""
    import numpy as np
    from PIL import Image as pillow
    from PIL import ImageOps

    more = ("wide", *_frames(image))
    values = deep_values(data).astype(np.int64)
    depth = next(x for x in _DEPTHS if int(values[..., :3].max()) < 2**x)
    values[..., :3] = values[..., :3] * 256 >> depth
    values[..., 3:] >>= 8
    narrow = pillow.fromarray(values.astype(np.uint8))
    narrow.getexif().update(image.getexif())
    upright = ImageOps.exif_transpose(narrow)
    return _on_white(upright, more) if upright.mode == "RGBA" else Decoded(upright, more)


def _frames(image: Image) -> tuple[str, ...]:
    # Phones store a preview behind a photograph as a second frame.
    return ("frames",) if image.format != "MPO" and getattr(image, "is_animated", False) else ()


def _on_white(image: Image, more: tuple[str, ...]) -> Decoded:
    from PIL import Image as pillow

    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema()[0] == 255:  # every pixel is opaque
        return Decoded(image.convert("RGB"), more)
    white = pillow.new("RGBA", layer.size, (255, 255, 255, 255))
    return Decoded(pillow.alpha_composite(white, layer).convert("RGB"), ("transparent", *more))


def _narrowed(image: Image) -> Image:
    """Integers of 16 or 32 bits as 8, by the depth that covers them."""
    import numpy as np
    from PIL import Image as pillow

    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    depth = next((x for x in _DEPTHS if high < 2**x), None)
    if low < 0 or depth is None:
        return _of_range(image)
    return pillow.fromarray((values * 256 >> depth).astype(np.uint8)).convert("RGB")


def _of_range(image: Image) -> Image:
    """Values whose smallest becomes 0 and whose largest 255; all 0 where they are one value."""
    import numpy as np
    from PIL import Image as pillow

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise Refused("holds values that are not finite")
    low, high = values.min(), values.max()
    scaled = np.rint((values - low) * (255 / (high - low) if high > low else 0.0))
    return pillow.fromarray(scaled.astype(np.uint8)).convert("RGB")
