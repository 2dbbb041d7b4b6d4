"""Ranking of layers by a column, and how far the sensitivities add up to the damage."""

from math import nan
from pathlib import Path

import pandas as pd
import pytest

from qprobe.errors import QprobeError
from qprobe.runs.folder import RunFolder, layer_table
from qprobe.runs.layers.table import attribution_residual, rank_table
from tests.runs.runs import make_run, output, rows


def ranked_run(folder: Path) -> pd.DataFrame:
    noise = {"model.a": 0.1, "model.q": 0.3, "model.k": 0.1}
    return layer_table(
        make_run(folder, outputs=[pd.DataFrame([output("s", x, 1.0, e) for x, e in noise.items()])])
    )


def test_ranking_puts_damage_first_ties_in_execution_order_and_unknown_last(tmp_path: Path):
    table = ranked_run(tmp_path / "run")
    ranked = rank_table(table, "activation_nmse")
    assert ranked["layer"].tolist() == ["model.q", "model.a", "model.k", "model.b", "lm_head"]
    assert ranked.index.tolist() == [1, 2, 3, 4, 5]
    # In decibels low is bad, so the order is the same.
    assert rank_table(table, "activation_sqnr_db", 3)["layer"].tolist() == ["model.q", "model.a", "model.k"]


def test_ranking_by_what_is_no_measured_column_names_those_that_are(tmp_path: Path):
    table = ranked_run(tmp_path / "run")
    names = "activation_nmse, activation_sqnr_db, activation_peak"
    with pytest.raises(QprobeError, match=f"'bytes_4bit' is no measure.*Measured are {names}"):
        rank_table(table, "bytes_4bit")
    with pytest.raises(QprobeError, match=f"'sensitivity_kl' was not measured.*Measured are {names}"):
        rank_table(table, "sensitivity_kl")
    with pytest.raises(QprobeError, match="--top 0 shows no layer"):
        rank_table(table, "activation_nmse", 0)
    with pytest.raises(QprobeError, match="Nothing is measured yet"):
        rank_table(layer_table(make_run(tmp_path / "empty")), "weight_nmse")


def test_residual_compares_the_sum_of_sensitivities_with_the_measured_kl(tmp_path: Path):
    # a: 1 + 2 attributed of 4 measured; b: 3 of 2; c is left out, a part of it is unknown. (6 - 6) / 6 = 0.
    run = make_run(
        tmp_path / "run",
        kl=[
            rows(
                "kl", ("a", "standard", 2, 4.0, 1), ("b", "standard", 2, 2.0, 1), ("c", "standard", 2, 9.0, 1)
            )
        ],
        sensitivity=[
            rows("sensitivity", ("a", "model.a", 2, 1.0), ("a", "model.b", 2, 2.0), ("b", "model.a", 2, 3.0)),
            rows("sensitivity", ("c", "model.a", 2, nan), ("d", "model.a", 2, 7.0)),
        ],
    )
    assert attribution_residual(RunFolder(run)) == 0.0


def test_residual_is_a_share_of_the_measured_kl_and_none_without_one(tmp_path: Path):
    parts = rows("sensitivity", ("a", "model.a", 2, 1.0), ("a", "model.b", 2, 2.0))
    kl = rows("kl", ("a", "standard", 2, 4.0, 1), ("a", "other", 2, 1.0, 1))
    assert attribution_residual(RunFolder(make_run(tmp_path / "one", kl=[kl], sensitivity=[parts]))) == -0.25
    assert attribution_residual(RunFolder(make_run(tmp_path / "two", sensitivity=[parts]))) is None
    assert attribution_residual(RunFolder(make_run(tmp_path / "three", kl=[kl]))) is None
