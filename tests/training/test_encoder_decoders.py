"""Fine-tuning of an encoder-decoder: adapters of both sides learn, and peft knows its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import qprobe
from tests import sequences, tiny


def moved(out: Path) -> set[str]:
    """Names of the adapter's tensors that had a gradient: lora_B begins at zero."""
    stored = load_file(out / "adapter_model.safetensors")
    return {name for name, x in stored.items() if "lora_B" in name and x.any()}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_adapters_of_encoder_and_decoder_learn(tmp_path: Path):
    folder = str(tiny.write_recipe(sequences.RECIPES["bart"], "bart", tmp_path / "model"))
    run = qprobe.scan(folder, measures=["weight"], out=tmp_path / "run", device="cpu")
    row = {"prompt": "what does the image show?", "answer": "a row of teeth"}
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([json.dumps(row)] * 3))
    out = tmp_path / "adapter"
    options = {"steps": 2, "batch_size": 2, "accumulation": 1, "rank": 2, "held_out": 0.0}
    found = qprobe.finetune(run.skiplist, model=folder, data=data, out=out, device="cpu", **options)
    assert found.steps == 2
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    learned = moved(out)
    for part in (
        "encoder.layers.0.self_attn.q_proj",
        "encoder.layers.1.fc2",
        "decoder.layers.0.fc1",
        "decoder.layers.1.encoder_attn.k_proj",
    ):
        assert any(part in x for x in learned), part


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_both_sides_learn_where_blocks_cannot_be_recomputed_and_that_is_said(tmp_path: Path):
    folder = str(tiny.write_recipe(sequences.RECIPES["pix2struct"], "pix2struct", tmp_path / "model"))
    run = qprobe.scan(folder, measures=["weight"], out=tmp_path / "run", device="cpu")
    (tmp_path / "a.png").write_bytes(tiny.picture(0))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": "a.png", "prompt": "what is it?", "answer": "a row of teeth"}))
    out = tmp_path / "adapter"
    options = {"steps": 2, "accumulation": 1, "rank": 2, "held_out": 0.0, "adapt": "all"}
    found = qprobe.finetune(run.skiplist, model=folder, data=data, out=out, device="cpu", **options)
    (said,) = found.notes
    assert said.startswith("transformers cannot recompute the blocks of Pix2StructForConditionalGeneration")
    learned = moved(out)
    for part in ("encoder.encoder.layer.0.attention.query", "decoder.layer.1.mlp.DenseReluDense.wo"):
        assert any(part in x for x in learned), part
