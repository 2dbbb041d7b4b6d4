"""Which batches a layer table is measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qprobe.measure.runner import isolated_half
from qprobe.records import Sample, asked
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import Measures, Spec
from qprobe.scanning.samples import cut_samples
from tests.scanning.asked import Scanned, TinyFolder, options, scan, write_lines


class TwoShapes:
    """Stands in for a subject whose samples have one image shape where they are named so, and another."""

    def one_shape_groups(self, samples: tuple[Sample, ...]) -> list[tuple[Sample, ...]]:
        return [tuple(s for s in samples if s.id[0] == shape) for shape in "ab"]

    def groups(self, samples: tuple[Sample, ...], size: int) -> list[tuple[Sample, ...]]:
        return [samples] if samples else []


@pytest.mark.parametrize("size", [1, 2, 4])
def test_isolated_kl_has_full_batches_of_one_shape(size: int) -> None:
    samples = tuple(Sample(f"{shape}{i}", asked(str(i)), answer="yes") for i in range(11) for shape in "ab")
    subject: Any = TwoShapes()
    work = cut_samples(subject, samples, (), size, ())
    found = [s.id for group in work.isolated for s in group]
    assert sorted(found) == sorted(isolated_half(samples)) and len(found) == 11
    assert all(len({s.id[0] for s in group}) == 1 for group in work.isolated)
    assert sum(len(group) < size for group in work.isolated) <= 2  # the last one of each shape


@pytest.mark.slow
def test_isolated_kl_is_measured_once_on_each_sample_of_the_half(scanned: Scanned) -> None:
    run = scanned("mllama").run
    isolated, all_rows = RunFolder(run).units("isolated"), RunFolder(run).units("sensitivity")
    assert not isolated.duplicated(["sample", "layer"]).any()
    assert isolated["sample"].nunique() == (all_rows["sample"].nunique() + 1) // 2
    assert set(isolated["layer"]) == set(all_rows["layer"])
    spec = RunFolder(run).key.spec
    assert spec.needed_units["isolated"] == len(spec.isolated)


def test_a_table_needs_the_units_of_what_was_asked_for() -> None:
    spec = Spec("w", "cpu", Measures(True, True), calibration=((), (), ()), isolated=((), ()))
    assert spec.needed_units == {"weights": 1, "outputs": 3, "kl": 3, "sensitivity": 3, "isolated": 2}
    without = replace(spec, measures=Measures(True, True, nodes=1))
    assert without.needed_units == {"weights": 1, "outputs": 3, "kl": 3, "sensitivity": 3}
    assert Spec("w", "cpu", files=("a", "b")).needed_units == {"weights": 2}
    with pytest.raises(ValueError, match="measures is None, and 0 files are named"):
        Spec("w", "cpu")


@pytest.mark.slow
def test_samples_of_one_id_are_measured_apart(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    lines = [{"id": name, "prompt": f"what is {i}?"} for i, name in enumerate(["x", "x", None, None, "x", 3])]
    data = write_lines(tmp_path / "data.jsonl", *lines)
    result = scan(**options(tiny_folder("llama"), tmp_path / "run", data=data))
    names = {"x", "x (line 2)", "data-3", "data-4", "x (line 5)", "3"}
    spec = RunFolder(result.run).key.spec
    measured = {s.id for group in (*spec.calibration, *spec.held_out) for s in group}
    assert measured == names and result.samples == 6 and result.skiplist is not None
    assert any("2 lines with the id of an earlier one: 'x' of line 1" in note for note in result.notes)
