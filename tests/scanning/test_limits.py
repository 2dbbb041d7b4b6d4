"""Ablation, bounds on KL, and another request of the same run."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import numpy as np
import pandas as pd
import pytest

from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.errors import BudgetError
from qprobe.manifest.read import read_manifest
from qprobe.runs.folder import RunFolder
from tests.scanning.asked import Scanned, TinyFolder, options, scan

pytestmark = pytest.mark.slow


def test_ablation_of_the_most_sensitive_layers(scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path):
    run = Path(copytree(scanned("llama").run, tmp_path / "run"))
    steps: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "ablation":
            steps.append((done, total))

    result = scan(**options(tiny_folder("llama"), run, ablate="3"), progress=progress)
    frame = pd.read_csv(run / "ablation.csv")
    assert list(frame) == ["layer", "kl_isolated", "kl_isolated_se", "kl_saved", "kl_saved_se", "samples"]
    ranks = pd.read_csv(run / "ranks.csv").set_index("layer")["rank"]
    assert sorted(ranks[frame["layer"]]) == [1, 2, 3]
    assert frame["layer"].tolist() == [x for x in RunFolder(run).table["layer"] if x in set(frame["layer"])]
    assert (frame["kl_isolated"] > 0).all() and (frame["samples"] == 4).all()
    assert steps[-1][0] == steps[-1][1] and result.seconds["ablate"] > 0
    # The same units again: nothing is measured twice.
    steps.clear()
    before = (run / "ablation.csv").read_bytes()
    scan(**options(tiny_folder("llama"), run, ablate=" , ".join(frame["layer"][::-1])), progress=progress)
    assert steps == [] and (run / "ablation.csv").read_bytes() == before


def test_ablation_of_all_layers_leaves_out_the_fixed_ones(tiny_folder: TinyFolder, tmp_path: Path):
    run = scan(**options(tiny_folder("llama_tied"), tmp_path / "run", ablate="all")).run
    frame, inventory = pd.read_csv(run / "ablation.csv"), RunFolder(run).scan.inventory
    assert frame["layer"].tolist() == [x.name for x in inventory.layers if not x.fixed]
    # Sensitivities approximate what ablation measures: the same scale, and mostly the same order.
    sensitivity = RunFolder(run).table.set_index("layer")["sensitivity_kl"][frame["layer"]]
    between = (frame["kl_isolated"] + frame["kl_saved"]) / 2
    assert np.corrcoef(between.rank(), sensitivity.rank())[0, 1] > 0.5


def test_a_bound_on_kl_is_met_on_the_held_out_samples(tiny_folder: TinyFolder, tmp_path: Path):
    result = scan(**options(tiny_folder("llama"), tmp_path / "run", max_kl=0.5))
    manifest = read_manifest(result.run / "skiplist.json")
    assert result.kl_dynamic is not None and result.kl_dynamic <= 0.5 < (result.kl_standard_4bit or 0)
    assert manifest.budget.requested == "max-kl 0.5"
    assert manifest.made_by.command.endswith("--max-kl 0.5")
    assert manifest.compared[0].name == "nothing kept" and 2 <= len(manifest.compared) <= 7
    within = [x for x in manifest.compared if x.kl is not None and x.kl <= 0.5]
    (chosen,) = [x for x in manifest.compared if x.chosen]
    assert chosen.total_bytes == min(x.total_bytes for x in within) == manifest.budget.total_bytes
    assert ", within the 0.5 asked for, " in result.verdict
    load_dynamic_4bit(manifest, str(tiny_folder("llama")), "cpu")


def test_a_bound_that_standard_4bit_meets_keeps_nothing(tiny_folder: TinyFolder, tmp_path: Path):
    result = scan(**options(tiny_folder("llama"), tmp_path / "run", max_kl=50.0))
    manifest = read_manifest(result.run / "skiplist.json")
    assert manifest.skip_modules == ("lm_head",) and "; nothing is kept." in result.verdict
    assert [x.chosen for x in manifest.compared] == [True]


def test_a_bound_out_of_reach_says_the_smallest_that_was_reached(tiny_folder: TinyFolder, tmp_path: Path):
    with pytest.raises(BudgetError, match=r"No list short of 16-bit leaves a KL of 1e-09 .* Pass --max-kl"):
        scan(**options(tiny_folder("llama"), tmp_path / "run", max_kl=1e-9))
    assert not (tmp_path / "run" / "skiplist.json").exists()


def test_another_request_measures_only_new_lists(
    scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Path(copytree(scanned("llama").run, tmp_path / "run"))
    monkeypatch.setattr("qprobe.measure.held_out.candidate_kl", lambda *_: pytest.fail("measured again"))
    result = scan(**options(tiny_folder("llama"), run, budget="+10.0%"))
    assert result.notes == scanned("llama").notes  # those of the first selection do not stay behind
