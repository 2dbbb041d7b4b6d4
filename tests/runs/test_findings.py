"""What a reader is told of values that are not finite."""

from math import inf, nan
from pathlib import Path

import pandas as pd
import pytest

from qprobe.errors import SampleError
from qprobe.runs.findings import FILE, check_answers, which_ran, write_findings
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import Measures
from tests.runs.runs import four_layers, key_of, make_run, output, rows, spec_of

LINEARS = [x.name for x in four_layers().layers]


def kl(*values: float) -> pd.DataFrame:
    """One answer token for each of the samples a, b, ... under standard 4-bit."""
    return rows("kl", *((name, "standard", 1, value, 1) for name, value in zip("abc", values, strict=False)))


def outputs(**nonfinite: int) -> pd.DataFrame:
    """Outputs of every linear on the samples named, of model.a with so many non-finite ones in 16-bit."""
    return pd.DataFrame(
        [
            output(s, name, 1.0, 0.1, activation_nonfinite=count if name == "model.a" else 0)
            for s, count in nonfinite.items()
            for name in LINEARS
        ]
    )


def found(run: Path) -> tuple[str, ...]:
    folder = RunFolder(run)
    write_findings(folder)
    return folder.notes.get("left-out").notes


def test_where_all_is_finite_nothing_is_told_and_no_file_is_written(tmp_path: Path):
    run = make_run(tmp_path / "run", outputs=[outputs(a=0, b=0)], kl=[kl(0.1, 0.2)])
    assert found(run) == () and not (run / FILE).exists()
    assert which_ran(RunFolder(run)).unmeasured == ()


def test_samples_left_out_of_kl_are_told_apart_by_where_they_broke(tmp_path: Path):
    run = make_run(tmp_path / "run", outputs=[outputs(a=3, b=0, c=0)], kl=[kl(nan, inf, 0.2)])
    said = found(run)
    assert said[1:] == (
        "1 sample left out of KL and sensitivity, since the answer is not finite in 16-bit: a.",
        "1 sample left out of KL and sensitivity, since the answer is not finite in 4-bit: b.",
    )
    assert said[0] == (
        "1 layer with outputs that are not finite in 16-bit, first model.a on a; these values are left out, "
        f"and counted in {FILE}."
    )
    assert (run / FILE).is_file()


def test_a_kl_that_is_finite_on_no_sample_ends_the_scan_and_on_one_does_not(tmp_path: Path):
    none = make_run(tmp_path / "none", outputs=[outputs(a=1, b=0)], kl=[kl(nan, nan)])
    with pytest.raises(SampleError, match=r"None of the 2 samples has a finite KL.*16-bit: a\..*4-bit: b\."):
        write_findings(RunFolder(none))
    check_answers(RunFolder(make_run(tmp_path / "one", outputs=[outputs(a=0, b=0)], kl=[kl(nan, 0.1)])))
    check_answers(RunFolder(make_run(tmp_path / "without", outputs=[outputs(a=1)])))


def test_weights_that_are_not_finite_are_counted_out_of_all_of_their_layer(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    run.open(key_of(four_layers(), spec=spec_of(measures=Measures(True, False))))
    weights = pd.DataFrame(
        [
            {"layer": name, "expert": None, "n": 1, "signal": 1.0, "noise": 0.1, "peak": 1.0,
             "nonfinite": 5 if name == "model.b" else 0}
            for name in LINEARS
        ]
    )  # fmt: skip
    run.write_unit("weights", 0, weights)
    run.write_unit("outputs", 0, outputs(a=0, b=0))
    assert found(run.path) == (
        "1 layer with weights that are not finite in 16-bit or in 4-bit (where one such value spoils the "
        "whole layer); they are left out: model.b (5 of 8,192).",
    )


def test_linears_that_never_ran_are_named_and_counted(tmp_path: Path):
    frame = outputs(a=0)
    run = RunFolder(make_run(tmp_path / "run", outputs=[frame.loc[frame["layer"] != "model.q"]]))
    ran = which_ran(run)
    assert ran.unmeasured == ("model.q",)
    assert ran.notes == ("1 linear never ran on these samples, so not measured: model.q.",)
