"""The frames of a video: of an animated image, or of a video file where PyAV is installed.

Videos in a list of frames need neither; each frame is an image file as any other (`qprobe.data.images`).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qprobe.data.images import FORMATS, MAX_PIXELS, in_memory, png
from qprobe.data.reasons import Refused, shown

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FRAMES = 768
"""Of one video: as many as Qwen's processors take."""
PER_SECOND = 2.0
"""Frames that are taken of a video file, and what processors are told of every video: Qwen's default."""
SAMPLED = f"read as frames: {PER_SECOND:g} per second, fewer where that is more than {MAX_FRAMES} frames"
"""The rule by which video files are read, a clause behind "3 video files "."""
_CONTAINERS = (
    (rb"....ftyp", "mp4"),
    (rb"\x1aE\xdf\xa3", "matroska"),
    (rb"RIFF....AVI ", "avi"),
)
"""How video files begin, and PyAV's name of the format: others may name further files to be opened."""
_NEEDS = "is a video file, which only PyAV reads: pip install av, or give its frames as a list of images"


def is_video_file(data: bytes) -> bool:
    """True for the bytes of a file that PyAV would read."""
    return _container(data) is not None


def frames_of(data: bytes) -> tuple[bytes, ...]:
    """The frames of a file as PNG files, in order.

    Of an animated image all of them; of a video file `PER_SECOND`, evenly spread. Raises Refused, a clause
    without its subject, for a still image, and for more than 768 frames or 100 megapixels in all.
    """
    container = _container(data)
    if container is not None:
        return tuple(map(png, _of_container(data, container)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd but readable metadata
        frames = tuple(png(in_memory(x).image) for x in _of_animation(data))
    if len(frames) == 1:
        raise Refused("is a still image; give the frames of one video as a list of images")
    return frames


def check_frames(sizes: list[tuple[int, int]]) -> None:
    """Raises Refused, a clause without its subject, unless frames of these sizes are one video."""
    if len(set(sizes)) > 1:
        (a, b), (c, d) = sorted(set(sizes))[:2]
        raise Refused(f"has frames of several sizes, {a} x {b} and {c} x {d}")
    check_total(len(sizes), sizes[0][0] * sizes[0][1])


def check_total(frames: int, pixels: int) -> None:
    """Raises Refused, a clause without its subject, for more than is safe to decode."""
    if frames > MAX_FRAMES:
        raise Refused(f"has more than {MAX_FRAMES} frames; give fewer of them")
    if frames * pixels > MAX_PIXELS:
        raise Refused(
            f"has more than {MAX_PIXELS / 1e6:.0f} megapixels in all its frames; give fewer or smaller ones"
        )


def _container(data: bytes) -> str | None:
    return next((name for begins, name in _CONTAINERS if re.match(begins, data, re.DOTALL)), None)


def _of_animation(data: bytes) -> Iterator[Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            for place in range(MAX_FRAMES + 1):
                try:
                    image.seek(place)
                except EOFError:
                    return
                check_total(place + 1, image.width * image.height)
                yield image.copy()
    except (Refused, GeneratorExit):
        raise
    except UnidentifiedImageError:
        raise Refused("is neither an animated image nor a video file that is read") from None
    except Image.DecompressionBombError:
        raise Refused("has more than 179 megapixels, and 100 are safe to decode") from None
    except Exception as error:  # decoders raise what they like at bytes that nobody wrote on purpose
        raise Refused(f"cannot be read ({shown(str(error)) or type(error).__name__})") from None


def _of_container(data: bytes, name: str) -> Iterator[Image]:
    try:
        import av
    except ImportError:
        raise Refused(_NEEDS) from None
    try:
        with av.open(io.BytesIO(data), format=name) as file:
            if not file.streams.video:
                raise Refused("is a file without a video")
            yield from _spread(file, file.streams.video[0])
    except (Refused, GeneratorExit):
        raise
    except Exception as error:  # as of images
        raise Refused(f"cannot be read ({shown(str(error)) or type(error).__name__})") from None


def _spread(file: Any, stream: Any) -> Iterator[Image]:
    """Frames at equal distances, as many as the limits allow."""
    check_total(1, stream.width * stream.height)
    most = min(MAX_FRAMES, MAX_PIXELS // (stream.width * stream.height))
    seconds = float(file.duration or 0) / 1e6
    apart, begin, taken = max(1 / PER_SECOND, seconds / most), None, 0
    for frame in file.decode(stream):
        begin = frame.time if begin is None else begin
        if frame.time - begin >= taken * apart - 1e-6:
            check_total(1, frame.width * frame.height)
            yield frame.to_image()
            taken += 1
        if taken == most:
            return
