"""From a run folder to a manifest."""

import re
import subprocess
import sys
from math import nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qprobe.errors import BudgetError, QprobeError, RunError
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Quality
from qprobe.manifest.write import write_manifest
from qprobe.records import Inventory
from qprobe.runs.folder import RunFolder, layer_table
from qprobe.runs.layers.table import write_table
from qprobe.runs.units import candidate_stage
from qprobe.selection.budget import Budget
from qprobe.selection.scores import ScoredRun, damage_of
from qprobe.selection.select import select
from qprobe.selection.skiplist import SkipList
from qprobe.selection.to_manifest import held_out_quality, manifest_of
from tests.runs.runs import four_layers, inventory_of, linear, make_run, output, rows, scan_of
from tests.timed import least

NOISE = {"model.a": 0.031, "model.q": 0.5, "model.k": 0.001}  # model.b never ran


@pytest.fixture
def run(tmp_path: Path) -> Path:
    outputs = pd.DataFrame([output("s", name, 1.0, noise) for name, noise in NOISE.items()])
    folder = make_run(tmp_path / "run", outputs=[outputs])
    write_table(RunFolder(folder))
    return folder


def with_sensitivity(run: Path) -> Path:
    values = (("s", "model.a", 2, 1.0), ("s", "model.q", 2, 0.02), ("s", "model.k", 2, 0.02))
    RunFolder(run).write_unit("sensitivity", 0, rows("sensitivity", *values))
    write_table(RunFolder(run))
    return run


def test_manifest_says_what_is_kept_and_why(run: Path):
    # NF4: 2,116 bytes a 64 x 64 layer, 6,076 more in 16-bit; the group needs 12,152.
    manifest = select(run, "+20000B")
    assert {x.name: x.reason for x in manifest.layers} == {
        "model.a": "kept: activation_nmse 0.031, rank 2 of 3",
        "model.q": "kept: activation_nmse 0.5, rank 1 of 3, moves with its group of 2",
        "model.k": "kept: activation_nmse 0.001, rank 3 of 3, moves with its group of 2",
        "model.b": "not measured on these samples, NF4",
        "lm_head": "lm_head stays in 16-bit",
    }
    assert manifest.skip_modules == ("model.a", "model.q", "model.k", "lm_head")
    assert manifest.budget.total_bytes == manifest.budget.standard_4bit_bytes + 3 * 6076
    small = select(run, "+7000B")
    assert small.skip_modules == ("model.a", "lm_head")
    assert [x.reason for x in small.layers][1:3] == ["NF4", "NF4"]


def test_manifest_is_valid_and_holds_the_run(run: Path, tmp_path: Path):
    manifest = select(run, "+10%")
    write_manifest(tmp_path / "skiplist.json", manifest)
    assert read_manifest(tmp_path / "skiplist.json") == manifest
    scan = scan_of(four_layers())
    assert (manifest.model, manifest.format, manifest.uncovered) == (
        scan.model, scan.format, scan.inventory.uncovered,
    )  # fmt: skip
    assert manifest.made_by.command == "qprobe select run --budget +10%"
    sizes = sum(x.bytes for x in manifest.layers)
    assert manifest.budget.total_bytes == scan.inventory.other_bytes + sizes


def test_sensitivity_chooses_where_it_was_measured(run: Path):
    assert select(with_sensitivity(run), "+12200B").skip_modules == ("model.a", "lm_head")
    by_activation = select(run, "+12200B", by="activation_nmse")
    assert by_activation.skip_modules == ("model.q", "model.k", "lm_head")
    assert by_activation.made_by.command == "qprobe select run --budget +12200B --by activation_nmse"


def test_predicted_kl_is_the_sensitivity_of_what_stays_in_4_bit(run: Path):
    assert select(run, "+12200B").quality == Quality(None, None, None, None)
    # (0.02 + 0.02) nats over 2 answer tokens are left when model.a, 0.5 a token, is kept.
    manifest = select(with_sensitivity(run), "+12200B")
    assert manifest.quality.kl_predicted == 0.02
    assert manifest.layers[0].sensitivity_kl == 0.5 and manifest.layers[3].sensitivity_kl is None


