"""Which fields of a row were read, and what the others seem to hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from qprobe.data.reasons import Refused, shown

_NOUN = r"(?:image|images|img|imgs|picture|pictures|photo|photos)"
_OF_IMAGES = re.compile(
    rf"^{_NOUN}(?:_?(?:path|paths|file|files|filename|filenames|file_name|file_names|url|urls|bytes))?(?:_?\d+)?$",
    re.IGNORECASE,
)
_NAMES = re.compile(r"(?:path|file|filename|file_name|url)s?(?:_?\d+)?$", re.IGNORECASE)
_OF_FILES = re.compile(r"^file_names?$", re.IGNORECASE)  # as in metadata.jsonl of a folder of images
_ORIGIN = re.compile(r"^(?:file|filename|file_name|filepath|file_path|path)$", re.IGNORECASE)
_OF_ID = re.compile(r"^(?:image|img)_?id$", re.IGNORECASE)
_ADDRESS = re.compile(r"^https?://", re.IGNORECASE)
_OF_MOVING = re.compile(r"(?:^|_)(?:videos?|clips?|frames?|audios?|sounds?|speech)(?:$|_|\d)", re.IGNORECASE)
_OF_VIDEO = ("video", "videos")
_ABOUT_VIDEO = re.compile(r"^videos?_?(?:id|name|path|file|file_?name|url|source)$", re.IGNORECASE)
_NO_TEXT = re.compile(r"(?:^|_)(?:ids?|urls?|hash|sha256|licen[sc]e)$", re.IGNORECASE)
_IMAGE_FILE = re.compile(
    r"^data:image/|\.(?:png|jpe?g|jfif|gif|bmp|tiff?|webp|avif|jp2|heic|heif|ppm)$", re.IGNORECASE
)
_VIDEO_FILE = re.compile(
    r"^data:(?:video|audio)/|\.(?:mp4|m4v|mov|avi|mkv|webm|wav|mp3|flac|ogg)$", re.IGNORECASE
)


class Fields:
    """The fields of one row; those that nobody takes are told at the end."""

    def __init__(self, row: Mapping[Any, Any]) -> None:
        self._row = {str(key): value for key, value in row.items()}
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return not _is_nothing(self._row.get(name))

    def has(self, name: str) -> bool:
        """Whether the field is there, though it may hold an empty list."""
        return self._row.get(name) is not None

    def value(self, name: str) -> Any:
        """What the field holds, which stays unread; None if it is not there."""
        return self._row.get(name)

    def is_taken(self, name: str) -> bool:
        """Whether the field is read already."""
        return name in self._taken

    def names(self) -> list[str]:
        """Of the fields that hold something."""
        return [x for x in self._row if x in self]

    def take(self, *names: str) -> Any:
        """What the one field of `names` holds that is there; None without one. Raises Refused for two."""
        self._taken.update(x for x in names if x in self._row)
        there = [x for x in names if x in self]
        if len(there) > 1:
            raise Refused(f"it has both {there[0]} and {there[1]}; leave one of them out")
        return self._row[there[0]] if there else None

    def take_images(self) -> list[Any]:
        """What the fields with names of images hold, one item per image.

        Where one holds images themselves, another that names files or addresses says where they came from.
        """
        there = [x for x in self._row if _OF_IMAGES.match(x)]
        is_held = any(_is_image(self._row[x]) for x in there)
        found: list[Any] = []
        for name in there:
            value = self._row[name]
            if is_held and _NAMES.search(name) and not _is_image(value):
                continue
            self._taken.add(name)
            found += _images_in(value)
        return found or self._take_files()

    def take_videos(self) -> list[Any]:
        """What the fields `video`, one file or the frames of one, and `videos` hold, one item per video."""
        one, several = (self._row.get(x) for x in _OF_VIDEO)
        self._taken.update(x for x in _OF_VIDEO if x in self._row)
        listed = several if isinstance(several, list | tuple) else [several]
        found = [one, *listed]
        if isinstance(one, list | tuple) and one and all(isinstance(x, list | tuple) for x in one):
            found = [*one, *listed]
        return [x for x in found if not _names_nothing(x) and not _is_nothing(x)]

    def _take_files(self) -> list[Any]:
        """What a field of file names holds, where these are of images."""
        name = next((x for x in self._row if _OF_FILES.match(x)), None)
        found = [] if name is None else _images_in(self._row[name])
        if name is None or not all(isinstance(x, str) and _IMAGE_FILE.search(x) for x in found):
            return []
        self._taken.add(name)
        return found

    def unused(self, images: Sequence[Any], shows_image: bool, shows_video: bool = False) -> frozenset[str]:
        """Names of fields that hold something and were not read, but for what repeats a name in `images`.

        shows_image, shows_video: whether a turn does. Raises Refused for a field that seems to hold or name
        an image, a video or a sound, unless it says where those that are shown came from.
        """
        known, left = _file_names(images), self._left()
        is_held = any(map(_is_image, images))
        for name in left:
            value = self._row[name]
            texts = [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, str)]
            holds = isinstance(value, str | bytes | list | tuple | Mapping)
            is_about = shows_video and bool(_ABOUT_VIDEO.match(name))
            is_moving = (holds and _OF_MOVING.search(name)) or any(_VIDEO_FILE.search(x) for x in texts)
            if is_moving and not is_about:
                raise Refused(
                    f"its field {shown(name)} names a video or a sound, and is not read; call it video or "
                    "videos to have a video read"
                )
            if _OF_ID.match(name) and not shows_image:
                raise Refused(f"its field {shown(name)} names an image, and the row shows none")
            is_origin = is_held and bool(_ORIGIN.match(name) or _OF_IMAGES.match(name))
            strange = [x for x in texts if _IMAGE_FILE.search(x) and PurePosixPath(x).name not in known]
            if shows_image:
                strange = [] if is_origin else [x for x in strange if not _ADDRESS.match(x)]
            if strange or _is_image(value):
                raise Refused(
                    f"its field {shown(name)} seems to hold an image; call it image or images to have it read"
                )
        return frozenset(shown(x) for x in left)

    def texts(self, images: Sequence[Any]) -> list[str]:
        """Names of fields that were not read and hold a text, but for names of images and pages."""
        known = _file_names(images)
        return [x for x in self._left() if not _NO_TEXT.search(x) and _holds_text(self._row[x], known)]

    def _left(self) -> list[str]:
        return [x for x in self.names() if x not in self._taken]


def _images_in(value: Any) -> list[Any]:
    """The images of a field, of which those that stand for none are left out."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
    return [x for x in (value if is_list else [value]) if not _names_nothing(x)]


def _is_image(value: Any) -> bool:
    """Whether `value` is an image itself or bytes, a record or a list of them, and not the name of one."""
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes)
    if isinstance(value, list | tuple):
        return any(map(_is_image, value))
    return isinstance(value, bytes) or hasattr(value, "__array_interface__")


def _file_names(images: Sequence[Any]) -> set[str]:
    paths = (x.get("path") if isinstance(x, Mapping) else x for x in images)
    return {PurePosixPath(x).name for x in paths if isinstance(x, str)}


def _holds_text(value: Any, known: set[str]) -> bool:
    if isinstance(value, str):
        return bool(value.strip()) and PurePosixPath(value).name not in known
    if isinstance(value, Mapping):
        return any(_holds_text(x, known) for x in value.values())
    return isinstance(value, list | tuple) and any(_holds_text(x, known) for x in value)


def _names_nothing(value: Any) -> bool:
    """Whether `value` stands for no image: null, no text, or a record of nulls, as tables write it."""
    if isinstance(value, Mapping):
        return bool(value) and all(x is None for x in value.values())
    return value is None or (isinstance(value, str) and value == "")


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | tuple | Mapping) and not value)
