"""Outliers planted in one expert of one layer: the ranking names the layer, figures by expert the expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file

import qprobe
from qprobe.loading.experts.weights import expert_weights
from qprobe.manifest.read import read_manifest
from qprobe.report.payload import TRANSPOSED, page_data
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import attribution_residual, rank_table
from qprobe.selection.verdict import MOST_RESIDUAL
from tests import mixtures
from tests.benchmarks.architecture_matrix.oracles import through_nf4
from tests.scanning.asked import options, scan
from tests.scanning.test_experts import ROWS

CHANNEL, FACTOR = 5, 64.0  # a power of two, by which bf16 is scaled exactly


def plant(model: Any, layer: str, expert: int) -> None:
    """Scales one hidden channel of one expert up, and down again behind it: the same answers in 16-bit.

    A block of 64 weights of the tiny experts is a row of their memory. A row of down_proj holds all channels,
    and where experts are transposed a row of gate_up_proj does; there the large one takes the scale.
    """
    weights = expert_weights(model)
    up, down = weights[f"{layer}.gate_up_proj"], weights[f"{layer}.down_proj"]
    _, out_features, _ = up.shape
    with torch.no_grad():
        of_up, of_down = up.weight[expert], down.weight[expert]
        if up.transposed:
            of_up[:, out_features // 2 + CHANNEL] *= FACTOR
            of_down[CHANNEL] /= FACTOR
        else:
            of_up[out_features // 2 + CHANNEL] /= FACTOR
            of_down[:, CHANNEL] *= FACTOR


def planted(mixture: Callable[[str], Path], name: str, layer: str, expert: int, folder: Path) -> Path:
    """A copy of that mixture with outliers in one expert of `layer`, which answers as before in 16-bit."""
    source = copytree(mixture(name), folder / "planted")
    model_class = getattr(transformers, mixtures.RECIPES[name].architecture)
    model = model_class.from_pretrained(source, dtype=torch.bfloat16)
    before = model(mixtures.IDS).logits
    plant(model, layer, expert)
    assert torch.equal(model(mixtures.IDS).logits, before)
    model.save_pretrained(source)
    return source


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer", "hurt", "expert"),  # the experts that read most tokens
    [
        ("mixtral", "model.layers.0.mlp.experts", "down_proj", 1),
        ("qwen3_moe", "model.layers.0.mlp.experts", "down_proj", 1),
    ],
)
def test_one_expert_with_outliers_heads_the_ranking(
    name: str, layer: str, hurt: str, expert: int, mixture: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    source = planted(mixture, name, layer, expert, tmp_path)
    found = scan(**options(source, tmp_path / "run", data=ROWS, samples=4, budget="+40%"))
    wanted = f"{layer}.{hurt}"
    for by in ("sensitivity_kl", "activation_nmse"):
        assert rank_table(RunFolder(found.run).table, by, 1)["layer"].item() == wanted, by
    by_expert = pd.read_csv(found.run / "experts.csv")
    worst = by_expert.loc[by_expert["activation_nmse"].idxmax()]
    assert (worst["layer"], worst["expert"]) == (wanted, expert)


@pytest.mark.slow
def test_where_experts_lie_transposed_a_large_output_hides_what_its_blocks_lose_but_not_from_sensitivity(
    mixture: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    layer, expert = "model.layers.0.feed_forward.experts", 3  # which reads most tokens
    source = planted(mixture, "llama4", layer, expert, tmp_path)
    found = scan(**options(source, tmp_path / "run", data=ROWS, samples=4, budget="+40%"))
    run, wanted = RunFolder(found.run), f"{layer}.gate_up_proj"
    weight = load_file(source / "model.safetensors")[wanted][expert]  # (in, out): a block is 64 outputs
    others = torch.arange(64) != CHANNEL
    along_memory, along_inputs = weight[:, 64:], weight[:, 64:].T.contiguous()
    lost = [nmse(along_memory, through_nf4(along_memory), others)]
    lost += [nmse(along_inputs.T, through_nf4(along_inputs).T, others)]
    # The outlier is 64 times as large as the others: where its own weight is not small, they all become 0. Of
    # the energy of all outputs it has 64² parts, and the others of its block have 63.
    assert lost[0] > 0.5 and lost[1] < 0.02
    by_expert = pd.read_csv(run.path / "experts.csv").query("layer == @wanted").set_index("expert")
    assert by_expert["activation_nmse"][expert] < lost[0] / 10
    assert rank_table(run.table, "sensitivity_kl", 1)["layer"].item() == wanted
    shown = page_data(run, run.scan, run.table, None)["layers"]
    assert {x["name"] for x in shown if x["note"] == TRANSPOSED} == {
        f"model.layers.{number}.feed_forward.experts.{part}_proj"
        for number in (0, 1)
        for part in ("gate_up", "down")
    }


def nmse(weight: torch.Tensor, weight_hat: torch.Tensor, outputs: torch.Tensor) -> float:
    """Of the columns `outputs`."""
    error = (weight_hat - weight)[:, outputs].double().square().sum()
    return float(error / weight[:, outputs].double().square().sum())


@pytest.mark.slow
def test_where_routing_flips_the_verdict_says_what_sums_miss_and_isolated_kl_chooses(
    mixture: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    source = planted(mixture, "mixtral", "model.layers.1.mlp.experts", 1, tmp_path)
    found = scan(**options(source, tmp_path / "run", data=ROWS, samples=4, budget="+40%"))
    run = RunFolder(found.run)
    assert pd.read_csv(found.run / "experts.csv")["rerouted"].sum() > 0
    residual = attribution_residual(run)
    assert residual is not None and abs(residual) > MOST_RESIDUAL
    assert f"The sensitivities miss the damage by {residual:+.1%}" in found.verdict
    assert "a router changes its mind" in found.verdict
    assert found.skiplist is not None
    compared = read_manifest(found.skiplist).compared
    assert any("isolated_kl" in x.name for x in compared) and all(x.kl is not None for x in compared)
    again = qprobe.select(found.run, "+20%")
    assert any(x.reason.startswith("kept: isolated_kl") for x in again.layers)
