"""The road of a scan on a mixture of experts, and what compare says of its list."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

import qprobe
from qprobe.checkpoint.storage import stored_bytes
from qprobe.cli import main
from qprobe.formats.nf4 import Nf4
from qprobe.loading.experts.weights import expert_weights
from qprobe.loading.reference import load_reference
from qprobe.measure.weights import error_sums
from qprobe.report.payload import page_data
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.by_expert import Expert, expert_sentences, worst_expert
from qprobe.selection.scores import predicted_kl
from tests import mixtures
from tests.scanning.asked import options, scan
from tests.scanning.test_weights import sharded

ROWS = [
    {"prompt": f"what is {number}", "answer": f"{number} {colour}"}
    for number, colour in zip(("one", "two", "three", "four"), ("red", "blue", "green", "grey"), strict=True)
]


@pytest.mark.slow
def test_experts_are_measured_chosen_and_loaded_as_the_manifest_says(
    mixture: Callable[[str], Path], tmp_path: Path
):
    source = mixture("mixtral")
    found = scan(**options(source, tmp_path / "run", samples=4, budget="+40%"))
    table = RunFolder(tmp_path / "run").table.set_index("layer")
    experts = table[table["experts"].notna()]
    assert list(experts.index) == [
        f"model.layers.{i}.mlp.experts.{x}" for i in (0, 1) for x in ("gate_up_proj", "down_proj")
    ]
    assert experts.drop(columns="rounding").notna().all(axis=None)
    # Two of four experts read each token of which attention reads one.
    attention = table.loc["model.layers.0.self_attn.q_proj"]
    assert (experts["tokens"] == 2 * attention["tokens"]).all() and (
        experts["samples"] == attention["samples"]
    ).all()
    by_expert = pd.read_csv(tmp_path / "run" / "experts.csv").groupby("layer", sort=False)
    assert by_expert["tokens"].sum().to_dict() == experts["tokens"].to_dict()
    for column in ("weight_nmse", "activation_nmse"):  # a pooled error lies between those of its parts
        assert (by_expert[column].min() <= experts[column]).all()
        assert (experts[column] <= by_expert[column].max()).all()
    assert found.skiplist is not None
    rows = {
        x.name: x for x in qprobe.compare(found.skiplist, model=str(source), device="cpu", samples=2).rows
    }
    assert rows["nf4"].kl > 0 and rows["dynamic"].total_bytes > rows["nf4"].total_bytes
    model, _ = qprobe.load_dynamic_4bit(found.skiplist, str(source), "cpu")
    assert stored_bytes(model).total_bytes == rows["dynamic"].total_bytes
    _select_with_experts_kept(found.run, {*experts.index})
    _shown_by_expert(found.run, pd.read_csv(found.run / "experts.csv"))


def _shown_by_expert(run: Path, table: pd.DataFrame) -> None:
    """The page and `rank` have the figures of experts.csv."""
    layer = "model.layers.0.mlp.experts.down_proj"
    own = table[table["layer"] == layer].set_index("expert")
    ranked = json.loads(CliRunner().invoke(main, ["rank", str(run), "--json"]).stdout)["rows"]
    (row,) = (x for x in ranked if x["layer"] == layer)
    assert [x["tokens"] for x in row["by_expert"]] == own["tokens"].tolist()
    assert [x["activation_nmse"] for x in row["by_expert"]] == own["activation_nmse"].tolist()
    assert not any("by_expert" in x for x in ranked if x["experts"] is None)
    worst = own["activation_nmse"].idxmax()
    said = " ".join(CliRunner().invoke(main, ["rank", str(run)]).stdout.split())
    assert f"{layer}: of 4 experts {worst} errs most, activation_nmse" in said
    folder = RunFolder(run)
    data = page_data(folder, folder.scan, folder.table, None)
    (shown,) = (x["experts"] for x in data["layers"] if x["name"] == layer)
    assert json.dumps(shown) and shown["tokens"] == own["tokens"].tolist() and shown["worst"] == worst
    assert all(x["experts"] is None for x in data["layers"] if "experts" not in x["name"])


def test_an_expert_that_read_no_token_is_unknown_and_never_the_worst():
    ones = (Expert(0, 0.5, None), Expert(3, 0.1, 0.2), Expert(1, 0.1, 0.1))
    assert worst_expert(ones) == 1
    assert expert_sentences({"a": ones}) == [
        "a: of 3 experts 1 errs most, activation_nmse 0.2 on 3 of 4 tokens; 1 read no token, so the error of "
        "their outputs is unknown."
    ]
    weights = (Expert(None, 0.5, None), Expert(None, 0.1, None))
    assert expert_sentences({"a": weights}) == ["a: of 2 experts 0 errs most, weight_nmse 0.5."]
    nothing = (Expert(0, None, None),)
    assert worst_expert(nothing) is None
    assert expert_sentences({"a": nothing}) == ["a: nothing is known of its 1 expert."]


def _select_with_experts_kept(run: Path, experts: set[str]) -> None:
    """Lists of `run` made again with all `experts` in 16-bit, beside which the budget counts."""
    folder = RunFolder(run)
    inventory = folder.inventory.with_experts_kept
    made = qprobe.select(run, "+10%", experts="16-bit")
    assert {*made.skip_modules} > experts and made.format.experts == "16-bit"
    assert made.budget.standard_4bit_bytes == inventory.standard_4bit_bytes
    assert inventory.standard_4bit_bytes < made.budget.total_bytes <= 1.1 * inventory.standard_4bit_bytes
    assert "--experts 16-bit" in made.made_by.command
    # What the list is predicted to leave is that of all layers together, experts among those kept.
    assert made.quality.kl_predicted == predicted_kl(folder.table, frozenset(made.skip_modules))
    bound = 1.01 * made.quality.kl_predicted
    within = qprobe.select(run, max_kl=bound, experts="16-bit")
    assert within.quality.kl_predicted <= bound
    assert within.budget.total_bytes <= made.budget.total_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", mixtures.NAMES)
def test_weights_alone_are_those_of_the_loaded_model(
    name: str, mixture: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    source = sharded(mixture(name), tmp_path / "shards", 3)
    run = scan(**options(source, tmp_path / "run", measures=("weight",), samples=None, max_new_tokens=64)).run
    by_expert = pd.read_csv(run / "experts.csv").set_index(["layer", "expert"])
    weights = expert_weights(load_reference(str(source), "cpu").model)
    assert {x for x, _ in by_expert.index} == {*weights}
    for layer, weight in weights.items():
        own, w_hat = weight.weight.data, Nf4().pack(weight.weight.data).unpack()
        for expert in range(mixtures.EXPERTS):
            sums, _ = error_sums(own[expert], w_hat[expert])
            assert by_expert.loc[(layer, expert), "weight_nmse"] == sums.nmse
    assert by_expert["tokens"].isna().all() and by_expert["activation_nmse"].isna().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [x for x in mixtures.NAMES if x != "mixtral"])
def test_every_family_of_experts_goes_from_scan_to_a_folder_that_is_loaded_again_and_trains(
    name: str, mixture: Callable[[str], Path], tmp_path: Path
):
    source, few = mixture(name), {"data": ROWS, "samples": 4, "nodes": 2, "budget": "+40%"}
    found = scan(**options(source, tmp_path / "run", **few))
    table = RunFolder(found.run).table.set_index("layer")
    experts = table[table["experts"].notna()]
    assert "The sensitivities " in found.verdict  # how well they add up, whether they do or not
    assert len(experts) == 2 * (1 if name == "deepseek_v3" else 2)  # DeepSeek-V3's first layer is dense
    assert experts.drop(columns="rounding").notna().all(axis=None)
    assert found.skiplist is not None
    asked = {"model": str(source), "device": "cpu", "data": ROWS, "samples": 2, "max_new_tokens": 1}
    rows = {x.name: x for x in qprobe.compare(found.skiplist, **asked).rows}
    assert 0 < rows["dynamic"].kl < rows["nf4"].kl
    qprobe.quantize(found.skiplist, tmp_path / "out", str(source), "cpu")
    again, _ = qprobe.load_dynamic_4bit(tmp_path / "out", device="cpu")
    assert stored_bytes(again).total_bytes == rows["dynamic"].total_bytes
    assert qprobe.audit(tmp_path / "out", found.skiplist).ok
    losses = mixtures.three_steps(again)
    assert losses[2] < losses[0]
