"""The samples of a run as a reader is shown them: RUN/samples.json, without torch.

A list, one object a calibration sample: id, prompt, answer; thumbnail (a JPEG as a data URI, null without an
image) and size (its width and height in pixels); tokens (the text of each token of prompt and answer, null
for one that stands for a part of the image); grid (how the image was cut into patches, null where unknown);
decoded (the text of each token that the decoder behind an encoder reads, which `tokens` then lacks).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qprobe.errors import RunError
from qprobe.models.grid import Grid
from qprobe.runs.access import MOST_BYTES
from qprobe.runs.measured import Measured
from qprobe.system.decoding import strict_json
from qprobe.system.wording import shortened

FILE = "samples.json"

# Nothing else may become the source of an image in a page.
_THUMBNAIL = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True)
class ShownSample:
    """One sample as in the module's first lines."""

    id: str
    prompt: str
    answer: str | None
    thumbnail: str | None
    size: tuple[int, int] | None
    tokens: tuple[str | None, ...]
    grid: Grid | None
    decoded: tuple[str, ...] = ()


def write_shown(run: Measured, samples: Sequence[ShownSample]) -> None:
    """Write RUN/samples.json whole or not at all; raises RunError if the disk refuses.

    The last of very many samples are left out, so that a reader can hold the others.
    """
    shown = list(samples)
    while len(data := _encoded(shown)) > MOST_BYTES:
        del shown[len(shown) * 3 // 4 :]
    run.files.write({FILE: (data, len(shown))})


def _encoded(samples: Sequence[ShownSample]) -> bytes:
    return (json.dumps([asdict(s) for s in samples], ensure_ascii=False) + "\n").encode("utf-8", "replace")


def parse_shown(path: Path, data: bytes) -> dict[str, ShownSample]:
    """The samples by id in `data`, the bytes of the samples.json at `path`; RunError if it is damaged."""
    try:
        return {s.id: s for s in map(_sample, strict_json(data))}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise RunError(
            f"{path} is damaged ({shortened(str(error), 100)}). Delete it; the report does without, and the "
            "same scan writes it again."
        ) from None


def _sample(data: dict[str, Any]) -> ShownSample:
    """The sample of a JSON object; ValueError, TypeError, LookupError or AttributeError if it is none."""
    grid = None if data["grid"] is None else Grid(**data["grid"])
    size = None if data["size"] is None else (int(data["size"][0]), int(data["size"][1]))
    rows = {key: tuple(data[key]) for key in ("tokens", "decoded")}
    sample = ShownSample(**{**data, "grid": grid, "size": size, **rows})
    given = (t for t in (sample.answer, *sample.tokens) if t is not None)
    texts = (sample.id, sample.prompt, *sample.decoded, *given)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"sample {sample.id!r} holds something that is no text")
    if grid is not None and not all(type(n) is int and n > 0 for n in vars(grid).values()):
        raise ValueError(f"sample {sample.id!r} has the grid {grid}")
    if sample.thumbnail is not None and not _THUMBNAIL.fullmatch(sample.thumbnail):
        raise ValueError(f"the thumbnail of sample {sample.id!r} is no JPEG")
    return sample
