"""Adapters that cannot be merged are refused, each in one sentence."""

from __future__ import annotations

import json
from shutil import copyfile, copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qprobe.checkpoint.adapters.lora import read_adapter
from qprobe.checkpoint.adapters.record import Record, write_record
from qprobe.checkpoint.new_folder import alone_at
from qprobe.errors import ManifestError, ModelError, QprobeError, RunError
from qprobe.manifest.read import read_manifest
from qprobe.training.merging.forms import with_added
from qprobe.training.merging.merge import merge
from tests.training.adapters import save

pytestmark = [
    pytest.mark.slow,
    # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def change_nothing(tensors: dict[str, Any]) -> dict[str, Any]:
    return {n: 0 * t if "lora_B" in n else t for n, t in tensors.items()}


def rename(tensors: dict[str, Any]) -> dict[str, Any]:
    return {n.replace("model.layers", "language_model.layers"): t for n, t in tensors.items()}


def cut_rank(tensors: dict[str, Any]) -> dict[str, Any]:
    return {n: t[:2].clone() if "lora_A" in n else t[:, :2].clone() for n, t in tensors.items()}


def other_shape(tensors: dict[str, Any]) -> dict[str, Any]:
    return {n: t[:, :32].clone() if "lora_A" in n else t for n, t in tensors.items()}


def lose_half(tensors: dict[str, Any]) -> dict[str, Any]:
    return dict(list(tensors.items())[1:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_nothing, r"takes no effect: lora_B is zero in all of its 21 layers \(model\.layers\.0"),
        (
            rename,
            "21 of 21 layers .* would take no effect on model: language_model.layers.0.* are not in",
        ),
        (other_shape, "would take no effect on model: .* have another shape"),
        (cut_rank, "has rank 2, but adapter_config.json says 4"),
        (lose_half, "without its other half"),
    ],
)
def test_an_adapter_that_cannot_take_effect_is_refused_by_name(change, said, family, tmp_path):
    root = family("llama")
    adapter = copytree(root / "adapter", tmp_path / "adapter")
    save(adapter, change(load_file(adapter / "adapter_model.safetensors")))
    with pytest.raises(RunError, match=said):
        merge(adapter, out=tmp_path / "out", manifest=root / "skiplist.json", model=str(root / "model"))
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_or_has_no_base_or_would_overwrite_is_one_sentence(family, tiny_folder, tmp_path):
    root, out = family("llama"), tmp_path / "out"
    with pytest.raises(RunError, match=r"holds no adapter: there is no adapter_config\.json"):
        merge(root / "model", out=out)
    with pytest.raises(RunError, match="does not say what its adapter was trained on"):
        merge(root / "adapter", out=out)
    with pytest.raises(ManifestError, match="The manifest was written for model"):
        merge(
            root / "adapter", out=out, manifest=root / "skiplist.json", model=str(tiny_folder("llama_tied"))
        )
    with pytest.raises(QprobeError, match="as_='8-bit' is not taken"):
        merge(root / "adapter", out=out, as_="8-bit")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="is there already and not empty"):
        merge(root / "adapter", out=root / "model", manifest=root / "skiplist.json")


def test_a_folder_that_cannot_be_written_or_is_being_written_is_told_before_a_weight_is_loaded(
    family, tmp_path, monkeypatch
):
    monkeypatch.setattr("qprobe.training.merging.merge._merged", lambda *_: pytest.fail("weights are loaded"))
    root = family("llama")
    given = {"manifest": root / "skiplist.json", "model": str(root / "model"), "device": "cpu"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match=r"file/out cannot be written \(.*file is no folder\)"):
        merge(root / "adapter", out=tmp_path / "file" / "out", **given)
    with (
        alone_at(tmp_path / "out"),
        pytest.raises(ModelError, match=r"Another process is writing .*out\. Wait for it to end"),
    ):
        merge(root / "adapter", out=tmp_path / "out", **given)


def test_sums_beyond_what_a_dtype_holds_are_refused_by_the_name_of_the_layer():
    weight, added = torch.tensor([[60000.0, 1.0]], dtype=torch.float16), torch.tensor([[6016.0, 0.5]])
    with pytest.raises(ModelError, match=r"weights of up are beyond what float16 holds \(65,504 at most\)"):
        with_added("up", weight, added)
    assert with_added("up", weight, -added).tolist() == [[53984.0, 0.5]]
    assert with_added("up", weight.bfloat16(), added).isfinite().all()


def test_an_adapter_whose_record_names_no_base_is_refused(family, tmp_path):
    root = family("llama")
    adapter = copytree(root / "adapter", tmp_path / "adapter")
    copyfile(root / "skiplist.json", adapter / "skiplist.json")
    fingerprint = read_manifest(root / "skiplist.json").model.fingerprint
    for spec in ({"dtype": "bfloat16"}, {"base": "int8", "dtype": "bfloat16"}):
        write_record(adapter, Record("finished", fingerprint, spec))
        with pytest.raises(RunError, match=r"finetune\.json says base (None|'int8')"):
            merge(adapter, out=tmp_path / "out", model=str(root / "model"))


def test_an_adapter_beyond_linear_layers_is_refused(family, tmp_path):
    root = family("llama")
    adapter = copytree(root / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(RunError, match="is more than a product for each linear layer: DoRA"):
        read_adapter(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": ["mlp.experts"]}))
    with pytest.raises(RunError, match="such as stacked experts"):
        read_adapter(adapter)
