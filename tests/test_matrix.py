"""The matrix of architectures: a few of its models, and that its oracles can say no."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests import tiny
from tests.benchmarks import architectures
from tests.benchmarks.architecture_matrix import images, oracles, report, texts


def test_there_are_models_of_every_kind():
    assert len(architectures.names()) == len(set(architectures.names())) >= 70
    classes = {x.architecture for x in (*texts.recipes().values(), *images.recipes().values())}
    assert len(classes) >= 70
    assert classes >= {"MambaForCausalLM", "GPT2LMHeadModel", "CLIPModel", "T5ForConditionalGeneration"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM, tied", "BertForTokenClassification"])
def test_the_road_holds_and_every_oracle_agrees(name: str):
    found = architectures.outcome(name)
    assert report.failures([found]) == []
    always = ["weight", "modules", "bytes", "activation", "KL"]
    answers = name.startswith("Llama")
    assert list(found["oracles"]) == ([*always, "loss", "adapter"] if answers else always)
    refused = [step for step, (state, _) in found["cells"].items() if state != "ok"]
    assert refused == ([] if answers else ["compare", "finetune"])


def test_an_oracle_names_the_layer_that_a_table_lies_about(tmp_path: Path):
    folder = tiny.write_recipe(tiny.RECIPES["llama_tied"], "llama_tied", tmp_path / "model")
    model = oracles.plain_model(folder)
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach()
    change = oracles.through_nf4(weight).double() - weight.double()
    true = float(change.square().sum() / weight.double().square().sum())
    rows = {name: true, "model.layers.0.mlp.gate_proj": 2.0}
    (said,) = oracles.weight_errors(model, {"weight_nmse": pd.Series(rows)})
    assert said.startswith("weight_nmse of model.layers.0.mlp.gate_proj is 0.0") and said.endswith("not 2")


def test_a_cell_that_falls_is_told_with_its_sentence():
    cells = {step: ["ok", ""] for step in report.STEPS} | {"scan": ["traceback", "KeyError: 'x' (a.py:1)"]}
    one = {
        "name": "M",
        "cells": cells,
        "oracles": {"KL": ["KL is 1, not 2", "..."], "bytes": []},
        "seconds": 1,
    }
    assert report.failures([one]) == [
        "M, scan: traceback: KeyError: 'x' (a.py:1)",
        "M, KL: untrue: KL is 1, not 2 (and 1 more)",
    ]
    assert "TRACE" in report.table_line(one) and "untrue" in report.table_line(one)