def test_quality_holds_what_was_measured_on_held_out_samples_of_this_very_list(run: Path):
    with_sensitivity(run)
    standard = rows("kl", ("x", "any", 2, 1.0, 1), ("y", "any", 6, 1.0, 1), ("z", "any", 3, nan, 0))
    RunFolder(run).write_unit(candidate_stage(frozenset()), 0, standard)
    RunFolder(run).write_unit(
        candidate_stage(frozenset({"model.a"})), 0, standard.assign(kl_sum=[0.2, 0.2, nan])
    )
    quality = select(run, "+12200B").quality
    # Tokens, not samples, have equal weight: 2 / 8 and not (1/2 + 1/6) / 2.
    assert (quality.samples, quality.kl_standard_4bit, quality.kl_dynamic) == (2, 0.25, 0.05)
    assert select(run, "+30000B").quality.kl_dynamic is None


def test_a_bound_on_kl_takes_the_fewest_bytes_that_are_predicted_to_meet_it(run: Path):
    # 0.5 + 0.01 + 0.01 nats per token: 0.02 is left with model.a, all with nothing, 0 with the group too
    with_sensitivity(run)
    for bound, kept in ((0.6, ()), (0.1, ("model.a",)), (0.001, ("model.a", "model.q", "model.k"))):
        manifest = select(run, max_kl=bound)
        assert manifest.skip_modules == (*kept, "lm_head")
        assert manifest.quality.kl_predicted is not None and manifest.quality.kl_predicted <= bound
        assert manifest.budget.requested == f"max-kl {bound}"
        assert manifest.made_by.command == f"qprobe select run --max-kl {bound}"


def measured(run: Path, kept: tuple[str, ...], kl: float) -> None:
    """One held-out answer token on which the list `kept` costs `kl` nats."""
    stage = candidate_stage(frozenset(kept))
    RunFolder(run).write_unit(stage, 0, rows("kl", ("x", "any", 1, kl, 1)))


def test_a_list_within_a_bound_by_prediction_alone_is_refused_with_what_measured_within_it(run: Path):
    with_sensitivity(run)
    everything = ("model.a", "model.q", "model.k")
    large = select(run, max_kl=0.001).budget.total_bytes
    measured(run, (), 0.9)
    measured(run, ("model.a",), 0.1)
    assert select(run, max_kl=0.1).skip_modules == ("model.a", "lm_head")  # at the bound is within it
    measured(run, ("model.a",), 0.12)
    least = (
        rf"held-out sample: 0\.12, with .* is 0\.12, with {large - 2 * 6076:,} bytes\. Pass --max-kl 0\.12 or"
    )
    with pytest.raises(BudgetError, match=least):
        select(run, max_kl=0.1)
    measured(run, everything, 0.11)
    with pytest.raises(BudgetError, match=rf"is 0\.11, with {large:,} bytes\. Pass --max-kl 0\.11 or more"):
        select(run, max_kl=0.1)
    measured(run, everything, 0.03)
    with pytest.raises(BudgetError, match=rf"within it leaves 0\.03, .* Pass --budget {large}B in place"):
        select(run, max_kl=0.1)
    assert select(run, f"{large}B").skip_modules == (*everything, "lm_head")


def test_the_list_that_measured_within_a_bound_is_chosen_as_said_where_another_score_would_choose(run: Path):
    # Sensitivities sum to 1.04 of a measured KL of 2, so isolated KL chooses unless --by says otherwise.
    folder = RunFolder(with_sensitivity(run))
    folder.write_unit("kl", 0, rows("kl", ("s", "standard", 2, 2.0, 1)))
    isolated = (("s", "model.a", 2, 0.1), ("s", "model.q", 2, 0.3), ("s", "model.k", 2, 0.2))
    folder.write_unit("isolated", 0, rows("isolated", *isolated))
    write_table(folder)
    chosen = select(run, max_kl=0.1)
    measured(run, (), 0.9)
    kept = tuple(x for x in chosen.skip_modules if x != "lm_head")
    measured(run, kept, 0.5)
    measured(run, ("model.a",), 0.02)
    with pytest.raises(BudgetError, match=r"Pass --budget \d+B --by sensitivity_kl in place") as refused:
        select(run, max_kl=0.1)
    budget = re.findall(r"--budget (\d+B)", str(refused.value))[0]
    assert select(run, budget, by="sensitivity_kl").skip_modules == ("model.a", "lm_head")


