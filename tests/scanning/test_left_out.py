"""What the model's processor or its template refuses is named, left out and counted, as bad data is."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from PIL import Image

from qprobe.checkpoint.compare import compare
from qprobe.data.builtin import Origin, Samples
from qprobe.data.sampling import without
from qprobe.errors import SampleError
from qprobe.manifest.write import write_manifest
from qprobe.records import Sample, asked
from tests import tiny
from tests.checkpoint.manifests import every_third, manifest_for
from tests.scanning.asked import TinyFolder, options, scan, write_lines

TOO_LONG = (
    "long.png: left out, the model's processor cannot read it (absolute aspect ratio must be smaller than "
    "200, got 300.0)."
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three pictures, and one of 1 x 300 pixels that Qwen2-VL's processor refuses."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(tiny.picture(number))
    file = io.BytesIO()
    Image.new("RGB", (1, 300)).save(file, "PNG")
    (folder / "long.png").write_bytes(file.getvalue())
    return folder


def _scan(folder: Path, tmp_path: Path, **more: Any) -> tuple[int, tuple[str, ...]]:
    """(samples measured, notes)."""
    found = scan(**options(folder, tmp_path / "run", progress=lambda *_: None, **more))
    return found.samples, found.notes


def _compare(folder: Path, tmp_path: Path, **more: Any) -> tuple[int, tuple[str, ...]]:
    manifest = tmp_path / "skiplist.json"
    write_manifest(manifest, manifest_for(folder, every_third(folder)))
    found = compare(manifest, model=str(folder), device="cpu", max_new_tokens=3, **more)
    return len(found.samples), found.notes


COMMANDS = pytest.mark.parametrize("command", [_scan, _compare])
Command = Callable[..., tuple[int, tuple[str, ...]]]


@COMMANDS
def test_an_image_that_the_processor_refuses_is_named_and_the_others_are_measured(
    command: Command, images: Path, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    measured, notes = command(tiny_folder("qwen2_vl"), tmp_path, images=images)
    assert measured == 3
    (told,) = [x for x in notes if "long.png" in x]
    assert told == TOO_LONG


@COMMANDS
def test_a_row_that_the_template_refuses_is_named(
    command: Command, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = Path(copytree(tiny_folder("llama"), tmp_path / "model"))
    template = folder / "chat_template.jinja"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusing + template.read_text())
    system = {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "a cat"}]}
    rows = [{"prompt": f"what is {number}?", "answer": "a cup"} for number in range(3)]
    data = write_lines(tmp_path / "rows.jsonl", rows[0], system, *rows[1:])
    measured, notes = command(folder, tmp_path, data=data)
    assert measured == 3
    (told,) = [x for x in notes if "no system" in x]
    assert told.startswith("rows.jsonl line 2: the model's chat template does not take it: given strings it")


def _found(good: int, before: int) -> Samples:
    samples = tuple(Sample(f"x-{i}", asked(f"what is {i}?")) for i in range(good))
    return Samples(samples, tuple(f"x line {i}: bad." for i in range(before)), origin=Origin("x", "line"))


def test_what_the_processor_refuses_counts_with_what_could_not_be_read() -> None:
    found = _found(80, before=8)
    refused = [(x, "no") for x in found.samples[:2]]
    with pytest.raises(SampleError, match=r"10 of 88 lines of x cannot be used to measure, more than 10%"):
        without(found, refused, "refuse")
    assert len(without(found, refused, "skip").samples) == 78
    assert len(without(found, refused[:1], "refuse").samples) == 79  # 9 are fewer than 10


def test_none_left_is_an_error_whatever_was_asked() -> None:
    found = _found(1, before=0)
    with pytest.raises(SampleError, match=r"No line of x is left to measure\. x-0: left out, no\."):
        without(found, [(found.samples[0], "no")], "skip")


def test_a_conversation_is_left_out_whole() -> None:
    turns = (asked("one"), asked("two"))
    samples = tuple(Sample(f"t turn {i}", x, conversation="t") for i, x in enumerate(turns))
    other = Sample("u", asked("three"))
    found = Samples((*samples, other), origin=Origin("x", "line", {"t": "x line 1: ", "u": "x line 2: "}))
    left = without(found, [(samples[1], "no")], "refuse")
    assert (left.samples, left.left_out) == ((other,), ("x line 1: no.",))
