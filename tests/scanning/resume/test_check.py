"""`scan --check`: units measured again are those of the run, or are named."""

from __future__ import annotations

import math
from pathlib import Path
from shutil import copytree
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch

from qprobe.errors import QprobeError, RunError
from qprobe.runs.folder import RunFolder
from qprobe.runs.units import encode_unit, largest_difference
from qprobe.scanning import repeat
from qprobe.scanning.repeat import _near
from tests.runs.runs import make_run, output, rows
from tests.scanning.asked import scan
from tests.scanning.resume.runs import contents, options


def check(llama: Path, run: Path, **changes: Any) -> str:
    asked = options(llama, run, **changes)
    return scan(**{**asked, "out": None, "check": run}).verdict


@pytest.mark.slow
def test_units_measured_again_are_equal_to_the_bit_and_nothing_in_the_run_changes(llama: Path, whole: Path):
    before = contents(whole)
    said = check(llama, whole)
    assert "were measured again on this CPU: all are equal to the bit." in said
    assert contents(whole) == before


@pytest.mark.slow
def test_a_unit_with_another_number_in_it_is_named(llama: Path, whole: Path, tmp_path: Path):
    run = RunFolder(Path(copytree(whole, tmp_path / "run")))
    frame = run.units("kl")
    first = frame["sample"] == frame["sample"].iloc[0]
    (number,) = [x for x in frame.columns if frame[x].dtype == "float64"]
    frame.loc[frame.index[0], number] *= 1 + 1e-15
    run.write_unit("kl", 0, frame[first | (frame["sample"] == frame["sample"].unique()[1])])
    with pytest.raises(
        RunError, match=r"1 of \d+ units of .*, are not the recorded ones to the bit: kl-00000"
    ):
        check(llama, run.path)


def test_another_command_is_refused_with_what_differs(llama: Path, whole: Path):
    with pytest.raises(
        RunError, match=r"this command differs from it in 1 place: spec\.measures\.nodes: 2 -> 3"
    ):
        check(llama, whole, nodes=3)
    with pytest.raises(QprobeError, match="so --out does not apply"):
        scan(**{**options(llama, whole), "check": whole})


@pytest.mark.slow
def test_a_scan_of_the_weights_alone_is_checked_too(llama: Path, tmp_path: Path):
    alone: dict[str, Any] = {"measures": ("weight",), "samples": None, "batch_size": 4, "max_new_tokens": 64}
    scan(**options(llama, tmp_path / "run", **alone))
    assert "1 of 1 unit of" in check(llama, tmp_path / "run", **alone)


def kl(value: float) -> pa.Table:
    return encode_unit("kl", rows("kl", ("a", "standard", 3, value, 2), ("b", "standard", 3, 4.0, 2)))[1]


def test_on_a_gpu_a_unit_may_differ_as_two_runs_do_and_not_by_more(tmp_path: Path):
    run = RunFolder(make_run(tmp_path / "run"))
    run.put_unit("kl-00000.parquet", b"", kl(1.0))
    cuda = torch.device("cuda")

    def near(first: float, second: float) -> str:
        return _near(run, {"kl-00000.parquet": kl(first)}, {"kl-00000.parquet": kl(second)}, cuda)

    # The largest value is 4, so 0.004 is a thousandth of it; two runs differ by a fifth of that.
    assert "differ by up to 0.001 of a column's largest value, two runs now by up to 0.0002" in near(
        1.004, 1.0032
    )
    with pytest.raises(RunError, match=r"by up to 0\.001 .* now by up to 5e-05; 10 times as much"):
        near(1.004, 1.0038)
    assert "by up to 4e-07" in near(1 + 1.6e-6, 1 + 1.6e-6)  # the same kernels now, as another card


def test_a_peak_that_moved_to_a_token_of_another_kind_is_said_and_refuses_nothing(tmp_path: Path):
    run, name, cuda = RunFolder(make_run(tmp_path / "run")), "outputs-00000.parquet", torch.device("cuda")

    def unit(**changes: Any) -> pa.Table:
        return encode_unit("outputs", pd.DataFrame([output("a", "model.a", 1.0, 0.1, **changes)]))[1]

    run.put_unit(name, b"", unit())
    assert _near(run, {name: unit()}, {name: unit()}, cuda).endswith("two runs now by up to 0.")
    moved = unit(peak_kind="vision")
    assert _near(run, {name: moved}, {name: moved}, cuda).endswith(" 1 peak is at a token of another kind.")
    with pytest.raises(RunError, match="are not the recorded ones"):
        higher = {name: unit(peak_kind="vision", activation_peak=1.5)}
        _near(run, higher, higher, cuda)


def test_an_infinite_sum_hides_no_difference_beside_it():
    def of(first: float, second: float) -> pa.Table:
        frame = rows("kl", ("a", "standard", 3, first, 2), ("b", "standard", 3, second, 2))
        return encode_unit("kl", frame)[1]

    # inf - inf is NaN, which is no larger than any number.
    assert largest_difference(of(math.inf, 4.0), of(math.inf, 4.0)) == 0
    assert largest_difference(of(math.inf, 4.0), of(math.inf, 5.0)) == 0.25
    assert largest_difference(of(math.inf, 4.0), of(1.0, 4.0)) == math.inf
    assert largest_difference(of(1.0, 4.0), of(math.inf, 4.0)) == math.inf
    assert largest_difference(of(-math.inf, 4.0), of(math.inf, 4.0)) == math.inf


def test_answer_tokens_do_not_differ_and_the_same_choices_may():
    def of(tokens: int, same: int) -> pa.Table:
        return encode_unit("kl", rows("kl", ("a", "standard", tokens, 1.0, same)))[1]

    assert largest_difference(of(3, 2), of(3, 1)) == 0
    assert largest_difference(of(3, 2), of(4, 2)) == math.inf


@pytest.mark.slow
def test_a_run_without_a_unit_that_is_measured_again_is_not_said_to_be_equal(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(repeat, "UNITS", 1)  # the first one, which is not there
    run = Path(copytree(whole, tmp_path / "run"))
    for path in (run / "units").glob("*.parquet"):
        if not path.name.endswith("-00001.parquet"):
            path.unlink()
    with pytest.raises(RunError, match="holds no finished unit that a check measures again"):
        check(llama, run)
