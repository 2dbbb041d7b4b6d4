"""Folders, tables and objects that hold rows: splits stay apart, and bad rows are named."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from qprobe.data.reading import Reading, read_conversations
from qprobe.errors import SampleError
from tests.data.test_sources import BYTES, answers, lines, table


def test_parquet_files_named_by_splits_are_told_apart(tmp_path: Path):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(BYTES[:1]), tmp_path / f"{name}.parquet")
    assert answers(tmp_path, Reading(split="test")) == ["0"]


@pytest.mark.parametrize("suffix", ["", "-00000-of-00001"])
def test_files_of_several_splits_are_never_read_as_one(suffix: str, tmp_path: Path):
    for name in ("train", "validation"):
        rows = [{"prompt": "which?", "answer": name}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}{suffix}.parquet")
    with pytest.raises(SampleError, match=r"has the splits train, validation\. Pass one of them to --split"):
        read_conversations(tmp_path)
    (found,) = read_conversations(tmp_path, Reading(split="validation")).good
    assert found.turns[-1].text == "validation"


def test_splits_in_one_object_are_told_apart(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({x: [{"prompt": "which?", "answer": x}] for x in ("train", "test")}))
    assert [x.turns[-1].text for x in read_conversations(path, Reading(split="test")).good] == ["test"]
    with pytest.raises(SampleError, match=r"has the splits train, test\. Pass one"):
        read_conversations(path)
    path.write_text(json.dumps({"data": [{"prompt": "a"}]}))
    with pytest.raises(SampleError, match="no split 'test'"):
        read_conversations(path, Reading(split="test"))


def test_an_object_that_is_a_row_is_one_whatever_it_holds(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": "b", "data": [{"x": 1}]}))
    assert [x.turns[0].text for x in read_conversations(path).good] == ["a"]


def test_files_of_several_kinds_in_a_folder_are_not_guessed_at(tmp_path: Path):
    lines(tmp_path / "a.jsonl")
    table(tmp_path / "b.csv")
    with pytest.raises(SampleError, match=r"several kinds \(a\.jsonl, b\.csv\)"):
        read_conversations(tmp_path)


def test_a_table_names_its_bad_rows(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text(
        'prompt,choices,answer\n"What, now?",,"A ""cat""\nand a dog"\na,b\n'
        "which?,\"['x', 'y']\",1\nwhich?,['x' 'y'],1\n"
    )
    found = read_conversations(path)
    assert [[x.text for x in one.turns] for one in found.good] == [
        ["What, now?", 'A "cat"\nand a dog'], ["which?\nA. x\nB. y", "B"]
    ]  # fmt: skip
    assert [(x.row, x.why) for x in found.skipped] == [
        (2, "it has 2 cells and the table 3 columns"),
        (4, "['x' 'y'] is a list that neither JSON nor Python reads"),
    ]


def test_lists_that_pandas_reads_of_parquet_are_lists(tmp_path: Path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "x.parquet")
    (found,) = read_conversations(pandas.read_parquet(tmp_path / "x.parquet")).good
    assert [x.text for x in found.turns] == ["a", "b"]