def test_a_bound_needs_a_measured_sensitivity_and_stands_alone(run: Path):
    with pytest.raises(QprobeError, match="'sensitivity_kl' was not measured"):
        select(run, max_kl=0.1)
    with_sensitivity(run)
    with pytest.raises(BudgetError, match=r"Both a budget \(\+5%\) and a bound"):
        select(run, "+5%", max_kl=0.1)
    with pytest.raises(QprobeError, match="activation_nmse predicts no KL"):
        select(run, by="activation_nmse", max_kl=0.1)
    with pytest.raises(BudgetError, match="no positive number"):
        select(run, max_kl=nan)


def test_the_default_budget_is_that_of_a_scan(run: Path):
    assert select(run).budget == select(run, "+10%").budget


def test_wrong_measures_budgets_and_folders_are_explained(run: Path, tmp_path: Path):
    with pytest.raises(QprobeError, match=r"'charm' is no measure.*activation_nmse"):
        select(run, "+10%", by="charm")
    with pytest.raises(QprobeError, match=r"decibels, which do not add up\. Choose by activation_nmse"):
        select(run, "+10%", by="activation_sqnr_db")
    with pytest.raises(BudgetError, match="below standard 4-bit"):
        select(run, "1KiB")
    with pytest.raises(RunError, match="is no run folder"):
        select(tmp_path, "+10%")
    with pytest.raises(RunError, match="scan has not finished"):
        select(make_run(tmp_path / "running"), "+10%")


def test_tied_and_other_fixed_layers_say_why(tmp_path: Path):
    inventory = inventory_of(
        linear("a", fixed="tied", bytes_16bit=0), linear("b", fixed="shared"), linear("c"), other_bytes=9000
    )
    scan, table = scan_of(inventory), layer_table(make_run(tmp_path / "run", inventory))
    total = inventory.standard_4bit_bytes
    nothing = SkipList((), total, 0.0, "weight_nmse")
    manifest = manifest_of(ScoredRun(scan, table), nothing, Budget("+0%", total), "test")
    assert [x.reason for x in manifest.layers] == [
        "tied to the embedding", "shared: stays in 16-bit", "not measured on these samples, NF4",
    ]  # fmt: skip
    write_manifest(tmp_path / "skiplist.json", manifest)


def test_a_list_from_elsewhere_may_keep_unmeasured_layers_and_parts_of_groups(run: Path):
    scan = scan_of(four_layers())
    kept = ("model.q", "model.b")
    total = scan.inventory.total_bytes(frozenset(kept))
    skiplist = SkipList(kept, total, nan, "activation_nmse")
    scored = ScoredRun(scan, layer_table(run))
    manifest = manifest_of(scored, skiplist, Budget("+40000B", total), "test")
    assert [x.reason for x in manifest.layers] == [
        "NF4", "kept: activation_nmse 0.5, rank 1 of 3", "NF4", "not measured on these samples, kept",
        "lm_head stays in 16-bit",
    ]  # fmt: skip
    assert manifest.skip_modules == ("model.q", "model.b", "lm_head")


