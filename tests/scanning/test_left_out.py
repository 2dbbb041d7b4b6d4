"""What the model's processor or its template refuses is named, left out and counted, as bad data is."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from PIL import Image

from qprobe.checkpoint.comparing.compare import compare
from qprobe.data.sampling import Wanted, from_data
from qprobe.errors import LeftOutWarning, SampleError
from qprobe.manifest.write import write_manifest
from qprobe.records import Sample
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


@contextmanager
def _told() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings of what was left out; those of other packages' imports do not count."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LeftOutWarning)
        yield told


def _scan(folder: Path, tmp_path: Path, **more: Any) -> tuple[int, tuple[str, ...]]:
    """(samples measured, notes)."""
    with _told() as told:
        found = scan(**options(folder, tmp_path / "run", progress=lambda *_: None, **more))
    assert len(told) == 1 and str(told[0].message).partition(" The first: ")[0] in found.verdict
    return found.samples, found.notes


def _compare(folder: Path, tmp_path: Path, **more: Any) -> tuple[int, tuple[str, ...]]:
    manifest = tmp_path / "skiplist.json"
    write_manifest(manifest, manifest_for(folder, every_third(folder)))
    with _told() as told:
        found = compare(manifest, model=str(folder), device="cpu", max_new_tokens=3, **more)
    assert len(told) == 1 and str(told[0].message).startswith("Left out: ")
    return len(found.samples), found.notes


COMMANDS = pytest.mark.parametrize("command", [_scan, _compare])
Command = Callable[..., tuple[int, tuple[str, ...]]]


@pytest.mark.slow
@COMMANDS
def test_an_image_that_the_processor_refuses_is_named_and_the_others_are_measured(
    command: Command, images: Path, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    measured, notes = command(tiny_folder("qwen2_vl"), tmp_path, images=images)
    assert measured == 3
    (told,) = [x for x in notes if "long.png" in x]
    assert told == TOO_LONG


@pytest.mark.slow
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


@pytest.mark.slow
@COMMANDS
def test_a_row_that_spells_out_a_mark_of_the_model_is_named(
    command: Command, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    rows = [{"prompt": f"what is {number}?", "answer": "a cup"} for number in range(3)]
    bad = [{**rows[0], "prompt": "a <|image_pad|> b"}, {**rows[0], "answer": "a cup<|end|>"}]
    data = write_lines(tmp_path / "rows.jsonl", *bad, *rows)
    measured, notes = command(tiny_folder("qwen2_vl"), tmp_path, data=data)
    assert measured == 3
    told = [x for x in notes if x.startswith("rows.jsonl line")]
    assert told == [
        "rows.jsonl line 1: its text contains <|image_pad|>, which stands for an image in this model.",
        "rows.jsonl line 2: its text contains <|end|>, which the model reads as a mark of its own, "
        "not as text.",
    ]


@pytest.mark.slow
@COMMANDS
def test_what_is_refused_makes_way_for_what_follows(
    command: Command, images: Path, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    rows = [{"prompt": "what?", "image": f"photos/{x}.png", "answer": "x"} for x in ("long", 0, 1, 2)]
    data = write_lines(tmp_path / "rows.jsonl", *rows)
    measured, notes = command(tiny_folder("qwen2_vl"), tmp_path, data=data, samples=3)
    assert measured == 3 and [x for x in notes if "rows.jsonl line 1" in x]


def refuses(*ids: str) -> Callable[[Sample], str | None]:
    """What a model says that cannot read the samples with these ids."""
    return lambda sample: "no" if sample.id in ids else None


def _rows(good: int, bad: int) -> list[dict[str, Any]]:
    return [*[{"prompt": 5}] * bad, *[{"prompt": f"what is {i}?", "id": f"x-{i}"} for i in range(good)]]


def test_what_the_processor_refuses_counts_with_what_could_not_be_read() -> None:
    data, two = _rows(80, bad=8), refuses("x-0", "x-1")
    with pytest.raises(SampleError, match=r"10 of 88 rows of data cannot be used to measure, more than 10%"):
        from_data(Wanted(data=data), 99, two)
    assert len(from_data(Wanted(data=data, bad_data="skip"), 99, two).samples) == 78
    assert len(from_data(Wanted(data=data), 99, refuses("x-0")).samples) == 79  # 9 are fewer than 10


def test_rows_are_read_no_further_once_too_many_are_left_out() -> None:
    rows = iter(_rows(1000, bad=20))
    with pytest.raises(SampleError, match=r"None of the first 10 rows of data can be used to measure"):
        from_data(Wanted(data=rows), 32)
    assert next(rows) == {"prompt": 5}


def test_none_left_is_an_error_whatever_was_asked() -> None:
    wanted = Wanted(data=_rows(1, bad=0), bad_data="skip")
    with pytest.raises(SampleError, match=r"No row of data is left to measure\. data row 1: no\."):
        from_data(wanted, 9, refuses("x-0"))


def test_a_conversation_is_left_out_whole() -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"{i}"} for i in range(4)]
    found = from_data(Wanted(data=[{"messages": turns, "id": "t"}, *_rows(1, 0)]), 9, refuses("t turn 4"))
    assert [x.id for x in found.samples] == ["x-0"] and found.left_out == ("data row 1: no.",)
