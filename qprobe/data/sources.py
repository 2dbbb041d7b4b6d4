"""Samples from a folder of images, a JSONL file, or photographs that scikit-image ships.

A file that cannot be used is skipped and named; only when none is left is it an error.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qprobe.errors import SampleError
from qprobe.records import Sample, asked
from qprobe.system.wording import counted, named

DEFAULT_PROMPT = "Describe this image in detail."

# Varied kinds that lie in scikit-image's wheel (no download): people, animals, medicine, space, parts,
# documents, textures, products.
PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "ihc.png",
    "hubble_deep_field.jpg", "motorcycle_left.png", "page.png", "coins.png", "camera.png",
    "clock_motion.png", "cell.png", "brick.png", "grass.png", "gravel.png", "horse.png", "moon.png",
    "text.png", "microaneurysms.png",
)  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """Usable samples, and a sentence for each thing that was left out."""

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...] = ()


def from_folder(folder: Path, prompt: str | None = None, limit: int | None = None) -> Samples:
    """One sample for each image file of `folder` (not its subfolders), in name order, at most `limit`.

    Raises SampleError if the folder is missing, empty, or holds no readable image.
    """
    files = image_files(folder)
    found: list[Sample] = []
    skipped: list[str] = []
    for path in files:
        if limit is not None and len(found) >= limit:
            break
        problem, data = read_image(path)
        if data is None:
            skipped.append(f"{path.name}: skipped, {problem}")
        else:
            found.append(Sample(path.name, asked(prompt or DEFAULT_PROMPT, data)))
    if not found:
        raise SampleError(f"None of the {len(files)} files in {folder} is a readable image ({skipped[0]}).")
    return Samples(tuple(found), tuple(skipped))


def image_files(folder: Path) -> list[Path]:
    """The files of `folder` that may be images, in name order; SampleError if there is no folder or file."""
    if folder.exists() and not folder.is_dir():
        raise SampleError(
            f"{folder} is a file, and --images takes a folder of images. Pass its folder, or a .jsonl file "
            f"with --data."
        )
    if not folder.is_dir():
        raise SampleError(f"Image folder {folder} does not exist. Pass a folder of image files to --images.")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not files:
        raise SampleError(f"Image folder {folder} is empty. Put PNG or JPEG files there.")
    return files


def photographs(prompt: str | None = None, limit: int | None = None, offset: int = 0) -> Samples:
    """Photographs that scikit-image ships, from number `offset` on, at most `limit`."""
    from skimage import data_dir

    found = []
    for name in PHOTOGRAPHS[offset:][:limit]:
        _, data = read_image(Path(data_dir) / name)
        if data is not None:
            found.append(Sample(name, asked(prompt or DEFAULT_PROMPT, data)))
    if not found:
        raise SampleError(f"No photograph is left from number {offset} on; there are {len(PHOTOGRAPHS)}.")
    return Samples(tuple(found))


def read_image(path: Path) -> tuple[str, bytes | None]:
    """(problem, bytes): the file's bytes if Pillow decodes it, else None and why not."""
    from PIL import Image, UnidentifiedImageError

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except UnidentifiedImageError:
        return "it is no image", None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"it cannot be read ({error})", None
    except Image.DecompressionBombWarning as error:  # raised only where warnings are errors
        return f"it is too large ({error})", None
    return "", data


