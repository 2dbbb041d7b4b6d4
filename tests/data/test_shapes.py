"""Every shape of a row gives the same turns, images and order of parts in scan, compare and finetune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qprobe.data.reading import read_conversations
from qprobe.data.sampling import Wanted, choose_samples
from qprobe.data.turns import held, learning
from qprobe.records import Turn, Video
from tests.data.shapes import SHAPES, Shape, files

Turns = list[tuple[str, list[str | bytes | tuple[bytes, ...]]]]


def said(turns: tuple[Turn, ...]) -> Turns:
    """Of a video its frames."""
    return [(x.role, [p.frames if isinstance(p, Video) else p for p in x.parts]) for x in held(turns)]


def read_in(command: str, data: Any) -> tuple[Turns, list[str]]:
    """(turns, notes) of the one row of `data`: of the last sample of a scan, or of what is trained on."""
    if command == "finetune":
        found = read_conversations(data)
        turns, notes = said(learning(found.good[0], "each").turns), found.notes
    else:
        samples = choose_samples("m", True, Wanted(data=data), "scan" if command == "scan" else "compare")
        last, notes = samples.samples[-1], samples.notes
        assert last.answer is not None
        turns = [*said(last.turns), ("assistant", [last.answer])]
    return turns, [x.partition(": ")[2] for x in notes]


@pytest.mark.parametrize("command", ["scan", "compare", "finetune"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: x.name)
def test_a_shape_means_the_same_in_every_command(shape: Shape, command: str, tmp_path: Path):
    path = files(tmp_path) / "rows.jsonl"
    path.write_text(json.dumps(shape.row(tmp_path)))
    assert read_in(command, path) == (shape.turns, [*shape.notes])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: x.name)
def test_a_row_in_memory_means_what_it_means_in_a_file(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(files(tmp_path))
    row = shape.row(tmp_path)
    assert read_in("scan", [row]) == read_in("finetune", iter([row]))
    assert read_in("scan", [row]) == (shape.turns, [x.replace("1 line", "1 row") for x in shape.notes])


def test_there_are_sixty_shapes_and_no_two_have_one_name():
    assert len(SHAPES) == len({x.name for x in SHAPES}) >= 60
