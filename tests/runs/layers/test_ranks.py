"""Bootstrap intervals of the sensitivity ranking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qprobe.errors import RunError
from qprobe.runs.folder import RunFolder, layer_table
from qprobe.runs.layers.ranks import rank_intervals, write_ranks
from qprobe.runs.layers.table import rank_table
from tests.runs.runs import inventory_of, linear, make_run, rows

NAMES = [f"l{i}" for i in range(6)]


def run_of(folder: Path, kl: np.ndarray, tokens: int = 2, names: list[str] = NAMES) -> Path:
    """A run of (samples, layers) values `kl`, nats over `tokens` answer tokens each."""
    values = [
        (f"s{i:03d}", name, tokens, float(kl[i, j])) for i in range(len(kl)) for j, name in enumerate(names)
    ]
    inventory = inventory_of(*(linear(name) for name in NAMES), linear("lm_head", fixed="lm_head"))
    return make_run(folder, inventory, sensitivity=[rows("sensitivity", *values)])


def noisy(samples: int, spread: float) -> np.ndarray:
    means = np.array([1.0, 6.0, 3.0, 2.0, 5.0, 4.0])
    return means + spread * np.random.default_rng(3).normal(size=(samples, 6))


def test_ranks_are_those_of_the_layer_table(tmp_path: Path):
    run = run_of(tmp_path / "run", noisy(12, 2.0))
    ranked = rank_table(layer_table(run), "sensitivity_kl")
    found = rank_intervals(RunFolder(run)).set_index("layer")["rank"]
    assert [found[name] for name in ranked["layer"][:6]] == [1, 2, 3, 4, 5, 6]
    assert list(rank_intervals(RunFolder(run))["layer"]) == [*NAMES, "lm_head"]


def test_layers_that_never_change_places_have_one_rank(tmp_path: Path):
    found = rank_intervals(RunFolder(run_of(tmp_path / "run", noisy(12, 0.01))))
    assert found["rank"].tolist()[:6] == [6, 1, 4, 5, 2, 3]
    assert (found["rank"] == found["rank_low"]).all() and (found["rank"] == found["rank_high"]).all()


def test_more_samples_make_it_surer(tmp_path: Path):
    few, many = (rank_intervals(RunFolder(run_of(tmp_path / str(n), noisy(n, 3.0)))) for n in (6, 200))
    width_few, width_many = ((x["rank_high"] - x["rank_low"]).sum() for x in (few, many))
    assert width_many < width_few


@pytest.mark.slow
def test_an_interval_holds_90_percent_of_slow_resamples(tmp_path: Path):
    kl = noisy(8, 3.0)
    found = rank_intervals(RunFolder(run_of(tmp_path / "run", kl)))
    rng = np.random.default_rng(99)
    drawn = np.zeros((2000, 6))
    for one in drawn:
        means = kl[rng.integers(0, 8, 8)].mean(axis=0)
        one[:] = [1 + sum(means[k] > means[j] for k in range(6)) for j in range(6)]
    low, high = (found[name].to_numpy(dtype=float)[:6] for name in ("rank_low", "rank_high"))
    inside = ((drawn >= low) & (drawn <= high)).mean(axis=0)
    assert (inside >= 0.87).all()  # at least 90 %, less the error of two finite bootstraps
    # And no wider: a rank further in, on either side, and more than 5 % lie beyond.
    assert ((drawn <= low).mean(axis=0) > 0.04).all() and ((drawn >= high).mean(axis=0) > 0.04).all()


def test_the_cut_of_the_units_changes_nothing(tmp_path: Path):
    kl = noisy(8, 3.0)
    whole = run_of(tmp_path / "whole", kl)
    values = [(f"s{i:03d}", name, 2, float(kl[i, j])) for i in range(8) for j, name in enumerate(NAMES)]
    parts = [rows("sensitivity", *values[24:]), rows("sensitivity", *values[:24])]
    inventory = inventory_of(*(linear(name) for name in NAMES), linear("lm_head", fixed="lm_head"))
    cut = make_run(tmp_path / "cut", inventory, sensitivity=parts)
    pd.testing.assert_frame_equal(rank_intervals(RunFolder(whole)), rank_intervals(RunFolder(cut)))


def test_what_was_not_measured_has_no_rank(tmp_path: Path):
    kl = noisy(8, 1.0)[:, :5]
    found = rank_intervals(RunFolder(run_of(tmp_path / "run", kl, names=NAMES[:5]))).set_index("layer")
    assert found.loc[["l5", "lm_head"]].isna().all(axis=None)
    assert sorted(found["rank"].dropna()) == [1, 2, 3, 4, 5]


def test_one_sample_gives_ranks_without_intervals(tmp_path: Path):
    found = rank_intervals(RunFolder(run_of(tmp_path / "run", noisy(1, 1.0))))
    assert found["rank"].notna().sum() == 6 and found["rank_low"].isna().all()


def test_a_sample_without_a_finite_kl_does_not_enter(tmp_path: Path):
    kl = noisy(8, 1.0)
    clean = rank_intervals(RunFolder(run_of(tmp_path / "clean", kl)))
    poisoned = np.vstack([kl, np.full((1, 6), np.nan)])
    pd.testing.assert_frame_equal(rank_intervals(RunFolder(run_of(tmp_path / "poisoned", poisoned))), clean)


def test_the_file_comes_back_and_is_byte_identical(tmp_path: Path):
    run = run_of(tmp_path / "run", noisy(8, 3.0))
    assert RunFolder(run).ranks is None
    write_ranks(RunFolder(run))
    first = (run / "ranks.csv").read_bytes()
    assert (
        first.splitlines()[0] == b"layer,rank,rank_low,rank_high" and first.splitlines()[-1] == b"lm_head,,,"
    )
    write_ranks(RunFolder(run))
    assert (run / "ranks.csv").read_bytes() == first
    back = RunFolder(run).ranks
    assert back is not None
    pd.testing.assert_frame_equal(back, rank_intervals(RunFolder(run)), check_dtype=False)
    (run / "ranks.csv").write_text("layer,rank\nl0,one\n")
    with pytest.raises(RunError, match=r"ranks\.csv is damaged"):
        _ = RunFolder(run).ranks


def test_nothing_is_written_without_a_sensitivity(tmp_path: Path):
    run = make_run(tmp_path / "run")
    write_ranks(RunFolder(run))
    assert not (run / "ranks.csv").exists()
