"""The content of one turn, a string or a list of parts -> texts, images and videos in their order."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qprobe.data.pictures import Pictures
from qprobe.data.reasons import Refused, checked_text, shown
from qprobe.records import Part

IMAGE_MARK = "<image>"  # where an image stands in the text, as LLaVA's data has it
VIDEO_MARK = "<video>"
_TAGS = re.compile(
    r"<img>(?P<file>[^<>]{1,4096})</img>|"
    r"<(?:image|picture)[ _-]?(?P<number>[1-9]\d?)>|"
    r"<(?P<tag>/?(?:image|img|picture|video|audio)(?:[ _-]?\d+)?(?:\s[^<>]{0,4096})?/?)>",
    re.IGNORECASE,
)
_TEXT = ("text", "input_text", "output_text")
_IMAGE = ("image", "image_url", "input_image")
_VIDEO = ("video", "video_url", "input_video")
_SOURCES = ("image", "image_url", "path", "url", "bytes", "data", "base64", "file", "source")
_SILENT = ("type", "cache_control")  # what says nothing of what is read


@dataclass(frozen=True)
class Place:
    """Where an image or a video stands that the row names elsewhere.

    index: which of them, from 0; None for the next one. tag: how the text marks it.
    """

    index: int | None = None
    tag: str = IMAGE_MARK

    @property
    def is_video(self) -> bool:
        """Whether a video stands there."""
        return self.tag == VIDEO_MARK


Piece = Part | Place


def pieces_of(content: Any, turn: int, pictures: Pictures) -> tuple[Piece, ...]:
    """Texts, images, videos and places of them in the order of `content`; outer white space is dropped.

    turn: its number, for reasons. Raises Refused for what is neither text nor shown.
    """
    if isinstance(content, str):
        return _trimmed(_of_text(content, turn, pictures))
    number = number_text(content)  # an answer that is a count
    if number is not None:
        return (number,)
    if isinstance(content, Mapping):
        return _trimmed(_of_part(content, turn, pictures))
    if not isinstance(content, Sequence) or not all(isinstance(x, str | Mapping) for x in content):
        raise Refused(f"turn {turn} has no text")
    found: list[Piece] = []
    for part in content:
        found += _of_text(part, turn, pictures) if isinstance(part, str) else _of_part(part, turn, pictures)
    return _trimmed(found)


def number_text(value: Any) -> str | None:
    """A number as text; None for anything else. Raises Refused for one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"it holds the number {value}, which is no answer")
    try:
        return str(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        raise Refused("it holds a number of thousands of digits") from None


def _of_part(part: Mapping[str, Any], turn: int, pictures: Pictures) -> list[Piece]:
    """One part of a list, {"type": "text" | "image" | ..., ...}; keys without a value are nothing."""
    given = {key: value for key, value in part.items() if value is not None and value != ""}
    kind = part.get("type")
    if kind in _TEXT or (kind is None and isinstance(given.get("text"), str)):
        _only(given, (*_SILENT, "text"), turn)
        text = given.get("text", "")
        if not isinstance(text, str):
            raise Refused(f"turn {turn} has a part of type text without text")
        return _of_text(text, turn, pictures)
    if kind in _IMAGE or (kind is None and any(x in given for x in _SOURCES)):
        _only(given, (*_SILENT, "detail", "index", *_SOURCES), turn)
        source = next((given[x] for x in _SOURCES if x in given), None)
        if source is not None:
            return [pictures.find(source)]
        index = given.get("index")
        return [Place(index if isinstance(index, int) and not isinstance(index, bool) else None)]
    if kind in _VIDEO or (kind is None and any(x in given for x in _VIDEO)):
        _only(given, (*_SILENT, *_VIDEO, *_SOURCES), turn)
        source = next((given[x] for x in (*_VIDEO, *_SOURCES) if x in given), None)
        return [Place(tag=VIDEO_MARK) if source is None else pictures.find_video(source)]
    raise Refused(f"turn {turn} has a part of type {shown(repr(kind))}; known are text, image and video")


def _only(given: Mapping[str, Any], known: Sequence[str], turn: int) -> None:
    more = [x for x in given if x not in known]
    if more:
        raise Refused(f"turn {turn} has a part with {shown(str(more[0]))}, which is not read")


def _of_text(text: str, turn: int, pictures: Pictures) -> list[Piece]:
    """`text` cut where it shows an image. Raises Refused for a tag that shows something that is not read."""
    checked_text(text, f"turn {turn}")
    found: list[Piece] = []
    end = 0
    for tag in _TAGS.finditer(text):
        found.append(text[end : tag.start()])
        end = tag.end()
        if tag["file"] is not None:
            found.append(pictures.find(tag["file"]))
        elif tag[0] in (IMAGE_MARK, VIDEO_MARK):
            found.append(Place(tag=tag[0]))
        elif tag["number"] is not None:
            found.append(Place(int(tag["number"]) - 1, tag[0]))
        else:
            raise Refused(f"turn {turn} has {shown(tag[0])}, which is not read; {IMAGE_MARK} marks an image")
    return [x for x in (*found, text[end:]) if x != ""]


def _trimmed(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """`pieces` without the white space before the first text and behind the last one."""
    texts = [i for i, x in enumerate(pieces) if isinstance(x, str) and x.strip()]
    kept: list[Piece] = []
    for i, piece in enumerate(pieces):
        if not isinstance(piece, str):
            kept.append(piece)
        elif texts and texts[0] <= i <= texts[-1]:
            text = piece.lstrip() if i == texts[0] else piece
            kept.append(text.rstrip() if i == texts[-1] else text)
    return tuple(kept)