def from_jsonl(path: Path, prompt: str | None = None, limit: int | None = None) -> Samples:
    """One sample a line of `path`, at most `limit`; image paths are relative to the file's folder.

    A line is {"image", "prompt", "answer"}, {"image", "conversations": [{"from", "value"}, ...]} or
    {"messages": [{"role", "content"}, ...]}; the first question and its answer are used, "image" and
    the answer may be missing. "id" names the sample; without one, or where it is null, the line does, and a
    line that repeats an earlier one's id is told apart by its number: measurements are kept by id.
    Raises SampleError if the file is missing or no line is usable.
    """
    check_file(path)
    found: dict[int, Sample] = {}
    skipped: list[str] = []
    for number, line in _lines(path):
        if limit is not None and len(found) >= limit:
            break
        try:
            record = json.loads(line.decode("utf-8"))
            found[number] = _sample(record, f"{path.stem}-{number}", path.parent, prompt)
        except UnicodeDecodeError as error:
            where = f"byte {error.start + 1}"
            skipped.append(f"{path.name} line {number}: skipped, it is not UTF-8 ({where}); save it as UTF-8")
        except KeyError as error:
            skipped.append(f"{path.name} line {number}: skipped, it has no key {error}")
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            skipped.append(f"{path.name} line {number}: skipped, {error}")
    if not found:
        why = f" ({skipped[0]})" if skipped else ""
        raise SampleError(
            f'{path} holds no usable line{why}. A line is a JSON object with "prompt", the question, and, if '
            f'there are, "image", a file, and "answer"; lines of text alone are fine.'
        )
    samples, repeated = _told_apart(found)
    note = f"{path.name}: {counted(len(repeated), 'line')} with the id of an earlier one: {named(repeated)}."
    return Samples(samples, (*skipped, *((note,) if repeated else ())))


def _told_apart(found: Mapping[int, Sample]) -> tuple[tuple[Sample, ...], list[str]]:
    """(samples of the lines, each with an id of its own; what was changed)."""
    lines: dict[str, int] = {}  # of each id
    samples, repeated = [], []
    for number, sample in found.items():
        fresh = sample.id
        while fresh in lines:
            fresh += f" (line {number})"
        if fresh != sample.id:
            repeated.append(f"{sample.id!r} of line {lines[sample.id]} is called {fresh!r} in line {number}")
        lines[fresh] = number
        samples.append(replace(sample, id=fresh))
    return tuple(samples), repeated


def check_file(path: Path) -> None:
    """Raises SampleError unless `path` is a file."""
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        raise SampleError(f"Data file {path} {what}. Pass a .jsonl file to --data.")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line


def _sample(record: dict, name: str, folder: Path, prompt: str | None) -> Sample:
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    question, answer, image = _turns(record)
    image = record.get("image", image)
    if isinstance(image, list):
        if len(image) > 1:
            raise ValueError(f"it has {len(image)} images; one is supported")
        image = image[0] if image else None
    data = None
    if image is not None:
        problem, data = read_image(folder / str(image))
        if data is None:
            raise ValueError(f"image {image}: {problem}")
    question = question or prompt or (DEFAULT_PROMPT if data else None)
    if not question:
        raise ValueError('it has neither a question ("prompt") nor an "image"')
    given = record.get("id")
    return Sample(name if given is None or given == "" else str(given), asked(question, data), answer or None)


def _turns(record: dict) -> tuple[str | None, str | None, str | None]:
    """(question, answer, image) of the first exchange of a record."""
    if "messages" in record:
        turns = [(m["role"], m["content"]) for m in record["messages"]]
    elif "conversations" in record:
        roles = {"human": "user", "gpt": "assistant"}
        turns = [(roles.get(t["from"], t["from"]), t["value"]) for t in record["conversations"]]
    else:
        return record.get("prompt"), record.get("answer"), None
    question = answer = image = None
    for role, content in turns:
        text, picture = _content(content)
        image = image or picture
        if role == "user" and question is None:
            question = text
        elif role == "assistant" and question is not None:
            answer = text
            break
    if question is None:
        raise ValueError("it has no turn of the user")
    return question, answer, image


def _content(content: str | list) -> tuple[str, str | None]:
    """(text, image) of a message's content: a string or a list of typed parts."""
    if isinstance(content, str):
        return content.replace("<image>", "").strip(), None
    texts = [part["text"] for part in content if part.get("type") == "text"]
    images = [part.get("image") or part.get("path") for part in content if part.get("type") == "image"]
    return "\n".join(texts).strip(), next((i for i in images if i), None)
