"""What is broken in a model or in a sample is named and left out."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qprobe.errors import ModelError, SampleError
from qprobe.manifest.read import read_manifest
from qprobe.runs.folder import RunFolder
from tests import tiny
from tests.scanning.asked import TinyFolder, options, scan, write_lines

pytestmark = pytest.mark.slow


def broken_copy(folder: Path, to: Path, weight: str, value: float, row: int | None = None) -> Path:
    """A copy of a tiny model with one element of `weight`, or a whole row, set to `value`."""
    copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    if row is None:
        tensors[weight][3, 5] = value
    else:
        tensors[weight][row] = value
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def assert_no_nan_sums(run: Path) -> None:
    """Every cell is a finite number or empty, none is "nan" or "inf"."""
    text = (run / "layers.csv").read_text().lower()
    assert "nan" not in text and "inf" not in text.replace("in_features", "")


def test_a_nan_weight_is_named_and_left_out(tiny_folder: TinyFolder, tmp_path: Path):
    # Without a damage that would be NaN its samples stay, although all behind the weight is NaN.
    layer = "encoder.layer.1.intermediate.dense"
    folder = broken_copy(tiny_folder("bert"), tmp_path / "model", f"{layer}.weight", float("nan"))
    result = scan(**options(folder, tmp_path / "run", measures=("weight", "activation", "propagated")))
    assert any("weights that are not finite" in note and f"{layer} (" in note for note in result.notes)
    assert any(f"first {layer} on question-0" in note for note in result.notes)
    assert any("Propagated error is not measured" in note and "finite" in note for note in result.notes)
    table = RunFolder(result.run).table.set_index("layer")
    position = list(table.index).index(layer)
    assert table["activation_nmse"].iloc[:position].notna().all()
    assert table["activation_nmse"].iloc[position:].isna().all() and pd.isna(table["weight_nmse"][layer])
    assert_no_nan_sums(result.run)
    counts = pd.read_csv(result.run / "left_out.csv").set_index("layer")
    assert counts["weight"][layer] > 0 and counts["activation"][layer] > 0
    assert counts["samples"][layer].split("; ")[0].startswith("question-0")


def test_samples_that_a_nan_weight_spoils_are_named_and_the_others_measured(
    tiny_folder: TinyFolder, tmp_path: Path
):
    # The vision tower holds a NaN: the two samples with a picture have no answer, the four others have.
    layer = "model.visual.blocks.0.mlp.fc1"
    folder = broken_copy(
        tiny_folder("qwen2_vl"), tmp_path / "model", f"{file_name(layer)}.weight", float("nan")
    )
    (tmp_path / "a.png").write_bytes(tiny.picture(1))
    texts = [{"prompt": text} for text in ("a red bag", "name the unit", "which one", "the left bar")]
    pictures = [{"id": f"photo-{i}", "image": "a.png", "prompt": "what is it?"} for i in range(2)]
    data = write_lines(tmp_path / "mixed.jsonl", *pictures, *texts)
    result = scan(**options(folder, tmp_path / "run", data=data))
    for name in ("photo-0", "photo-1"):
        assert f"{name}: left out, in 16-bit its values are not finite from {layer} on" in result.notes
    assert result.samples == 4 and any(f"{layer} (" in note for note in result.notes)
    table = RunFolder(result.run).table.set_index("layer")
    assert table["sensitivity_kl"].filter(like="language_model").notna().all()
    assert result.kl_standard_4bit is not None and np.isfinite(result.kl_standard_4bit)
    assert_no_nan_sums(result.run)


def file_name(layer: str) -> str:
    """The name of a Qwen2-VL vision layer in its files."""
    return layer.removeprefix("model.")


PROMPTS = ("a red bag", "name the unit", "which one is it", "the left bar", "zebra", "a cat", "the moon")


def with_inf_activation(folder: Path, to: Path, position: int, answer: str | None) -> tuple[Path, Path]:
    """(model, data): a Llama whose embedding of one token is infinite, and prompts; one has that token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spoilt = set(tokenizer("zebra", add_special_tokens=False)["input_ids"])
    others = [p for p in PROMPTS if p != "zebra"]
    for text in (*others, "the right one"):
        spoilt -= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    template = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    spoilt -= set(tokenizer(template, add_special_tokens=False)["input_ids"])
    model = broken_copy(folder, to / "model", "model.embed_tokens.weight", float("inf"), min(spoilt))
    others.insert(position, "zebra")
    lines = [{"id": p, "prompt": p, **({"answer": answer} if answer else {})} for p in others]
    return model, write_lines(to / "texts.jsonl", *lines)


