"""The road of a scan on a mixture of experts, and what compare says of its list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import qprobe
from qprobe.checkpoint.storage import stored_bytes
from qprobe.runs.folder import RunFolder
from tests import mixtures
from tests.scanning.asked import options, scan

ROWS = [
    {"prompt": f"what is {number}", "answer": f"{number} {colour}"}
    for number, colour in zip(("one", "two", "three", "four"), ("red", "blue", "green", "grey"), strict=True)
]


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


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in mixtures.NAMES if x != "mixtral"])
def test_every_family_of_experts_goes_from_scan_to_a_folder_that_is_loaded_again(
    name: str, mixture: Callable[[str], Path], tmp_path: Path
):
    source, few = mixture(name), {"data": ROWS, "samples": 4, "nodes": 2, "budget": "+40%"}
    found = scan(**options(source, tmp_path / "run", **few))
    table = RunFolder(found.run).table.set_index("layer")
    experts = table[table["experts"].notna()]
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
