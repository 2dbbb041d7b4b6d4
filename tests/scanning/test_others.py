"""What 4-bit costs on samples of another kind than those that were measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import qprobe
from qprobe.errors import QprobeError, SampleError
from qprobe.manifest.records import NEAREST, NOTHING
from qprobe.records import Sample
from qprobe.selection.verdict import DYNAMIC
from tests.scanning.asked import TinyFolder, options, scan, write_lines

FAST = {"measures": ("activation",), "samples": 6, "batch_size": 2}
OTHERS = [{"prompt": f"Draw {n} boats", "answer": "a bag of red bars" * (n % 2 + 1)} for n in range(5)]


@pytest.mark.slow
def test_the_damage_on_them_is_what_compare_finds_there(tiny_folder: TinyFolder, tmp_path: Path):
    data = write_lines(tmp_path / "boats.jsonl", *OTHERS)
    folder = tiny_folder("llama")
    result = scan(**options(folder, tmp_path / "run", **FAST, budget="+60%", check_data=data))
    manifest = qprobe.read_manifest(result.skiplist)
    found = manifest.other_kinds
    assert found is not None and (found.data, found.samples) == ("boats.jsonl", 5)
    assert [(c.name, c.chosen) for c in found.compared] == [(NOTHING, False), (DYNAMIC, True)]
    assert "On 5 samples of another kind (boats.jsonl) standard 4-bit costs" in result.verdict
    compared = qprobe.compare(result.skiplist, model=str(folder), data=data, device="cpu").rows
    for one, row in zip(found.compared, compared[1:], strict=True):
        assert one.kl == pytest.approx(row.kl, rel=1e-3) and one.kl > 0
    assert "--check-data boats.jsonl" in manifest.made_by.command
    said = json.loads(result.skiplist.read_text())["other_kinds"]["compared"][0]
    assert said["name"] == NOTHING


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_with_calibrated_weights_standard_4_bit_stands_beside_them(tiny_folder: TinyFolder, tmp_path: Path):
    asked = options(tiny_folder("llama"), tmp_path / "run", **FAST, format="nf4-calibrated")
    result = scan(**asked, check_data=OTHERS)
    found = qprobe.read_manifest(result.skiplist).other_kinds
    assert found is not None and found.data == "rows"
    assert [c.name for c in found.compared][:2] == [NEAREST, NOTHING]
    assert found.compared[0].kl != found.compared[1].kl
    assert ", calibrated 4-bit" in result.verdict or "and calibrated 4-bit" in result.verdict


def test_samples_that_are_measured_are_of_no_other_kind(tiny_folder: TinyFolder, tmp_path: Path):
    data = write_lines(tmp_path / "boats.jsonl", *OTHERS)
    asked = options(tiny_folder("llama"), tmp_path / "run", **FAST, data=data)
    with pytest.raises(SampleError, match="each begins as one that is measured already"):
        scan(**asked, check_data=data)
    with pytest.raises(QprobeError, match="nowhere"):
        scan(**asked, check_data=tmp_path / "nowhere.jsonl")
    with pytest.raises(QprobeError, match="--check-data does not apply"):
        scan(str(tiny_folder("llama")), measures=("weight",), check_data=data)


@pytest.mark.slow
def test_samples_that_no_answer_is_given_to_say_nothing_and_the_list_is_written(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def silent(_subject: object, samples: tuple[Sample, ...], *_more: object) -> tuple[Sample, ...]:
        return tuple(s if s.answer else replace(s, answer="") for s in samples)

    monkeypatch.setattr("qprobe.scanning.samples.with_answers", silent)
    asked = options(tiny_folder("llama"), tmp_path / "run", **FAST, data=OTHERS)
    result = scan(**asked, check_data=[{"prompt": "Draw a cat"}, OTHERS[0]])
    said = "1 sample of rows begins as one that is measured, so 1 of 2 say what 4-bit costs on another kind."
    assert said in result.notes
    assert "On the samples of another kind (rows) no damage could be measured." in result.verdict
    assert qprobe.read_manifest(result.skiplist).other_kinds is None
