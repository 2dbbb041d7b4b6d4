"""Pixels as a model gets them at inference: upright, in 8 bits by a stated rule; hostile files are named."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image as theirs

from qprobe.data.images import decode, load_image, rule_notes
from qprobe.data.reasons import Refused
from qprobe.errors import SampleError
from tests import tiny

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
GRAY = COLOURS[..., 0]
RAMP = np.arange(60, dtype=np.int64).reshape(6, 10)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def deep_png(values: np.ndarray, kind: int) -> bytes:
    """A PNG of 16 bits per value, which Pillow cannot write. kind: 2 for RGB, 6 for RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def with_orientation(value: int) -> bytes:
    image = Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = value
    return saved(image, exif=exif)


EIGHT_BIT = {
    "RGB": saved(Image.fromarray(COLOURS)),
    "JPEG": saved(Image.fromarray(COLOURS), "JPEG"),
    "gray": saved(Image.fromarray(GRAY)),
    "black and white": saved(Image.fromarray(GRAY).convert("1")),
    "palette": saved(Image.fromarray(COLOURS).quantize(16)),
    "CMYK": saved(Image.fromarray(COLOURS).convert("CMYK"), "JPEG"),
    "opaque RGBA": saved(Image.fromarray(COLOURS).convert("RGBA")),
    "WebP": saved(Image.fromarray(COLOURS), "WEBP"),
    "TIFF": saved(Image.fromarray(COLOURS), "TIFF"),
    "one pixel": saved(Image.new("RGB", (1, 1), "red")),
    "one by twenty thousand": saved(Image.new("RGB", (1, 20_000), "red")),
    **{f"orientation {n}": with_orientation(n) for n in range(1, 9)},
}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_8_bit_files_without_transparency_are_as_transformers_loads_them(name: str, tmp_path: Path):
    path = tmp_path / "image"
    path.write_bytes(EIGHT_BIT[name])
    ours = load_image(path)
    assert ours.mode == "RGB" and ours.size == theirs(str(path)).size
    assert np.array_equal(np.asarray(ours), np.asarray(theirs(str(path))))
    assert decode(EIGHT_BIT[name]).rules == ()


def test_orientation_six_stands_upright():
    assert load_image(with_orientation(6)).size == (6, 10)
    # 6 means: the first row of the file is the right side of the scene.
    assert np.array_equal(np.asarray(load_image(with_orientation(6))), np.rot90(COLOURS, -1))


