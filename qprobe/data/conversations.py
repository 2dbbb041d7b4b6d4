"""Conversations to train on, from a JSONL file; each line that cannot be trained on is named, with why."""

from __future__ import annotations

import codecs
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qprobe.errors import SampleError
from qprobe.options import Progress, no_progress
from qprobe.system.decoding import strict_json
from qprobe.system.wording import counted
from qprobe.system.wording import named as listed_names

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
IMAGE_MARK = "<image>"  # where the picture stands in the text, as LLaVA's data has it
LONGEST_NAME = 80  # characters of a file's name that a reason repeats
SHOWN = 5  # bad lines that an error message spells out


@dataclass(frozen=True)
class Turn:
    """One turn. image: "before" or "after" its text, or None without one."""

    role: Role
    text: str
    image: Literal["before", "after"] | None = None


@dataclass(frozen=True)
class Conversation:
    """One line of the file: turns that end with the assistant's, at most one of them showing `image`.

    image: a file, or the bytes of one; None for text alone.
    """

    line: int
    turns: tuple[Turn, ...]
    image: Path | bytes | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be trained on, and why."""

    line: int
    why: str


@dataclass(frozen=True)
class Conversations:
    """What a file holds; name: the file's name, for messages."""

    name: str
    good: tuple[Conversation, ...]
    bad: tuple[BadLine, ...]

    def sentences(self) -> tuple[str, ...]:
        """One sentence a bad line."""
        return tuple(f"{self.name} line {x.line}: {x.why}." for x in self.bad)


def read_conversations(path: Path, progress: Progress = no_progress) -> Conversations:
    """The conversations of the JSONL file `path`; image paths are relative to its folder.

    A line is {"image": path, "conversations": [{"from": "human" | "gpt", "value"}, ...]}, {"messages":
    [{"role", "content"}, ...]} with an image beside or inside, or {"image", "prompt", "answer"}. Every image
    is decoded once. Raises SampleError if the file cannot be read or has no line.
    """
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # which some editors put in front
        lines = [(n, x) for n, x in enumerate(data.split(b"\n"), start=1) if x.strip()]
    except OSError as error:
        raise SampleError(
            f"{path} cannot be read ({error.strerror}). Pass a .jsonl file to --data."
        ) from error
    if not lines:
        raise SampleError(f"{path} is empty. Each line is a JSON object with an image and a conversation.")
    good: list[Conversation] = []
    bad: list[BadLine] = []
    seen: dict[Path, str | None] = {}
    for done, (number, line) in enumerate(lines, start=1):
        try:
            found = _conversation(number, _record(line), path.parent)
            if isinstance(found.image, Path):
                if found.image not in seen:
                    seen[found.image] = image_problem(found.image)
                _refuse(seen[found.image])
            good.append(found)
        except ValueError as error:
            bad.append(BadLine(number, str(error)))
        progress("read data", done, len(lines))
    return Conversations(path.name, tuple(good), tuple(bad))


def keep_good(found: Conversations, bad_data: Literal["refuse", "skip"]) -> tuple[Conversation, ...]:
    """The good lines, where bad ones may be skipped; raises SampleError for a bad line or if none is good."""
    sentences = found.sentences()
    more = (f"And {len(sentences) - SHOWN} more.",) if len(sentences) > SHOWN else ()
    shown = " ".join((*sentences[:SHOWN], *more))
    if sentences and bad_data == "refuse":
        raise SampleError(
            f"{len(sentences)} of {counted(len(sentences) + len(found.good), 'line')} cannot be trained on. "
            f"{shown} Mend them, or pass --bad-data skip to train without them."
        )
    if not found.good:
        raise SampleError(f"No line of {found.name} can be trained on. {shown} Mend them.")
    return found.good


def image_problem(path: Path) -> str | None:
    """Why the image file cannot be trained on; None if Pillow decodes it whole."""
    from PIL import Image, UnidentifiedImageError

    name = path.name if len(path.name) <= LONGEST_NAME else f"{path.name[:LONGEST_NAME]}..."
    limit = Image.MAX_IMAGE_PIXELS or 89_478_485  # Pillow's own: above it a small file may fill the memory
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            return f"image {path} is no file"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                pixels = image.width * image.height
                if pixels > limit:
                    return (
                        f"image {name} has {pixels / 1e6:.0f} megapixels, more than the "
                        f"{limit / 1e6:.0f} that are safe to decode"
                    )
                image.load()
    except FileNotFoundError:
        return f"image {path} does not exist"
    except UnidentifiedImageError:
        return f"image {name} is no image"
    except Image.DecompressionBombError:
        return f"image {name} has more than {2 * limit / 1e6:.0f} megapixels"
    except (OSError, ValueError, SyntaxError) as error:
        return f"image {name} cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(problem)


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = strict_json(line)
    except ValueError as error:
        raise ValueError(f"it is no whole JSON object ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    return record


def conversation_of(row: dict[str, Any]) -> Conversation:
    """The conversation of a row as TRL has it: {"messages"} or {"prompt", "completion"} in turns, {"images"}.

    images: at most one, of Pillow. Raises SampleError, saying why, for a row that cannot be trained on.
    """
    images = row.get("images") or [x for x in (row.get("image"),) if x is not None]
    try:
        if len(images) > 1:
            raise ValueError(f"it has {len(images)} images; one is supported")
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        turns, _ = _turns({"messages": messages})
        _place_image(turns, bool(images))
        _check_order(turns)
    except (ValueError, KeyError, TypeError) as error:
        raise SampleError(f"A row of the data set cannot be trained on: {error}. Mend or drop it.") from error
    return Conversation(0, tuple(turns), _png(images[0]) if images else None)


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, format="PNG")
    return file.getvalue()