def large_run(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    sizes = [(4096, 4096), (1024, 4096), (14336, 4096), (1280, 5120)]
    shapes = [sizes[i] for i in rng.integers(0, 4, 600)]
    layers = [linear(f"l{i}", f"g{i // 3}" if i % 2 else None, shape) for i, shape in enumerate(shapes)]
    frame = pd.DataFrame([output("s", x.name, 1.0, float(rng.lognormal(-5, 2))) for x in layers])
    run = make_run(folder, Inventory(tuple(layers), (), 10**9), outputs=[frame])
    write_table(RunFolder(run))
    return run


@pytest.mark.slow
def test_600_layers_are_chosen_in_two_seconds_without_torch(tmp_path: Path):
    run = large_run(tmp_path / "run")
    assert least(lambda: select(run, "+10%"), 2) < 2
    manifest = select(run, "+10%")
    assert len(manifest.layers) == 600 and manifest.budget.total_bytes <= manifest.budget.limit_bytes

    code = (
        "import sys; from pathlib import Path; from qprobe.selection.select import select; "
        f"select(Path({str(run)!r}), '+10%'); "
        "assert not {'torch', 'transformers', 'bitsandbytes', 'matplotlib'} & set(sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", code]

    def work() -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    # Two seconds on a free machine, imports included. CPU time, which tests beside this one stretch less.
    assert least(work, 4, of_children=True) < 4


def test_without_a_finite_isolated_kl_a_layer_counts_by_its_share(tmp_path: Path):
    parts = [("s", "model.a", 1, 0.2), ("s", "model.b", 1, 0.1)]
    own = [("s", "model.a", 1, nan), ("s", "model.b", 1, 0.05)]
    run = make_run(
        tmp_path / "run", sensitivity=[rows("sensitivity", *parts)], isolated=[rows("isolated", *own)]
    )
    write_table(RunFolder(run))
    damage = damage_of(RunFolder(run).table)
    assert damage is not None and damage.path == {"model.a": 0.2, "model.b": 0.1}
    assert damage.isolated == {"model.a": 0.2, "model.b": 0.05}
    assert damage.left(frozenset()) == pytest.approx(0.3)


def test_a_bound_and_a_budget_predict_the_same_kl_where_isolated_kl_was_measured(tmp_path: Path):
    # Shares add up to 0.86 nats: q and k keep 0.2 and 0.06 of it together, a 0.6.
    parts = [("s", "model.a", 1, 0.6), ("s", "model.q", 1, 0.2), ("s", "model.k", 1, 0.06)]
    own = [("s", "model.a", 1, 0.3), ("s", "model.q", 1, 0.01), ("s", "model.k", 1, 0.01)]
    run = make_run(
        tmp_path / "run", sensitivity=[rows("sensitivity", *parts)], isolated=[rows("isolated", *own)]
    )
    write_table(RunFolder(run))
    # a kept leaves 0.02 + 0.26 / 0.86 x (0.19 + 0.05) = 0.0926; adding up the shares would have said 0.26
    manifest = select(run, max_kl=0.1)
    assert manifest.skip_modules == ("model.a", "lm_head")
    assert manifest.quality.kl_predicted == pytest.approx(0.02 + 0.26 / 0.86 * 0.24)
    assert manifest.layers[0].reason == "kept: sensitivity_kl 0.6, rank 1 of 3; isolated_kl 0.3, rank 1"
    assert select(run, "+6076B").quality.kl_predicted == manifest.quality.kl_predicted


def test_where_sensitivities_miss_the_damage_isolated_kl_chooses(run: Path):
    # Sensitivities sum to 1.04 of a measured KL of 2 (-48 %); in isolation q and k together are worse than a.
    folder = RunFolder(with_sensitivity(run))
    folder.write_unit("kl", 0, rows("kl", ("s", "standard", 2, 1.04, 1)))
    isolated = (("s", "model.a", 2, 0.4), ("s", "model.q", 2, 0.3), ("s", "model.k", 2, 0.2))
    folder.write_unit("isolated", 0, rows("isolated", *isolated))
    write_table(folder)
    assert "model.a" in select(run, "+14000B").skip_modules
    folder.write_unit("kl", 0, rows("kl", ("s", "standard", 2, 2.0, 1)))
    bent = select(run, "+14000B")
    assert bent.skip_modules == ("model.q", "model.k", "lm_head")
    assert "--by" not in bent.made_by.command
    assert "isolated_kl" in bent.layers[1].reason
    assert "model.a" in select(run, "+14000B", by="sensitivity_kl").skip_modules


def test_held_out_kls_are_of_the_samples_on_which_both_are_finite(run: Path):
    # on "b" the list is not finite: 1.0 / 10 and 0.9 / 10, where all of standard's would be 51 / 20
    folder, kept = RunFolder(run), frozenset({"model.a"})
    for stage, second in ((candidate_stage(frozenset()), 50.0), (candidate_stage(kept), nan)):
        first = 1.0 if stage == candidate_stage(frozenset()) else 0.9
        values = (("a", stage, 10, first, 5), ("b", stage, 10, second, 5))
        folder.write_unit(stage, 0, rows(stage, *values))
    found = held_out_quality(folder, folder.scan, SkipList(("model.a",), 0, 0.0, "x"))
    assert found == Quality(1, 0.1, 0.09)
