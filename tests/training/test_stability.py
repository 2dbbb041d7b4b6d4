"""The stability study: what it keeps, what it makes again, and the figures of its report."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.benchmarks.stability import BASES, Outcome, Run, conditions, files_key, kept_outcome, key_of
from tests.benchmarks.stability_report import COLOURS, off_16bit, spread, unrest, write_report

pytestmark = pytest.mark.slow


def outcome(base: str, seed: int, losses: list[float]) -> Outcome:
    steps = tuple((i, x) for i, x in enumerate(losses, start=1))
    return Outcome(
        "demo", base, seed, len(losses), steps, 9.0, 1.0, 0.1, 0.3, 0.9, 0.8, 5.0, "a CPU, torch 1"
    )


def test_a_kept_outcome_is_read_again_and_one_that_lacks_a_figure_is_made_again(tmp_path: Path):
    run = Run("demo", "nf4", 1, 2, tmp_path, "cpu", "abc")
    path = tmp_path / "outcomes" / "demo-nf4-1-2-abc.json"
    path.parent.mkdir()
    assert kept_outcome(run) is None
    mine = outcome("nf4", 1, [2.0, 1.0])
    path.write_text(json.dumps(asdict(mine)))
    assert kept_outcome(run) == mine and kept_outcome(replace(run, key="abd")) is None
    path.write_text(json.dumps({key: x for key, x in asdict(mine).items() if key != "made_with"}))
    assert kept_outcome(run) is None


def test_outcomes_of_other_conditions_are_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    found = conditions("cpu")
    assert key_of(found) == key_of(conditions("cpu"))
    keys = {key_of({**found, name: "other"}) for name in found} | {key_of(found)}
    assert len(keys) == len(found) + 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert key_of(conditions("cpu")) not in keys
    (tmp_path / "a.py").write_text("1")
    before = files_key(tmp_path.glob("*"))
    (tmp_path / "a.py").write_text("2")
    assert files_key(tmp_path.glob("*")) != before


def test_every_base_has_a_colour_and_so_a_row():
    assert list(BASES) == list(COLOURS)


def test_distance_to_16bit_is_over_the_steps_asked_for():
    mine, reference = (asdict(outcome("nf4", 0, x)) for x in ([5.0, 3.0], [1.0, 0.0]))
    assert off_16bit(mine, reference) == math.sqrt((16 + 9) / 2)
    assert off_16bit(mine, reference, 1) == 3.0


def test_unrest_is_relative_to_the_mean_of_the_tail():
    # 50 steps of 3 and 1 in turn: deviation 1, mean 2; the 100 before them do not count
    assert unrest(asdict(outcome("nf4", 0, [100.0] * 100 + [3.0, 1.0] * 25))) == 0.5


def test_spread_shows_the_range_of_several_seeds():
    assert spread([2.0]) == "2"
    assert spread([1.0, 4.0]) == "2.5 (1 to 4)"


def test_the_report_pairs_seeds_and_says_what_it_was_made_with(tmp_path: Path):
    pytest.importorskip("matplotlib")
    # Seed 1 of nf4 has no 16-bit run beside it, so only seed 0 tells a distance: 2 at both steps.
    made = [
        outcome("16-bit", 0, [4.0, 2.0]),
        outcome("nf4", 0, [6.0, 4.0]),
        outcome("nf4", 1, [50.0, 40.0]),
        outcome("corrected", 0, [5.0, 3.0]),
    ]
    write_report([asdict(x) for x in made], tmp_path)
    text = (tmp_path / "stability.md").read_text()
    row = next(x for x in text.splitlines() if x.startswith("| nf4 |"))
    assert row.split(" | ")[1] == "2" and row.endswith("| 2 | 2 |")
    row = next(x for x in text.splitlines() if x.startswith("| corrected |"))
    assert row.endswith("| 1 | 1 |")
    assert "a CPU, torch 1" in text and (tmp_path / "losses.png").stat().st_size > 1000
