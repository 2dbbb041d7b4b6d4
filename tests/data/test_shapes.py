"""Every shape of a row gives the same turns, images and order of parts in scan, compare and finetune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qprobe.data.images import file_bytes
from qprobe.data.reading import read_conversations
from qprobe.data.sampling import Wanted, choose_samples
from qprobe.data.turns import learning
from qprobe.records import Turn
from tests.data.shapes import SHAPES, Shape, files


def said(turns: tuple[Turn, ...]) -> list[tuple[str, list[str | bytes]]]:
    return [(x.role, [file_bytes(p) if isinstance(p, Path) else p for p in x.parts]) for x in turns]


def turns_in(command: str, data: Any) -> list[tuple[str, list[str | bytes]]]:
    """What the command reads of the one row of `data`: the last sample of a scan, or what is trained on."""
    if command == "finetune":
        (found,) = read_conversations(data).good
        return said(learning(found, "each").turns)
    samples = choose_samples("m", True, Wanted(data=data), "scan" if command == "scan" else "compare")
    last = samples.samples[-1]
    assert samples.notes == () and last.answer is not None
    return [*said(last.turns), ("assistant", [last.answer])]


@pytest.mark.parametrize("command", ["scan", "compare", "finetune"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: x.name)
def test_a_shape_means_the_same_in_every_command(shape: Shape, command: str, tmp_path: Path):
    path = files(tmp_path) / "rows.jsonl"
    path.write_text(json.dumps(shape.row(tmp_path)))
    assert turns_in(command, path) == shape.turns


@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: x.name)
def test_a_row_in_memory_means_what_it_means_in_a_file(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(files(tmp_path))
    assert turns_in("scan", [shape.row(tmp_path)]) == turns_in("finetune", iter([shape.row(tmp_path)]))
    assert turns_in("scan", [shape.row(tmp_path)]) == shape.turns


def test_there_are_forty_shapes_and_no_two_have_one_name():
    assert len(SHAPES) == len({x.name for x in SHAPES}) >= 40
