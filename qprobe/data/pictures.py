"""What names or holds an image or a video in a row -> the bytes of its file, or the path of it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from qprobe.data import images
from qprobe.data.downloads import download
from qprobe.data.reasons import Refused, checked_text, shown
from qprobe.data.videos import MAX_FRAMES, SAMPLED, check_frames, frames_of, is_video_file
from qprobe.records import Video
from qprobe.system.wording import counted

# How base64 of image files begins: PNG, JPEG, GIF, WebP, BMP, TIFF of both byte orders.
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")
_SHORTEST_BASE64 = 60  # characters: no image file is smaller, and such names of files are rare
_KEYS = ("bytes", "image", "path", "url", "image_url", "data", "base64", "file", "source")
_VIDEO = "its video"


@dataclass
class Pictures:
    """Reads the images and videos of one data file, each file once.

    folder: that paths are relative to. downloads: whether addresses are fetched. used: names of `RULES`, and
    how many images needed each. sampled: how many video files were read.
    """

    folder: Path
    downloads: bool = False
    used: dict[str, int] = field(default_factory=dict)
    sampled: int = 0
    _seen: dict[Path, str | None] = field(default_factory=dict)
    _videos: dict[Path, str | None] = field(default_factory=dict)
    _fetched: dict[str, bytes] = field(default_factory=dict)

    def find(self, value: Any) -> bytes | Path:
        """The image that `value` is or names. Raises Refused for none, or an address that is not fetched.

        value: a path, file://, data: or http(s):// address, base64, bytes, {"bytes" | "path" | "url": ...},
        an image of Pillow, or an array. What is found is not decoded yet.
        """
        if isinstance(value, str):
            return self._of_text(value)
        if isinstance(value, Path):
            return self.folder / value
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if isinstance(value, Mapping):
            given = next((value[x] for x in _KEYS if value.get(x) is not None), None)
            if isinstance(given, Mapping):  # {"image_url": {"url": ...}}
                given = given.get("url")
            if given is None or isinstance(given, Mapping):
                raise Refused(
                    f"its image is {shown(repr(dict(value)))}, which names no file and holds no bytes"
                )
            return self.find(given)
        if hasattr(value, "__array_interface__") or hasattr(value, "__array__"):  # Pillow, numpy, torch
            return self._of_memory(value)
        raise Refused(f"its image is {shown(repr(value))}, which is no path of a file")

    def find_video(self, value: Any) -> Video:
        """The video that `value` is or names, which is not decoded yet.

        value: a list of its frames, each as `find` takes images, or one file, named or held as an image is.
        Raises Refused as `find` does.
        """
        is_list = isinstance(value, list | tuple)
        if is_list and not 0 < len(value) <= MAX_FRAMES:
            raise Refused(f"{_VIDEO} has {len(value):,} frames; 1 to {MAX_FRAMES} are read")
        try:
            return Video(tuple(map(self.find, value if is_list else [value])), is_file=not is_list)
        except Refused as problem:
            what = f"a frame of {_VIDEO}" if is_list else _VIDEO
            raise Refused(str(problem).replace("its image", what)) from None

    def check(self, seen: bytes | Path | Video) -> None:
        """Raises Refused, saying why, unless the image or video can be decoded within the limits."""
        if isinstance(seen, Video):
            self._check_video(seen)
        else:
            self._check_image(seen)

    def _check_image(self, image: bytes | Path) -> None:
        if isinstance(image, bytes):
            self._check_bytes(image, "its image")
            return
        _once(self._seen, image, lambda: self._check_bytes(self._read(image), f"image {shown(image.name)}"))

    def notes(self) -> tuple[str, ...]:
        """A sentence for each rule that images and videos needed."""
        by_rate = (f"{counted(self.sampled, 'video file')} {SAMPLED}.",) if self.sampled else ()
        return (*images.rule_notes(self.used), *by_rate)

    def _check_video(self, video: Video) -> None:
        """The frames one by one, and that they are of one size and few enough to be held together."""
        if not video.is_file:
            for frame in video.frames:
                self._check_image(frame)
            held = [x if isinstance(x, bytes) else images.file_bytes(x) for x in video.frames]
            self._check_frames(held, _VIDEO)
            return
        (file,) = video.frames
        if isinstance(file, bytes):
            self._check_video_file(file, _VIDEO)
            return
        _once(
            self._videos,
            file,
            lambda: self._check_video_file(self._read(file, "video"), f"video {shown(file.name)}"),
        )

    def _check_video_file(self, data: bytes, what: str) -> None:
        try:
            frames = frames_of(data)
        except Refused as problem:
            raise Refused(f"{what} {problem}") from None
        self._check_frames(frames, what)
        self.sampled += is_video_file(data)

    def _check_frames(self, frames: Sequence[bytes], what: str) -> None:
        try:
            check_frames([images.decode(x).image.size for x in frames])
        except Refused as problem:
            raise Refused(f"{what} {problem}") from None

    def _read(self, path: Path, what: str = "image") -> bytes:
        try:
            return images.file_bytes(path)
        except Refused as problem:
            raise Refused(f"{what} {shown(str(path), 200)} {problem}") from None

    def _check_bytes(self, data: bytes, what: str) -> None:
        try:
            decoded = images.decode(data)
        except Refused as problem:
            raise Refused(f"{what} {problem}") from None
        self._count(decoded.rules)

    def _count(self, rules: tuple[str, ...]) -> None:
        for rule in rules:
            self.used[rule] = self.used.get(rule, 0) + 1

    def _of_memory(self, value: Any) -> bytes:
        try:
            decoded = images.in_memory(value)
        except Refused as problem:
            raise Refused(f"its image {problem}") from None
        self._count(decoded.rules)
        return images.png(decoded.image)

    def _of_text(self, value: str) -> bytes | Path:
        text = checked_text(value, "the name of its image").strip()
        if not text:
            raise Refused(f"its image is {value!r}, which is no path of a file")
        if text[:5].lower() == "data:":
            return _data_address(text)
        if "://" in text[:20]:
            return self._of_address(text)
        if len(text) >= _SHORTEST_BASE64 and text.startswith(_BASE64):
            found = _base64(text)
            if found is not None:
                return found
        return self.folder / text

    def _of_address(self, text: str) -> bytes | Path:
        try:
            parts = urlsplit(text)
        except ValueError:
            raise Refused(f"its image is {shown(text)}, which is no address") from None
        if parts.scheme.lower() == "file":
            if parts.netloc not in ("", "localhost"):
                raise Refused(f"its image lies on another machine ({shown(text)})")
            return Path(url2pathname(unquote(parts.path)))
        if parts.scheme.lower() not in ("http", "https"):
            raise Refused(f"its image is the address {shown(text)}; only files and http addresses are read")
        if not self.downloads:
            raise Refused(f"its image is the address {shown(text)}; --allow-downloads fetches it")
        if text not in self._fetched:
            self._fetched[text] = download(text, images.MAX_BYTES)
        return self._fetched[text]


def _data_address(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma:
        raise Refused("its image is a data: address without data")
    found = _base64(body) if head.lower().endswith(";base64") else unquote_to_bytes(body)
    if found is None:
        raise Refused("its image is a data: address whose base64 is damaged")
    return found


def _base64(text: str) -> bytes | None:
    """The bytes that `text` stands for; None if it is no base64."""
    plain = "".join(unquote(text).split()).rstrip("=")
    padded = plain + "=" * (-len(plain) % 4)
    alphabet = b"-_" if "-" in padded or "_" in padded else None
    try:
        return base64.b64decode(padded.encode("ascii"), altchars=alphabet, validate=True)
    except (binascii.Error, ValueError):
        return None


def _once(seen: dict[Path, str | None], file: Path, check: Callable[[], None]) -> None:
    """Runs `check` where `file` is not `seen` yet. Raises Refused as it did then, each time."""
    if file not in seen:
        try:
            check()
            seen[file] = None
        except Refused as problem:
            seen[file] = str(problem)
    problem = seen[file]
    if problem is not None:
        raise Refused(problem)