def test_a_sample_with_an_inf_activation_is_left_out_of_kl_and_named(tiny_folder: TinyFolder, tmp_path: Path):
    # It brings its answer, so that only measuring shows that it is not finite. Number 1 is calibration.
    model, data = with_inf_activation(tiny_folder("llama"), tmp_path, 1, "the right one")
    result = scan(**options(model, tmp_path / "run", data=data, samples=7))
    assert any(
        "1 sample left out of KL and sensitivity, since the answer is not finite in 16-bit: zebra." == note
        for note in result.notes
    )
    assert any("first model.layers.0.self_attn.q_proj on zebra;" in note for note in result.notes)
    assert not any(
        "Propagated" in note for note in result.notes
    )  # measured: the first batch is not the judge
    counts = pd.read_csv(result.run / "left_out.csv").set_index("layer")
    assert (counts["samples"] == "zebra").all() and (counts["sensitivity"].drop("lm_head") == 1).all()
    table = RunFolder(result.run).table
    assert table["activation_nmse"].notna().all() and table["propagated_nmse"].notna().all()
    assert table["sensitivity_kl"].iloc[:-1].notna().all()
    assert_no_nan_sums(result.run)
    rows = RunFolder(result.run).units("kl")
    assert len(rows) == 5 and rows["kl_sum"].isna().sum() == 1


def test_a_held_out_sample_that_is_not_finite_does_not_enter_the_selection(
    tiny_folder: TinyFolder, tmp_path: Path
):
    model, data = with_inf_activation(tiny_folder("llama"), tmp_path, 2, "the right one")
    result = scan(**options(model, tmp_path / "run", data=data, samples=7))
    assert any(
        "1 of 2 held-out samples left out of the selection" in n and "zebra" in n for n in result.notes
    )
    manifest = read_manifest(result.run / "skiplist.json")
    assert manifest.quality.samples == 1 and np.isfinite(manifest.quality.kl_dynamic or np.nan)


def test_the_model_s_own_answer_may_be_what_is_not_finite(tiny_folder: TinyFolder, tmp_path: Path):
    model, data = with_inf_activation(tiny_folder("llama"), tmp_path, 1, None)
    result = scan(**options(model, tmp_path / "run", data=data, samples=7))
    where = "model.layers.0.self_attn.q_proj"
    assert f"zebra: left out, in 16-bit its values are not finite from {where} on" in result.notes
    assert result.samples == 6


def test_a_model_that_is_finite_on_no_sample_is_refused_with_the_layer(
    tiny_folder: TinyFolder, tmp_path: Path
):
    layer = "model.layers.1.mlp.down_proj"
    folder = broken_copy(tiny_folder("llama"), tmp_path / "model", f"{layer}.weight", float("nan"))
    with pytest.raises(SampleError, match=rf"None of the 6 samples .* not finite from {layer} on.*--dtype"):
        scan(**options(folder, tmp_path / "run"))
    data = write_lines(tmp_path / "d.jsonl", *({"prompt": p, "answer": "the right one"} for p in PROMPTS))
    with pytest.raises(SampleError, match=rf"None of the 4 samples has a finite KL.*{layer} \("):
        scan(**options(folder, tmp_path / "again", data=data))
    assert (tmp_path / "again" / "layers.csv").exists()  # the table shows where it begins


@pytest.mark.parametrize("answer", [{}, {"answer": "a cup"}])
def test_a_model_that_transformers_cannot_run_is_named_with_its_own_words(
    answer: dict[str, str], tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("expected scalar type Float but found BFloat16\nsecond line")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", broken)
    data = write_lines(tmp_path / "data.jsonl", *({"prompt": x, **answer} for x in ("a cat", "a dog", "why")))
    said = r"LlamaForCausalLM, .*, does not run a sample \(expected scalar type Float but found BFloat16\)"
    with pytest.raises(ModelError, match=said):
        scan(**options(tiny_folder("llama"), tmp_path / "run", data=data))
