"""Where the worst token was, in words: known answers by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from qprobe.errors import RunError
from qprobe.models.grid import Grid
from qprobe.report.worst import patch_at, worst_tokens
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import peaks
from qprobe.runs.shown import FILE, ShownSample, write_shown
from tests.report.full_run import ANSWER, write_full_run
from tests.runs.runs import inventory_of, linear, make_run, output

SQUARE = Grid(1, 10, 10)
TILES = Grid(4, 40, 40)


@pytest.mark.parametrize(
    ("grid", "index", "rows", "spot"),
    [
        (SQUARE, 0, 100, (0, 0, 0, 10, 10)),  # patches alone, line after line
        (SQUARE, 37, 100, (0, 3, 7, 10, 10)),
        (SQUARE, 0, 101, (0, None, None, 10, 10)),  # a class token first
        (SQUARE, 38, 101, (0, 3, 7, 10, 10)),
        (SQUARE, 38, 104, (0, 3, 7, 10, 10)),  # padded to a multiple of 8
        (SQUARE, 102, 104, None),  # a pad
        (TILES, 1608 + 1, 4 * 1608, (1, 0, 0, 40, 40)),  # Llama 3.2 Vision: 1601 tokens padded to 1608
        (Grid(1, 4, 6, 2), 5, 24, (0, 0, 3, 4, 6)),  # block 1 holds columns 2 and 3; its second patch
        (Grid(1, 4, 6, 2), 14, 24, (0, 3, 0, 4, 6)),  # block 3 begins the second row of blocks
        (Grid(1, 4, 6, 2), 4, 6, (0, 1, 1, 2, 3)),  # merged: one token per block
        (SQUARE, 5, 77, None),  # a number of tokens that says nothing
        (SQUARE, 105, 105, None),
        (TILES, 0, 4 * 1608 + 1, None),
    ],
)
def test_a_vision_token_has_a_place_in_the_image(grid: Grid, index: int, rows: int, spot: object):
    assert patch_at(grid, index, rows) == spot


def test_an_answer_token_is_shown_in_its_text(tmp_path: Path):
    folder = write_full_run(tmp_path)
    worst = worst_tokens(RunFolder(folder), RunFolder(folder).samples)[peaks(RunFolder(folder))["layer"][14]]
    # the sequence is <s>, image, "What?", then the answer; token 6 is its fourth
    assert (worst.kind, worst.token, worst.text) == ("answer", 6, ANSWER[3])
    assert worst.before == "<s> [image] What?The dial shows" and worst.after == "."
    assert worst.place == "answer token 7 of 8" and worst.box is None


def test_an_answer_token_of_a_decoder_is_shown_in_what_the_decoder_reads(tmp_path: Path):
    folder = write_full_run(tmp_path)
    run = RunFolder(folder)
    layer = peaks(run)["layer"][14]  # eight tokens, the worst of them token 6, an answer's
    read = ("</s>", "<s>", "It", " shows", " a", " dial", " at", " 7")
    samples = {
        name: ShownSample(**{**vars(x), "tokens": ("<s>", "Look", "</s>"), "decoded": read})
        for name, x in run.samples.items()
    }
    worst = worst_tokens(run, samples)[layer]
    assert (worst.before, worst.text, worst.after) == ("</s><s>It shows a dial", " at", " 7")


def test_a_patch_is_shown_on_its_image_only_if_the_patches_cover_it(tmp_path: Path):
    folder = write_full_run(tmp_path)
    layer, index = peaks(RunFolder(folder))["layer"][3], int(peaks(RunFolder(folder))["token"][3])
    sample = RunFolder(folder).samples[peaks(RunFolder(folder))["sample"][3]]
    row, column = divmod(index - 1, 10)
    found = worst_tokens(RunFolder(folder), {sample.id: sample})[layer]
    assert found.place == f"patch in row {row + 1} of 10, column {column + 1} of 10"
    assert found.box == (column / 10, row / 10, 0.1, 0.1)
    wide = ShownSample(**{**vars(sample), "size": (280, 140)})
    assert worst_tokens(RunFolder(folder), {sample.id: wide})[layer].box is None


def test_without_samples_the_index_alone_is_said(tmp_path: Path):
    folder = write_full_run(tmp_path)
    worst = worst_tokens(RunFolder(folder), {})
    assert len(worst) == 30 and worst[peaks(RunFolder(folder))["layer"][14]].place == "answer token 7 of 8"


def test_a_token_of_experts_is_shown_in_the_sequence_and_not_among_those_of_one_expert(tmp_path: Path):
    fused = replace(linear("model.experts"), shape=(2, 64, 64))
    peak = {"activation_peak": 9.0, "peak_token": 3, "peak_kind": "answer"}
    rows = [
        output("a", fused.name, 1.0, 0.1, expert=0, tokens=2, **peak),
        output("a", fused.name, 1.0, 0.1, expert=1, tokens=4, **{**peak, "activation_peak": 1.0}),
    ]
    run = RunFolder(make_run(tmp_path / "run", inventory_of(fused), outputs=[pd.DataFrame(rows)]))
    sample = ShownSample("a", "what?", "it is", None, None, ("<s>", "what?", " it", " is", "</s>"), None)
    worst = worst_tokens(run, {"a": sample})[fused.name]
    assert (worst.place, worst.text, worst.before) == ("answer token 4 of 5", " is", "<s>what? it")
    assert worst_tokens(run, {})[fused.name].place == "answer token 4"


def test_samples_read_back_as_written(tmp_path: Path):
    sample = ShownSample("ü</script>", "what?", None, None, None, ("a", None, "�"), None, ("<s>", "ü"))
    write_shown(RunFolder(tmp_path), [sample])
    assert RunFolder(tmp_path).samples == {sample.id: sample}
    assert RunFolder(tmp_path / "elsewhere").samples == {}


WHOLE = {
    "id": "a", "prompt": "", "answer": None, "thumbnail": None, "size": None, "tokens": [], "grid": None,
    "decoded": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"id": 1},
        {"tokens": [1]},
        {"decoded": [None]},
        {"thumbnail": "https://x/y.jpg"},
        {"grid": {"tiles": 0, "rows": 1, "columns": 1, "merge": 1}},
        {"more": 1},
    ],
)
def test_damaged_samples_are_refused(tmp_path: Path, change: dict):
    (tmp_path / FILE).write_text(json.dumps([WHOLE]))
    assert list(RunFolder(tmp_path).samples) == ["a"]
    for damaged in (json.dumps([{**WHOLE, **change}]), "[", "[1]"):
        (tmp_path / FILE).write_text(damaged)
        with pytest.raises(RunError, match=r"samples\.json is damaged"):
            _ = RunFolder(tmp_path).samples
