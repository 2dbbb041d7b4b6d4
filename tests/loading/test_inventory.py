"""Inventories, sizes and names against figures computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, MllamaConfig

from qprobe.checkpoint.load import load_standard_4bit
from qprobe.checkpoint.storage import stored_bytes
from qprobe.errors import ModelError
from qprobe.loading.config import load_config
from qprobe.loading.inventory import (
    FLOAT32,
    WHY_ATTENTION,
    WHY_SUBCLASS,
    fingerprint,
    linear_modules,
    list_layers,
)
from qprobe.loading.processor import load_processor
from qprobe.loading.reference import load_reference
from qprobe.loading.skeleton import meta_model
from qprobe.loading.source import Source, at_revision, known, resolve
from qprobe.models.families.mllama import UNSLOTH_LLAMA_11B
from qprobe.records import FormatSpec, Inventory
from qprobe.registry.precisions import absmax_bytes, packed_bytes
from tests import tiny
from tests.checkpoint.manifests import inventory_of


@pytest.fixture(scope="module")
def llama_11b() -> Inventory:
    config = MllamaConfig(architectures=["MllamaForConditionalGeneration"])
    config.vision_config.image_size = 560
    return list_layers(meta_model(config, "bfloat16"), FormatSpec())


@pytest.mark.slow
def test_llama_11b_has_the_published_sizes(llama_11b: Inventory) -> None:
    # Published for Llama-3.2-11B-Vision: 522 linears, 21,340,441,670 bytes in 16-bit.
    everything = frozenset(x.name for x in llama_11b.layers)
    assert len(llama_11b.layers) == 522
    assert llama_11b.total_bytes(everything) == 21_340_441_670
    assert llama_11b.standard_4bit_bytes == 7_178_803_270


def test_the_published_list_keeps_19_layers_by_checkpoint_names(llama_11b: Inventory) -> None:
    kept = UNSLOTH_LLAMA_11B.kept(llama_11b)
    assert len(kept) == 19
    assert llama_11b.total_bytes(kept) == 7_907_505_158


def test_absmax_of_a_weight_that_fills_no_block() -> None:
    # 60 x 60 = 3,600 elements: 57 blocks of 64 (the last one short), one block of 256 scales.
    assert packed_bytes((60, 60)) == 1_800
    assert absmax_bytes((60, 60), 64, True) == 57 + 4
    assert absmax_bytes((60, 60), 64, False) == 4 * 57


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_linear_has_a_tower_a_group_and_a_name_in_the_files(
    name: str, tiny_folder: Callable[[str], Path]
) -> None:
    folder = tiny_folder(name)
    model = load_reference(str(folder), "cpu").model
    inventory = list_layers(model, FormatSpec())
    assert [x.name for x in inventory.layers] == list(linear_modules(model))
    assert all(x.tower != "other" for x in inventory.layers)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    for layer in inventory.layers:
        assert f"{layer.checkpoint_name}.weight" in stored or layer.fixed == "tied"


@pytest.mark.slow
def test_a_group_holds_all_its_members(tiny_folder: Callable[[str], Path]) -> None:
    model = load_reference(str(tiny_folder("mllama")), "cpu").model
    groups: dict[str, list[str]] = {}
    for layer in list_layers(model, FormatSpec()).layers:
        groups.setdefault(layer.group, []).append(layer.name.rpartition(".")[2])
    assert sorted(map(tuple, {tuple(v) for v in groups.values() if len(v) > 1})) == [
        ("gate_proj", "up_proj"),
        ("k_proj", "v_proj"),
        ("q_proj", "k_proj", "v_proj"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_fingerprint_is_known_before_loading(name: str, tiny_folder: Callable[[str], Path]) -> None:
    loaded = load_reference(str(tiny_folder(name)), "cpu")
    assert fingerprint(meta_model(load_config(loaded.source), "bfloat16")) == loaded.identity.fingerprint


@pytest.mark.slow
def test_fingerprints_tell_models_apart(tiny_folder: Callable[[str], Path]) -> None:
    prints = {load_reference(str(tiny_folder(n)), "cpu").identity.fingerprint for n in tiny.NAMES}
    assert len(prints) == len(tiny.NAMES)


def test_a_tied_head_is_fixed_and_counted_once(tiny_folder: Callable[[str], Path]) -> None:
    model = load_reference(str(tiny_folder("llama_tied")), "cpu").model
    inventory = list_layers(model, FormatSpec())
    (head,) = [x for x in inventory.layers if x.fixed]
    assert (head.name, head.fixed) == ("lm_head", "tied")
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())  # shared ones once
    buffers = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n in model.state_dict())
    assert inventory.total_bytes(frozenset(x.name for x in inventory.layers)) == parameters + buffers


def test_what_no_4bit_loader_converts_is_named() -> None:
    class Own(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(64, 64)
            self.own = Own(64, 64)
            self.attention = nn.MultiheadAttention(64, 4)
            self.experts = nn.Parameter(torch.zeros(2, 64, 64))

    inventory = list_layers(Model(), FormatSpec())
    assert [x.name for x in inventory.layers] == ["plain"]
    why = {x.name: x.why for x in inventory.uncovered}
    assert why["own.weight"] == WHY_SUBCLASS
    assert why["attention.in_proj_weight"] == why["attention.out_proj.weight"] == WHY_ATTENTION
    assert "experts" in why


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BLIP-2, whose class keeps the whole Q-Former in float32 where the rest is in fp16."""
    folder = tmp_path_factory.mktemp("blip")
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Blip2Config(
        vision_config={**small, "intermediate_size": 64, "image_size": 28, "patch_size": 14},
        qformer_config={**small, "intermediate_size": 64, "encoder_hidden_size": 64, "vocab_size": 50},
        text_config={
            **small,
            "model_type": "opt",
            "ffn_dim": 64,
            "word_embed_proj_dim": 64,
            "vocab_size": 99,
        },
        num_query_tokens=4,
    )
    Blip2ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float16", 4)])
