"""Readers of what users bring, rows and images, and of a checkpoint's files that transformers reads."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from qprobe.data.images import load_image
from qprobe.data.reading import read_conversations
from qprobe.data.reasons import Refused
from qprobe.data.rendering import Template
from qprobe.errors import ModelError, SampleError
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import skeleton_of
from qprobe.loading.source import resolve
from qprobe.records import Turn
from tests import tiny

PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
ROWS = (
    {"image": "a.png", "prompt": "What?", "answer": "A cat.", "id": "one"},
    {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    },
    {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "A cat."}]},
    {"question": "What?", "answer": "A cat.", "images": ["a.png"], "facts": ["cat"]},
)
TURNS = (Turn("user", ("What?",)), Turn("assistant", ("A cat.",)), Turn("user", ("And?",)))
IN_CHECKPOINT = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
)

Read = Callable[[bytes], object]


def rows_and_images(folder: Path) -> Mapping[str, tuple[Read, tuple[bytes, ...], type[Exception]]]:
    """(reader, good files, what it may raise) by name. folder: an empty one, in which they may write."""
    folder.mkdir()
    (folder / "a.png").write_bytes(tiny.picture(0))
    lines = tuple(json.dumps(x).encode() for x in ROWS)
    table = io.BytesIO()
    pd.DataFrame({"prompt": ["a", "b"], "answer": ["c", "d"], "image": ["a.png", "a.png"]}).to_parquet(table)
    found = {
        "rows.jsonl": (lines[0], lines[1], b"\n".join(lines)),
        "rows.json": (b"[" + b",".join(lines) + b"]",),
        "rows.parquet": (table.getvalue(),),
    }
    readers = {name: (_rows(folder / name), seeds, SampleError) for name, seeds in found.items()}
    return {
        **readers,
        "image": (load_image, tuple(map(_image, ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"))), SampleError),
    }


def checkpoint_files(folder: Path) -> Mapping[str, tuple[Read, tuple[bytes, ...], type[Exception]]]:
    """As `rows_and_images`: each file of a small model, put in the place of the good one and loaded."""
    place = tiny.write("mllama", folder)
    names = [x for x in IN_CHECKPOINT if (place / x).exists()]
    return {f"checkpoint {x}": (_loaded(place, x), ((place / x).read_bytes(),), ModelError) for x in names}


def _rows(path: Path) -> Read:
    def read(data: bytes) -> object:
        path.write_bytes(data)
        return read_conversations(path)

    return read


def _image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((9, 7)).convert("RGB").save(file, kind)
    return file.getvalue()


def _loaded(place: Path, name: str) -> Read:
    good = (place / name).read_bytes()

    @quiet_models()
    def read(data: bytes) -> None:
        (place / name).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other packages, about their files
                source = resolve(str(place))
                if name == "config.json":
                    _ = skeleton_of(source, "bfloat16").model
                _rendered(load_processor(source))
        finally:
            (place / name).write_bytes(good)

    return read


def _rendered(processor: Any) -> None:
    try:
        Template(processor).prompt(TURNS)
    except Refused:
        pass
