"""Bytes from a config alone: figures published or computed elsewhere, and those of loaded models."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, BitsAndBytesConfig, GPT2Config

from qprobe import plan as exported
from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.import_list import import_list
from qprobe.checkpoint.load import load_dynamic_4bit, load_standard_4bit
from qprobe.checkpoint.plan import LayoutSize, SizePlan, _dead, plan
from qprobe.checkpoint.sizes import BUFFER, everything_outside
from qprobe.checkpoint.storage import stored_bytes
from qprobe.errors import ManifestError, ModelError
from qprobe.loading.config import model_class
from qprobe.loading.reference import load_reference
from qprobe.manifest.write import write_manifest
from qprobe.records import FormatSpec
from tests import tiny
from tests.checkpoint.manifests import every_third, inventory_of, manifest_for

TinyFolder = Callable[[str], Path]
GIB = 2**30


def layout(found: SizePlan, name: str) -> LayoutSize:
    (one,) = [x for x in found.layouts if x.name == name]
    return one


def figures(found: SizePlan, name: str) -> tuple[int, int, int]:
    one = layout(found, name)
    return one.layers_4bit, one.parameter_bytes, one.total_bytes


@pytest.fixture(scope="module")
def llama_11b() -> SizePlan:
    return plan("llama-3.2-11b-vision")


@pytest.mark.slow
def test_llama_11b_has_the_published_figures(llama_11b: SizePlan) -> None:
    assert (llama_11b.parameters, llama_11b.linear_layers) == (10_670_220_835, 522)
    assert figures(llama_11b, "16-bit") == (0, 21_340_441_670, 21_340_441_670)
    assert figures(llama_11b, "nf4") == (521, 7_027_379_270, 7_178_803_270)
    assert figures(llama_11b, "unsloth") == (503, 7_763_872_838, 7_907_505_158)
    for name in ("16-bit", "nf4", "unsloth"):
        one = layout(llama_11b, name)
        assert one.published_gib == round(one.parameter_bytes / GIB, 2)


def test_without_double_quantization_a_block_costs_4_bytes(llama_11b: SizePlan) -> None:
    # The 521 quantized weights: 2 bytes each in 16-bit against half a byte in 4-bit.
    elements = (21_340_441_670 - 7_027_379_270) * 2 // 3
    assert figures(llama_11b, "nf4-single") == (521, 7_027_379_270, 7_027_379_270 + 4 * elements // 64)
    assert figures(llama_11b, "fp4") == figures(llama_11b, "nf4-single")
    assert (layout(llama_11b, "nf4").double_quant, layout(llama_11b, "fp4").double_quant) == (True, False)


@pytest.mark.slow
def test_qwen2_vl_2b_has_a_tied_head_and_the_published_figures() -> None:
    found = plan("qwen2-vl-2b")
    assert (found.parameters, found.linear_layers) == (2_208_985_600, 327)
    assert round(layout(found, "nf4").parameter_bytes / GIB, 4) == 1.3577
    assert round(layout(found, "16-bit").parameter_bytes / GIB, 4) == 4.1146
    assert layout(found, "nf4").layers_4bit == 326
    (embedding,) = [x for x, _ in found.outside if x.name.endswith("embed_tokens.weight")]
    assert embedding.bytes == 0 and "tied to lm_head" in embedding.why
    assert any("unsloth publishes 1.81 GiB" in note for note in found.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "sixteen_bit", "nf4"), [("pixtral-12b", 23.62, 7.78), ("qwen2-vl-7b", 15.44, 5.39)]
)
def test_figures_computed_elsewhere(model: str, sixteen_bit: float, nf4: float) -> None:
    found = plan(model)
    assert round(layout(found, "16-bit").parameter_bytes / GIB, 2) == sixteen_bit
    assert round(layout(found, "nf4").parameter_bytes / GIB, 2) == nf4


@pytest.mark.slow
def test_pixtral_with_vision_and_projector_in_16_bit_is_8_39_gib() -> None:
    sizes = {t.name: t.layouts for t in plan("pixtral-12b").towers}
    mixed = sizes["language"]["nf4"].parameter_bytes + sum(
        sizes[tower]["16-bit"].parameter_bytes for tower in ("vision", "projector")
    )
    assert round(mixed / GIB, 2) == 8.39


@pytest.mark.slow
def test_fused_experts_are_in_4_bit_and_their_routers_are_not() -> None:
    # 48 layers of 128 experts: gate and up (2 * 768 x 2048), down (2048 x 768); half a byte per weight, a
    # byte per block of 64, 4 bytes per 256 blocks. 192 linears of attention and lm_head beside them.
    found = plan("qwen3-30b-a3b")
    assert found.linear_layers == 4 * 48 + 1 + 2 * 48
    assert {x.name.split(".", 3)[3] for x, _ in found.outside if ".mlp." in x.name} == {"mlp.gate.weight"}
    elements = 48 * 128 * 3 * 768 * 2048
    nf4, sixteen_bit = layout(found, "nf4"), layout(found, "16-bit")
    assert nf4.layers_4bit == 48 * 6
    saved_by_attention = 48 * sum(2 * x - four_bit_bytes(x) for x in 2 * [2048 * 4096] + 2 * [2048 * 512])
    saved = sixteen_bit.total_bytes - nf4.total_bytes - saved_by_attention
    assert saved == 2 * elements - four_bit_bytes(elements)
    assert nf4.total_bytes < 17 * 2**30


def four_bit_bytes(elements: int) -> int:
    return elements // 2 + elements // 64 + 4 * (elements // 64 // 256)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    ["llama-3.2-11b-vision", "gemma-3-4b", "internvl3-1b", "qwen3-30b-a3b", "gemma-4-26b-a4b", "demo"],
)
def test_towers_and_what_is_outside_sum_to_the_whole(model: str) -> None:
    found = plan(model)
    assert sum(t.parameters for t in found.towers) == found.parameters
    assert sum(t.linear_layers for t in found.towers) == found.linear_layers
    assert "other" not in {t.name for t in found.towers}
    for one in found.layouts:
        parts = [t.layouts[one.name] for t in found.towers]
        assert sum(x.layers_4bit for x in parts) == one.layers_4bit
        assert sum(x.parameter_bytes for x in parts) == one.parameter_bytes
        assert sum(x.total_bytes for x in parts) == one.total_bytes
    names = [x.name for x, _ in found.outside]
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_what_is_outside_are_the_other_bytes_of_the_inventory(name: str, tiny_folder: TinyFolder) -> None:
    model = load_reference(str(tiny_folder(name)), "cpu").model
    assert sum(x.bytes for x in everything_outside(model)) == inventory_of(tiny_folder(name)).other_bytes


def test_a_saved_buffer_is_no_parameter() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    buffers = {x.name: x for x in everything_outside(model) if x.why == BUFFER}
    assert set(buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert {x.parameter_bytes for x in buffers.values()} == {0} and buffers["1.running_mean"].bytes == 32


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_plan_has_the_bytes_of_the_loaded_4bit_models(
    name: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder, manifest = tiny_folder(name), tmp_path / "skiplist.json"
    write_manifest(manifest, manifest_for(folder, every_third(folder)))
    found = plan(str(folder), manifest)
    loaded = {
        "16-bit": load_reference(str(folder), "cpu").model,
        "nf4": load_standard_4bit(str(folder), device="cpu")[0],
        "nf4-single": load_standard_4bit(str(folder), FormatSpec(double_quant=False), "cpu")[0],
        "manifest": load_dynamic_4bit(manifest, str(folder), "cpu")[0],
    }
    for layout_name, model in loaded.items():
        stored = stored_bytes(model)
        one = layout(found, layout_name)
        assert (one.parameter_bytes, one.total_bytes) == (stored.parameter_bytes, stored.total_bytes)
    assert found.parameters == sum(p.numel() for p in loaded["16-bit"].parameters())
    assert 0 < layout(found, "manifest").layers_4bit < layout(found, "nf4").layers_4bit


def test_fp4_is_what_load_in_4bit_alone_gives(tiny_folder: TinyFolder) -> None:
    folder = tiny_folder("llama")
    auto = model_class(AutoConfig.from_pretrained(folder))
    alone = BitsAndBytesConfig(load_in_4bit=True)
    model: Any = auto.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=alone, device_map={"": "cpu"}
    )
    quantized = model.model.layers[0].mlp.up_proj.weight
    assert (quantized.quant_type, quantized.quant_state.nested) == ("fp4", False)
    one, stored = layout(plan(str(folder)), "fp4"), stored_bytes(model)
    assert (one.parameter_bytes, one.total_bytes) == (stored.parameter_bytes, stored.total_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_layout_of_a_manifest_is_in_its_own_format(tiny_folder: TinyFolder, double_quant: bool) -> None:
    spec = FormatSpec(double_quant=double_quant, compute_dtype="float16")
    written = manifest_for(tiny_folder("mllama"), every_third(tiny_folder("mllama")), spec)
    found = plan(str(tiny_folder("mllama")), written)
    assert layout(found, "manifest").total_bytes == written.budget.total_bytes
    assert layout(found, "manifest").layers_4bit == sum(x.precision == "nf4" for x in written.layers)


def test_a_manifest_for_another_model_is_refused_with_both_fingerprints(tiny_folder: TinyFolder) -> None:
    written = manifest_for(tiny_folder("llama"))
    own = plan(str(tiny_folder("llama_tied"))).fingerprint
    with pytest.raises(ManifestError) as refused:
        plan(str(tiny_folder("llama_tied")), written)
    assert own[:16] in str(refused.value) and written.model.fingerprint[:16] in str(refused.value)


def test_a_manifest_that_lacks_a_layer_is_refused(tiny_folder: TinyFolder) -> None:
    whole = manifest_for(tiny_folder("llama"))
    with pytest.raises(ManifestError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        plan(str(tiny_folder("llama")), replace(whole, layers=whole.layers[1:]))


def test_only_the_config_of_a_folder_is_read(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder("qwen2_vl") / "config.json").read_bytes())
    assert plan(str(tmp_path)).layouts == plan(str(tiny_folder("qwen2_vl"))).layouts


def test_an_architecture_that_is_not_in_the_catalogue_works(tmp_path: Path) -> None:
    config = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 64, "ffn_dim": 96}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "word_embed_proj_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30}))
    found = plan(str(tmp_path))
    # Two layers of q, k, v, out (64 x 64) and fc1, fc2 (64 x 96); the head is the embedding's.
    assert (found.linear_layers, layout(found, "nf4").layers_4bit) == (13, 12)
    assert found.hub_id is None and [t.name for t in found.towers] == ["language"]
    packed = 2 * (4 * 64 * 64 + 2 * 64 * 96) // 2
    biases_and_norms = 2 * (4 * 64 + 96 + 64 + 4 * 64) + 2 * 64
    positions = (30 + 2) * 64
    assert layout(found, "nf4").parameter_bytes == packed + 2 * (100 * 64 + positions + biases_and_norms)


def test_a_config_of_a_quantized_checkpoint_is_told(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = plan(str(tmp_path))
    assert found.layouts == plan(str(tiny_folder("llama"))).layouts
    assert any("quantized already" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a valid JSON"),
        ("[1]", "model_type"),
        ('{"model_type": "never-heard-of"}', "never-heard-of"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "cannot be built"),
        ('{"model_type": "llama", "num_hidden_layers": "abc"}', "num_hidden_layers.*expected int, got str"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}', "exists only as code"),
    ],
)
def test_a_config_that_builds_nothing_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "list.json").write_text('["lm_head"]')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    runs = [plan, lambda folder: import_list(tmp_path / "list.json", folder), audit]
    for run in runs[: 2 if text in ("{", "[1]") else 3]:  # audit says of those what it says of its own
        with pytest.raises(ModelError, match=said) as refused:
            run(str(tmp_path))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model", ["", " "])
def test_an_empty_name_is_not_the_working_directory(
    model: str, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder("llama"))
    with pytest.raises(ModelError, match="empty name"):
        plan(model)


@pytest.mark.slow
def test_a_known_name_needs_no_network_and_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert plan("qwen3-0.6b").parameters == 596_049_920
    assert plan("demo-outliers").parameters == plan("demo").parameters


def test_an_unknown_hub_id_without_a_network_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="pass a local folder"):
        plan("nobody/nothing")


def test_weights_of_a_gated_model_say_what_to_do() -> None:
    with pytest.raises(ModelError) as refused:
        load_reference("llama-3.2-1b", "cpu")
    said = str(refused.value)
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B" in said and "hf auth login" in said
    assert "qprobe plan --model llama-3.2-1b" in said
    with pytest.raises(ModelError) as refused:
        load_reference("qwen3-0.6b", "cpu")
    assert "licence" not in str(refused.value) and "local folder" in str(refused.value)


@pytest.mark.slow
def test_11b_takes_less_than_2_gib_and_15_seconds_of_work() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "qprobe", "plan", "--model", "llama-3.2-11b-vision", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["parameters"] == 10_670_220_835
    # Processor time, not the clock: other tests run beside this one. ru_maxrss is in KiB on Linux.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15
    unit = 1 if sys.platform == "darwin" else 1024
    assert after.ru_maxrss * unit < 2 * GIB


def test_the_exported_function_is_this_one() -> None:
    assert exported is plan


def keys(rows: Iterable[dict[str, Any]]) -> set[str]:
    (same,) = {tuple(row) for row in rows}
    return set(same)


def test_the_json_object_has_the_keys_of_its_contract(llama_11b: SizePlan) -> None:
    data = json.loads(json.dumps(llama_11b.to_json()))
    assert {"model", "hub_id", "parameters", "linear_layers", "layouts", "towers", "outside"} <= data.keys()
    assert (data["model"], data["parameters"]) == ("llama-3.2-11b-vision", 10_670_220_835)
    assert keys(data["layouts"]) >= {"name", "layers_4bit", "parameter_bytes", "total_bytes"}
    assert [x["name"] for x in data["layouts"]] == [
        *("16-bit", "nf4", "nf4-single", "fp4"),
        *("unsloth", "llm-compressor"),  # published lists
    ]
    assert keys(data["outside"]) == {"name", "tower", "bytes", "why"}
    assert all(x["why"] for x in data["outside"])
    assert [t["name"] for t in data["towers"]] == ["vision", "projector", "cross_attention", "language"]


def test_a_model_of_which_nothing_is_converted_is_told_so(tmp_path: Path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    found = plan(str(tmp_path))
    assert any(re.search(r"No layer of GPT2LMHeadModel is ever in 4-bit .*c_attn", x) for x in found.notes)
    assert {x.total_bytes for x in found.layouts} == {layout(found, "16-bit").total_bytes}


def test_entries_of_a_published_list_that_match_nothing_are_named():
    assert _dead("somebody", (), 3) == ""
    assert _dead("somebody", ("a",), 3) == "1 of 3 entries of somebody's list matches nothing here: a."
    assert _dead("somebody", ("a", "b"), 3) == "2 of 3 entries of somebody's list match nothing here: a, b."