def _conversation(number: int, record: dict[str, Any], folder: Path) -> Conversation:
    """The conversation of a decoded line. Raises ValueError, saying why, if it makes none."""
    turns, inside = _turns(record)
    image = _image(record, inside)
    _place_image(turns, image is not None)
    _check_order(turns)
    return Conversation(number, tuple(turns), None if image is None else folder / image)


def _place_image(turns: list[Turn], has_image: bool) -> None:
    """Marks the turn that shows the image, the first of the user where none says so."""
    marked = [i for i, turn in enumerate(turns) if turn.image]
    if len(marked) > 1:
        raise ValueError(f"{len(marked)} of its turns have an image; one is supported")
    if marked and not has_image:
        raise ValueError(f"turn {marked[0] + 1} has an {IMAGE_MARK}, but the line names no image file")
    if has_image and not marked:
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            turns[first] = Turn("user", turns[first].text, "before")


def _turns(record: dict[str, Any]) -> tuple[list[Turn], list[str]]:
    """(turns, image files named inside them)."""
    keys = [x for x in ("conversations", "messages") if x in record]
    asked = [x for x in ("prompt", "answer") if x in record]
    if len(keys) > 1 or (keys and asked):
        one, other = (*keys, *asked)[:2]
        raise ValueError(f"it has both {one} and {other}; which one is meant?")
    if len(asked) == 1:
        missing = "answer" if asked == ["prompt"] else "prompt"
        raise ValueError(f"it has no {missing} beside its {asked[0]}")
    if asked:
        raw: list[tuple[Any, Any]] = [("user", record["prompt"]), ("assistant", record["answer"])]
    elif not keys:
        there = listed_names(sorted(record)) or "nothing"
        raise ValueError(
            f"it has none of conversations, messages, or prompt and answer, but {there[:LONGEST_NAME]}"
        )
    else:
        who, what = ("from", "value") if keys[0] == "conversations" else ("role", "content")
        listed = record[keys[0]]
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"its {keys[0]} are empty")
        if not all(isinstance(x, dict) for x in listed):
            raise ValueError(f"its {keys[0]} are not a list of objects")
        raw = [(x.get(who), x.get(what)) for x in listed]
    turns: list[Turn] = []
    images: list[str] = []
    for place, (role, content) in enumerate(raw, start=1):
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"turn {place} is from {role!r}; known are {', '.join(ROLES)}")
        text, named = _content(content, place)
        images += named
        turns.append(_turn(ROLES[role], text, place))
    return turns, images


def _content(content: Any, place: int) -> tuple[str, list[str]]:
    """(text with a mark where an image stands, image files) of a turn's content."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or not all(isinstance(x, dict) for x in content):
        raise ValueError(f"turn {place} has no text")
    pieces: list[str] = []
    files: list[str] = []
    for part in content:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind == "image":
            pieces.append(IMAGE_MARK)
            named = next((part[x] for x in ("image", "path", "url") if part.get(x) is not None), None)
            if named is not None:
                files.append(_file_name(named))
        else:
            raise ValueError(f"turn {place} has a part of type {kind!r}; known are text and image")
    return "\n".join(pieces), files


def _turn(role: Role, text: str, place: int) -> Turn:
    count = text.count(IMAGE_MARK)
    if count and role != "user":
        raise ValueError(f"turn {place} of the {role} has an {IMAGE_MARK}; only the user shows one")
    if count > 1:
        raise ValueError(f"turn {place} has {count} images; one is supported")
    before, _, after = text.partition(IMAGE_MARK)
    clean = "\n".join(x.strip() for x in (before, after) if x.strip()) if count else text.strip()
    if not clean and not count:
        raise ValueError(f"turn {place} of the {role} is empty")
    if not count:
        return Turn(role, clean)
    return Turn(role, clean, "after" if before.strip() and not after.strip() else "before")


def _image(record: dict[str, Any], inside: list[str]) -> str | None:
    """The one image file that the line names, beside its turns or inside them."""
    named: list[str] = list(inside)
    for key in ("image", "images"):
        value = record.get(key)
        if value is not None:
            named += [_file_name(x) for x in (value if isinstance(value, list) else [value])]
    distinct = list(dict.fromkeys(named))
    if len(distinct) > 1:
        raise ValueError(f"it names {len(distinct)} images; one is supported")
    return distinct[0] if distinct else None


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its image is {value!r}, which is no path of a file")
    if "://" in value or value.startswith("data:"):
        raise ValueError(f"its image is the address {value[:LONGEST_NAME]}; only files are read")
    return value


def _check_order(turns: Sequence[Turn]) -> None:
    """Raises ValueError unless user and assistant take turns, the user first and the assistant last."""
    spoken = list(_after_system(turns))
    for place, turn in spoken:
        expected = "user" if (place - spoken[0][0]) % 2 == 0 else "assistant"
        if turn.role != expected:
            raise ValueError(f"turn {place} is the {turn.role}'s, where the {expected} must speak")
    if not spoken:
        raise ValueError("it has no turn but the system's")
    if spoken[-1][1].role != "assistant":
        raise ValueError("its last turn is the user's, so there is no answer to learn")


def _after_system(turns: Sequence[Turn]) -> Iterator[tuple[int, Turn]]:
    """(number, turn) of all turns but a first one of the system."""
    for place, turn in enumerate(turns, start=1):
        if place > 1 or turn.role != "system":
            yield place, turn