@pytest.mark.parametrize(
    ("top", "depth"),
    [(255, 8), (256, 10), (1023, 10), (1024, 12), (4095, 12), (4096, 16), (65535, 16)],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_divided_by_the_depth_that_covers_it(top: int, depth: int, kind: str):
    values = (RAMP * top // 59).astype(np.uint16)
    found = decode(saved(Image.fromarray(values), kind))
    assert found.rules == ("wide",)
    assert np.array_equal(np.asarray(found.image)[..., 0], values.astype(int) * 256 // 2**depth)


@pytest.mark.parametrize("top", [4095, 65535])
def test_16_bit_colour_keeps_its_lower_bytes(top: int):
    values = np.random.default_rng(1).integers(0, top + 1, (6, 10, 3))
    values[0, 0] = top
    found = decode(deep_png(values, 2))
    assert found.rules == ("wide",)
    assert np.array_equal(np.asarray(found.image), values * 256 // (top + 1))


@pytest.mark.parametrize("kind", ["P6", "P3"])
@pytest.mark.parametrize(
    ("top", "largest", "depth"), [(65535, 65535, 16), (4095, 65535, 12), (4095, 4095, 16)]
)
def test_16_bit_colour_of_ppm_keeps_its_lower_bytes(kind: str, top: int, largest: int, depth: int):
    values = np.random.default_rng(1).integers(0, top + 1, (6, 10, 3))
    values[0, 0], values[0, 1] = top, 0
    head = f"{kind}\n# made by hand\n10 6\n{largest}\n".encode()
    words = "# all\n" + "\n".join(map(str, values.ravel()))
    data = values.astype(">u2").tobytes() if kind == "P6" else words.encode()
    found = decode(head + data)
    assert found.rules == ("wide",)
    # As grey ones, on the scale that the file names.
    wanted = np.rint(values * (65535 / largest)).astype(int) * 256 // 2**depth
    assert np.array_equal(np.asarray(found.image), wanted)
    with pytest.raises(Refused, match=r"cut short|cannot be read"):
        decode(head + data[:-20])


def deep_tiff(values: np.ndarray) -> bytes:
    """An uncompressed TIFF of (height, width, 3) values of 16 bits, little-endian, by hand."""
    height, width, _ = values.shape
    bits_at = 8 + 2 + 9 * 12 + 4  # behind the header and one directory of nine entries
    pixels = values.astype("<u2").tobytes()
    entries = (
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, bits_at), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, bits_at + 6), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(pixels)),
    )  # fmt: skip
    directory = b"".join(struct.pack("<HHII", *x) for x in entries)
    return (
        struct.pack("<2sHIH", b"II", 42, 8, 9)
        + directory
        + bytes(4)
        + struct.pack("<3H", 16, 16, 16)
        + pixels
    )


def test_16_bit_colour_of_tiff_keeps_its_lower_bytes():
    values = np.random.default_rng(2).integers(0, 65536, (3, 5, 3))
    found = decode(deep_tiff(values))
    assert found.rules == ("wide",)
    assert np.array_equal(np.asarray(found.image), values >> 8)


def test_16_bit_colour_with_transparency_is_laid_on_white():
    values = np.zeros((2, 2, 4), dtype=np.uint16)
    values[0, 0, 3] = 65535  # one opaque black pixel
    found = decode(deep_png(values, 6))
    assert set(found.rules) == {"wide", "transparent"}
    assert np.asarray(found.image)[..., 0].tolist() == [[0, 255], [255, 255]]


def test_floats_and_integers_without_a_depth_go_by_their_range():
    values = (RAMP / 59 * 3 - 1).astype(np.float32)
    for array, kind, rule in (
        (values, "TIFF", "float"),
        ((RAMP * 1_000_000 - 5).astype(np.int32), "TIFF", "wide"),
    ):
        found = decode(saved(Image.fromarray(array), kind))
        assert found.rules == (rule,)
        assert np.array_equal(np.asarray(found.image)[..., 0], np.rint(RAMP * (255 / 59)))
    flat = decode(saved(Image.fromarray(np.full((2, 2), 7, np.float32)), "TIFF"))
    assert np.asarray(flat.image).max() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_floats_that_are_not_finite_are_named(value: float):
    array = np.zeros((2, 2), np.float32)
    array[0, 0] = value
    with pytest.raises(Refused, match="not finite"):
        decode(saved(Image.fromarray(array), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode: str):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    found = decode(saved(image.convert(mode)))
    assert found.rules == ("transparent",)
    assert np.asarray(found.image).tolist() == [[[0] * 3, [255] * 3]]


def test_a_colour_that_stands_for_transparency_is_white():
    data = saved(Image.fromarray(np.array([[[9, 9, 9], [0, 0, 0]]], np.uint8)), transparency=(9, 9, 9))
    assert np.asarray(decode(data).image).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_taken(kind: str):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    found = decode(data)
    assert found.rules == ("frames",)
    red, _, blue = np.asarray(found.image)[0, 0].tolist()
    assert red > 200 and blue < 50


def test_notes_count_images_and_name_the_function_for_inference():
    assert rule_notes({"transparent": 2, "wide": 1}) == (
        "2 images with transparency: laid on white. qprobe.load_image does the same at inference.",
        "1 image with more than 8 bits per value: divided by the smallest of 2^8, 2^10, 2^12 and 2^16 above "
        "the file's maximum, other integers by their range. qprobe.load_image does the same at inference.",
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is no image"),
        (b"no image", "is no image"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS in place of the image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC image, which is not read; save it as PNG"),
        (b"\0\0\0\x20ftypisom\0\0\0\0", "is a video"),
        (b"<?xml version='1.0'?>\n<svg/>", "is an SVG drawing"),
        (b"%PDF-1.7", "is a PDF document"),
        (b"<!DOCTYPE html>", "is a web page"),
        (saved(Image.fromarray(GRAY), "TIFF", tiffinfo={339: 2}), "signed values of 8 bits"),
        (tiny.picture(0)[:500], "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),  # would start another program
    ],
)
def test_what_is_no_whole_image_is_named(data: bytes, said: str, tmp_path: Path):
    with pytest.raises(Refused, match=said):
        decode(data)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(SampleError, match=said):
        load_image(tmp_path / "x")


def test_any_cut_of_a_file_is_an_image_or_named():
    for whole in (EIGHT_BIT["JPEG"], EIGHT_BIT["WebP"], EIGHT_BIT["TIFF"], EIGHT_BIT["palette"]):
        for end in range(0, len(whole), 7):
            for data in (whole[:end], whole[:end] + b"\xff\x00" * 20 + whole[end + 40 :]):
                try:
                    decode(data)
                except Refused as problem:
                    assert str(problem)


def test_a_file_of_many_pixels_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch):
    image = saved(Image.new("1", (10_001, 10_000)))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(Refused, match="100 megapixels, more than the 100"):
        decode(image)


def test_only_regular_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "gone", Path("a\0b")):
        with pytest.raises(SampleError):
            load_image(path)


def test_images_in_memory_are_loaded_too():
    image = Image.fromarray(COLOURS)
    assert np.array_equal(np.asarray(load_image(image)), COLOURS)
    assert np.array_equal(np.asarray(load_image(COLOURS)), COLOURS)
    with pytest.raises(SampleError, match=r"2 x 2 x 7 values of float64; pass height x width x 3 of uint8"):
        load_image(np.zeros((2, 2, 7)))
    for empty in (np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0), np.uint16), Image.new("RGB", (0, 0))):
        with pytest.raises(SampleError, match="it has no pixels"):
            load_image(empty)
