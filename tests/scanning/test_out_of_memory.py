"""A scan and a comparison whose batches memory does not hold go on with halves, and say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

import qprobe
from qprobe.calibration import gram
from qprobe.checkpoint.comparing import course
from qprobe.inputs import answers
from qprobe.measure import nonfinite, outputs, runner
from qprobe.measure.attribution import MOST_NODES
from qprobe.runs.folder import RunFolder
from tests.scanning.asked import Scanned, TinyFolder, options, scan

CALIBRATED = "nf4-calibrated"
SAID = "Memory did not suffice for batches of"


class Small:
    """Memory for one sample at a time, wherever a model runs. refused: of batches."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.refused = 0
        for place, name in (
            (runner, "run_model"), (runner, "read_out"), (nonfinite, "run_model"), (gram, "run_model"),
            (outputs, "run_model"), (course, "read_out"),
        ):  # fmt: skip
            if hasattr(place, name):
                patch.setattr(place, name, self.refusing(getattr(place, name)))
        patch.setattr(answers, "_generate", self.refusing_groups(answers._generate))

    def refusing(self, real: Any) -> Any:
        def run(model: Any, batch: Any, *rest: Any) -> Any:
            if len({s.id for s in batch.samples}) > 1:
                self.refused += 1
                raise MemoryError
            return real(model, batch, *rest)

        return run

    def refusing_groups(self, real: Any) -> Any:
        def run(model: Any, processed: Any, group: Any, *rest: Any) -> Any:
            if len(group) > 1:
                self.refused += 1
                raise MemoryError
            return real(model, processed, group, *rest)

        return run


@pytest.mark.slow
def test_a_scan_goes_on_in_halves_and_finds_the_same(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # As many nodes as there may be: with fewer, each half gets more of them by what its own sums miss.
    asked = {"nodes": MOST_NODES}
    whole = RunFolder(scan(**options(tiny_folder("llama"), tmp_path / "whole", **asked)).run)
    small = Small(monkeypatch)
    found = scan(**options(tiny_folder("llama"), tmp_path / "run", **asked))
    assert small.refused and any(x.startswith(f"{SAID} 4, so they ran in parts") for x in found.notes)
    run = RunFolder(found.run)
    assert run.key == whole.key and run.unit_files() == whole.unit_files()
    order = ["sample", "layer"]
    for stage in ("outputs", "sensitivity", "isolated", "kl"):
        keys = [x for x in order if x in run.units(stage)]
        mine, theirs = (x.units(stage).sort_values(keys, ignore_index=True) for x in (run, whole))
        assert_frame_equal(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_calibration_begins_over_in_halves(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = Small(monkeypatch)
    found = scan(
        **options(
            tiny_folder("llama"), tmp_path / "run", samples=3, measures=("activation",), format=CALIBRATED
        )
    )
    assert small.refused and any("1 at once for calibration" in x for x in found.notes)
    assert RunFolder(found.run).codes is not None


@pytest.mark.slow
def test_a_comparison_goes_on_in_halves_with_equal_answers(
    scanned: Scanned, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    def compared() -> Any:
        return qprobe.compare(
            scanned("llama").run / "skiplist.json", model=str(tiny_folder("llama")), device="cpu", samples=2,
            max_new_tokens=2,
        )  # fmt: skip

    whole = compared()
    small = Small(monkeypatch)
    found = compared()
    assert small.refused and any(x.startswith(f"{SAID} 2") for x in found.notes)
    assert [x.answers for x in found.samples] == [x.answers for x in whole.samples]
    assert pd.Series([x.kl for x in found.rows]).to_numpy() == pytest.approx(
        [x.kl for x in whole.rows], rel=1e-2
    )
