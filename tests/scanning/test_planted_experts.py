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

from qprobe.loading.experts.weights import expert_weights
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import rank_table
from tests import mixtures
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
    source = copytree(mixture(name), tmp_path / "planted")
    model_class = getattr(transformers, mixtures.RECIPES[name].architecture)
    model = model_class.from_pretrained(source, dtype=torch.bfloat16)
    before = model(mixtures.IDS).logits
    plant(model, layer, expert)
    assert torch.equal(model(mixtures.IDS).logits, before)
    model.save_pretrained(source)
    found = scan(**options(source, tmp_path / "run", data=ROWS, samples=4, budget="+40%"))
    planted = f"{layer}.{hurt}"
    for by in ("sensitivity_kl", "activation_nmse"):
        assert rank_table(RunFolder(found.run).table, by, 1)["layer"].item() == planted, by
    by_expert = pd.read_csv(found.run / "experts.csv")
    worst = by_expert.loc[by_expert["activation_nmse"].idxmax()]
    assert (worst["layer"], worst["expert"]) == (planted, expert)
