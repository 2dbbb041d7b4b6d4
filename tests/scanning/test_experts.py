"""The road of a scan on a mixture of experts, and what compare says of its list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

import qprobe
from qprobe.checkpoint.storage import stored_bytes
from qprobe.runs.folder import RunFolder
from tests.scanning.asked import options, scan


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