def test_what_transformers_keeps_in_float32_is_fixed_with_its_own_bytes(
    blip_folder: Path, dtype: Literal["bfloat16", "float16"], width: int
) -> None:
    loaded = load_reference(str(blip_folder), "cpu", dtype)
    spec = FormatSpec(compute_dtype=dtype)
    inventory = list_layers(loaded.model, spec)
    kept = {x.name: x for x in inventory.layers if x.fixed == FLOAT32}
    assert (
        set(kept) == {x.name for x in inventory.layers if x.name.startswith("qformer.")} and len(kept) == 10
    )
    assert {x.bytes_16bit / (x.in_features * x.out_features) for x in kept.values()} == {width}
    skeleton = meta_model(load_config(loaded.source), dtype)
    assert fingerprint(skeleton) == loaded.identity.fingerprint
    assert list_layers(skeleton, spec) == inventory


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_such_a_model_loads_in_4bit_with_the_bytes_of_its_inventory(
    blip_folder: Path, dtype: Literal["bfloat16", "float16"]
) -> None:
    spec = FormatSpec(compute_dtype=dtype)
    model, _ = load_standard_4bit(
        str(blip_folder), spec, "cpu"
    )  # verified: raises if a layer is not as listed
    assert stored_bytes(model).total_bytes == inventory_of(blip_folder, spec).standard_4bit_bytes


def test_a_revision_is_of_the_hub_and_not_of_a_folder(tmp_path: Path) -> None:
    assert at_revision(Source("a/b", "a/b"), "v1").revision == "v1"
    assert at_revision(Source("b", str(tmp_path)), "v1").revision is None


@pytest.mark.parametrize("model", ["no-such-model", "./nowhere", "/nowhere/at/all"])
def test_no_such_model_is_one_sentence_with_known_names(model: str) -> None:
    with pytest.raises(ModelError, match=r"llama-3\.2-11b-vision.*qprobe models"):
        resolve(model)


def test_a_misspelt_name_is_answered_with_the_nearest_ones() -> None:
    with pytest.raises(ModelError, match=r"Did you mean qwen2\.5-vl-7b, "):
        resolve("qwen2.5-vl7b")


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "other"), [("demo", "another folder"), ("llama-3.2-11b-vision", "meta-llama/")]
)
def test_a_folder_called_like_a_known_model(
    name: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = resolve(name)
    (tmp_path / name).mkdir()
    assert resolve(name) == there and known(name) is not None  # it is no model, so there is no question
    (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"Pass \./{name} for the folder; for the known model .*{other}"):
        resolve(name)
    assert resolve(f"./{name}").location == name
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_a_processor_that_needs_torchvision_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_arguments: object, **_keywords: object) -> None:
        raise ImportError("\nQwen2VLImageProcessor requires the Torchvision library but it was not found ...")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lacking)
    with pytest.raises(ModelError, match=r"'qwen' needs torchvision .* `pip install torchvision`"):
        load_processor(Source("qwen", "/nowhere"))


def test_weights_only_in_pickles_are_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    for file in tiny_folder("llama").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_reference(str(tmp_path), "cpu")
