"""A published list becomes the manifest that its author meant."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MllamaConfig

from qprobe.checkpoint.import_list import import_list
from qprobe.checkpoint.load import check_model, load_dynamic_4bit
from qprobe.checkpoint.plan import plan
from qprobe.errors import ManifestError
from qprobe.exports.lists import read_list
from qprobe.manifest.read import manifest_from_json
from qprobe.manifest.write import manifest_to_json
from qprobe.models.families.mllama import UNSLOTH_LLAMA_11B
from tests.checkpoint.manifests import inventory_of

TinyFolder = Callable[[str], Path]


@pytest.fixture
def given(tmp_path: Path) -> Callable[..., Path]:
    """given(entries, version): a config.json that carries the list; given(value) writes that value."""

    def write(value: Any, version: str | None = None, **quantization: Any) -> Path:
        path = tmp_path / "config.json"
        if version is not None:
            config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
            config |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
            config |= {"llm_int8_skip_modules": value, **quantization}
            value = {"transformers_version": version, "quantization_config": config}
        path.write_text(json.dumps(value))
        return path

    return write


@pytest.fixture(scope="module")
def llama_11b(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = MllamaConfig(architectures=["MllamaForConditionalGeneration"])
    config.vision_config.image_size = 560
    folder = tmp_path_factory.mktemp("llama")
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_the_published_list_of_llama_11b(given: Any, llama_11b: str):
    entries = list(UNSLOTH_LLAMA_11B.entries)
    found = import_list(given(entries, "4.46.2"), llama_11b)
    manifest = found.manifest
    assert found.rule == "transformers 4" and len(manifest.skip_modules) == 19
    assert manifest.budget.total_bytes == 7_907_505_158 == manifest.budget.limit_bytes
    assert (manifest.budget.standard_4bit_bytes, manifest.budget.requested) == (7_178_803_270, "imported")
    assert found.to_json()["dead"] == ["merger", "modality_projection"]
    # layer 1: q, k, v, o and gate, up, down
    counts = {x.entry: len(x.layers) for x in found.matched}
    assert counts["language_model.model.layers.1.self_attn"] == 4
    assert counts["language_model.model.layers.1.mlp"] == 3
    assert "would keep 3 of these 19 layers" in found.notes[1]
    assert manifest_from_json(json.loads(json.dumps(manifest_to_json(manifest)))) == manifest


@pytest.mark.parametrize(
    ("version", "count"),
    [("4.57.6", 7), ("5.0.0", 21), ("5.23.0", 7)],
)
def test_an_entry_is_read_by_the_rule_of_its_version(
    given: Any, tiny_folder: TinyFolder, version: str, count: int
):
    # 5.0 reads "layers." as a regular expression that may end anywhere: layers 0, 1 and 2.
    entry = "model.layers.1" if count == 7 else "model.layers."
    found = import_list(given([entry], version), str(tiny_folder("llama")))
    assert len(found.matched[0].layers) == count


def test_a_plain_list_and_both_spellings(given: Any, tiny_folder: TinyFolder):
    names = ["language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.1.mlp.up_proj"]
    found = import_list(given(names), str(tiny_folder("llava_pixtral")))
    assert [x.layers for x in found.matched] == [
        ("model.language_model.layers.0.mlp.up_proj",),
        ("model.language_model.layers.1.mlp.up_proj",),
    ]
    kept = {x.name: x.reason for x in found.manifest.layers if x.precision == "bf16"}
    assert kept == {
        **{x.layers[0]: f"kept by the imported entry {x.entry!r}" for x in found.matched},
        "lm_head": "lm_head: stays in 16-bit",
    }
    assert any("does not name lm_head" in x for x in found.notes)


@pytest.mark.slow
def test_an_imported_manifest_loads(given: Any, tiny_folder: TinyFolder):
    folder = str(tiny_folder("mllama"))
    found = import_list(given(["multi_modal_projector", "lm_head"], "4.46.2"), folder)
    assert found.manifest.skip_modules == ("model.multi_modal_projector", "lm_head")
    check_model(found.manifest, folder)
    load_dynamic_4bit(found.manifest, folder, "cpu")  # verified: raises unless it is what the manifest lists


def test_a_config_without_a_list_is_standard_4bit(given: Any, tiny_folder: TinyFolder):
    found = import_list(given(None, "5.1.0"), str(tiny_folder("llama")))
    assert found.manifest.skip_modules == ("lm_head",) and "holds no list" in found.notes[0]
    assert found.manifest.budget.total_bytes == found.manifest.budget.standard_4bit_bytes


def test_the_format_comes_from_the_config(given: Any):
    found = read_list(
        given(["a"], "5.1.0", bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype="float16")
    )
    assert (found.format.double_quant, found.format.compute_dtype, found.notes) == (False, "float16", ())
    other = read_list(given(["a"], "5.1.0", quant_method="awq"))
    assert "made for another format" in other.notes[0]


def test_what_a_config_leaves_out_means_what_transformers_takes_it_for(tmp_path: Path):
    # BitsAndBytesConfig(load_in_4bit=True): fp4, no double quantization, computing in float32.
    def write(torch_dtype: str = "bfloat16", **quantization: Any) -> Path:
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, **quantization}
        data = {"torch_dtype": torch_dtype, "quantization_config": config}
        (tmp_path / "c.json").write_text(json.dumps(data))
        return tmp_path / "c.json"

    with pytest.raises(ManifestError, match=r"means FP4, since it names no bnb_4bit_quant_type.*NF4 only"):
        read_list(write())
    with pytest.raises(ManifestError, match=r"means FP4, and a manifest describes NF4 only"):
        read_list(write(bnb_4bit_quant_type="fp4"))
    found = read_list(write(bnb_4bit_quant_type="nf4"))
    assert (found.format.double_quant, found.format.compute_dtype) == (False, "bfloat16")
    (note,) = found.notes
    assert "computes in float32, since it names no bnb_4bit_compute_dtype" in note and "in bfloat16" in note
    half = read_list(write("float16", bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="torch.float32"))
    assert half.format.compute_dtype == "float16" and "computes in float32; the manifest" in half.notes[0]


def test_a_plain_list_is_for_nf4_with_double_quantization(given: Any):
    found = read_list(given(["a"]))
    assert (found.format.name, found.format.double_quant, found.notes) == ("nf4", True, ())


def test_an_entry_that_only_transformers_4_can_read_is_imported_and_said(given: Any, tiny_folder: TinyFolder):
    # To transformers 4 it is plain text that matches nothing; as a regular expression it is none.
    found = import_list(given(["*.mlp", "mlp.up_proj", "lm_head"], "4.46.2"), str(tiny_folder("llama")))
    assert found.to_json()["dead"] == ["*.mlp", "mlp.up_proj"]
    assert any("cannot read '*.mlp'" in note for note in found.notes)


@pytest.mark.slow
def test_a_known_name_needs_no_network(given: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*_arguments: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = import_list(given(list(UNSLOTH_LLAMA_11B.entries), "4.46.2"), "llama-3.2-11b-vision", "a b.json")
    assert len(found.manifest.skip_modules) == 19
    model = found.manifest.model
    assert model.id == "meta-llama/Llama-3.2-11B-Vision-Instruct"
    assert found.manifest.made_by.command == (
        f"qprobe import config.json --model {model.id} --out 'a b.json'"
    )
    assert plan("llama-3.2-11b-vision", found.manifest).fingerprint == model.fingerprint


def test_modules_to_not_convert_serves_as_well(given: Any):
    assert read_list(given({"quantization_config": {"modules_to_not_convert": ["a", "b", "a"]}})).entries == (
        "a",
        "b",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"model_type": "llama"}, "neither a quantization_config nor a JSON list"),
        (3, "neither a quantization_config nor a JSON list"),
        ([1], "must hold module names"),
        ([""], "must hold module names"),
        (["model.vision.x"], "None of the 1 entries .* matches a layer of llama, first 'model.vision.x'"),
        (["a{99999999999}"], r"is read as a regular expression and is none \(the repetition number"),
        ([r"(\w|\.|[a-z])*[A-Z]"], r"takes more than 0\.5 s; write it without repetitions"),
        (["*proj"], r"The entry '\*proj' is read as a regular expression and is none"),
    ],
)
def test_files_that_are_no_list(given: Any, tiny_folder: TinyFolder, value: Any, said: str):
    with pytest.raises(ManifestError, match=said):
        import_list(given(value), str(tiny_folder("llama")))


def test_files_that_cannot_be_read(tmp_path: Path, tiny_folder: TinyFolder):
    with pytest.raises(ManifestError, match=r"nowhere\.json cannot be read .*Pass a config\.json"):
        import_list(tmp_path / "nowhere.json", str(tiny_folder("llama")))
    with pytest.raises(ManifestError, match=r"cannot be read \(it is a folder\)"):
        import_list(tmp_path, str(tiny_folder("llama")))
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ManifestError, match="no valid JSON"):
        import_list(tmp_path / "c.json", str(tiny_folder("llama")))


def test_layers_have_the_bytes_of_their_precision_and_the_whole_their_sum(
    given: Any, tiny_folder: TinyFolder
):
    folder = tiny_folder("llama")
    name = "model.layers.1.mlp.up_proj"
    manifest = import_list(given([name, "lm_head"], "5.23.0"), str(folder)).manifest
    inventory = inventory_of(folder)
    wanted = {
        x.name: x.bytes_16bit if x.name in (name, "lm_head") else x.bytes_4bit for x in inventory.layers
    }
    assert {x.name: x.bytes for x in manifest.layers} == wanted
    assert manifest.budget.total_bytes == inventory.other_bytes + sum(wanted.values())
    assert manifest.budget.standard_4bit_bytes == inventory.standard_4bit_bytes
