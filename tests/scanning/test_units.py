"""Which batches a layer table is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qprobe.measure.runner import isolated_half
from qprobe.records import Sample, asked
from qprobe.runs.needed import Measures, needed_units
from qprobe.runs.store import read_scan, read_units
from qprobe.scanning.samples import cut_samples
from qprobe.scanning.scan import scan
from tests.scanning.asked import Scanned, TinyFolder, options, write_lines


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


def test_isolated_kl_is_measured_once_on_each_sample_of_the_half(scanned: Scanned) -> None:
    run = scanned("mllama").run
    isolated, all_rows = read_units(run, "isolated"), read_units(run, "sensitivity")
    assert not isolated.duplicated(["sample", "layer"]).any()
    assert isolated["sample"].nunique() == (all_rows["sample"].nunique() + 1) // 2
    assert set(isolated["layer"]) == set(all_rows["layer"])
    needed = needed_units(read_scan(run).spec)
    assert needed["isolated"] == len(read_scan(run).spec["isolated"])


def test_a_run_of_before_own_batches_needs_isolated_kl_in_every_batch() -> None:
    spec = {"measures": vars(Measures(True, True)), "calibration": [[], [], []]}
    assert needed_units(spec) == {"weights": 1, "outputs": 3, "kl": 3, "sensitivity": 3, "isolated": 3}
    assert needed_units({**spec, "isolated": [[], []]})["isolated"] == 2


@pytest.mark.slow
def test_samples_of_one_id_are_measured_apart(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    lines = [{"id": name, "prompt": f"what is {i}?"} for i, name in enumerate(["x", "x", None, None, "x", 3])]
    data = write_lines(tmp_path / "data.jsonl", *lines)
    result = scan(**options(tiny_folder("llama"), tmp_path / "run", data=data))
    names = {"x", "x (line 2)", "data-3", "data-4", "x (line 5)", "3"}
    spec = read_scan(result.run).spec
    measured = {s["id"] for part in ("calibration", "held_out") for group in spec[part] for s in group}
    assert measured == names and result.samples == 6 and result.skiplist is not None
    assert any("2 lines with the id of an earlier one: 'x' of line 1" in note for note in result.notes)
