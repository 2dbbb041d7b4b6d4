"""The frames of a video: of an animated image, of a video file where PyAV is installed, within limits."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qprobe.data import videos
from qprobe.data.images import decode
from qprobe.data.reading import read_conversations
from qprobe.data.reasons import Refused
from qprobe.data.videos import check_frames, frames_of
from tests import tiny


def shades(frames: tuple[bytes, ...]) -> list[int]:
    return [int(np.asarray(decode(x).image)[0, 0, 0]) for x in frames]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_all_frames_of_an_animated_image_are_taken_in_order(kind: str):
    first, *more = [x.convert("RGB") for x in tiny.frames(0, 3, 1)]
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    first.save(file, format=kind, save_all=True, append_images=more, **options)
    assert shades(frames_of(file.getvalue())) == [10, 130, 50]


def mp4(frames: Iterator[Image.Image], per_second: int) -> bytes:
    return video("mp4", frames, per_second)


def video(kind: str, frames: Iterator[Image.Image], per_second: int, **options: str) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=kind, options=options) as container:
        stream: Any = container.add_stream("mpeg4", rate=per_second)
        stream.width, stream.height, stream.time_base = 56, 40, Fraction(1, per_second)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
    return file.getvalue()


def test_of_a_video_file_two_frames_per_second_are_taken(tmp_path: Path):
    # Four seconds at 8 frames per second, each second of one gray: two frames of each.
    (tmp_path / "v.mp4").write_bytes(mp4((tiny.frames(i // 8)[0] for i in range(32)), 8))
    found = shades(frames_of((tmp_path / "v.mp4").read_bytes()))
    assert np.abs(np.array(found) - [10, 10, 50, 50, 90, 90, 130, 130]).max() <= 4  # the codec loses some
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b", "video": "v.mp4"}')
    said = "1 video file read as frames: 2 per second, fewer where that is more than 768 frames."
    assert read_conversations(tmp_path / "rows.jsonl").notes == (f"rows.jsonl: {said}",)


def test_frames_of_a_long_video_file_are_spread_over_all_of_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(videos, "MAX_FRAMES", 2)
    found = shades(frames_of(mp4((tiny.frames(i // 8)[0] for i in range(32)), 8)))
    assert np.abs(np.array(found) - [10, 90]).max() <= 4


def test_of_a_recording_that_does_not_say_how_long_it_is_no_more_are_taken_than_the_most(
    monkeypatch: pytest.MonkeyPatch,
):
    # Written while it was broadcast, without a duration: frames cannot be spread, so the first are taken.
    monkeypatch.setattr(videos, "MAX_FRAMES", 300)
    data = video("matroska", (tiny.frames(0)[0] for _ in range(310)), 2, live="1")
    assert len(frames_of(data)) == 300


def test_a_video_file_without_a_decoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Refused, match=r"only PyAV reads: pip install av, or give its frames as a list"):
        frames_of(b"\0\0\0\x20ftypisom" + bytes(100))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (tiny.picture(0), "is a still image"),
        (tiny.animation(0, 1)[:-20], "cannot be read"),
        (b"words", "is neither an animated image nor a video file"),
        (b"\0\0\0\x20ftypisom" + bytes(100), "cannot be read"),
        (b"\x1aE\xdf\xa3" + bytes(100), "cannot be read"),
        (b"RIFF\0\0\0\0AVI " + bytes(100), "cannot be read"),
    ],
    ids=["still", "cut", "text", "mp4", "matroska", "avi"],
)
def test_what_is_no_video_is_refused_with_the_reason(data: bytes, why: str):
    with pytest.raises(Refused, match=why):
        frames_of(data)


def test_too_many_frames_and_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(videos, "MAX_FRAMES", 2)
    assert len(frames_of(tiny.animation(0, 1))) == 2
    with pytest.raises(Refused, match="has more than 2 frames"):
        frames_of(tiny.animation(0, 1, 2))
    monkeypatch.setattr(videos, "MAX_PIXELS", 2 * 40 * 56 - 1)
    with pytest.raises(Refused, match="megapixels in all its frames"):
        frames_of(tiny.animation(0, 1))


def test_frames_of_one_video_have_one_size():
    check_frames([(4, 5), (4, 5)])
    with pytest.raises(Refused, match="frames of several sizes, 4 x 5 and 6 x 7"):
        check_frames([(6, 7), (4, 5)])
