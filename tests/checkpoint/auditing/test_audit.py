"""An audit tells a sound checkpoint from a stale one by its config and headers alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.load import load_dynamic_4bit, load_standard_4bit
from qprobe.checkpoint.storage import stored_bytes
from qprobe.errors import ModelError
from qprobe.models.headers import INDEX, SINGLE
from tests import tiny
from tests.checkpoint.manifests import every_third, manifest_for

TinyFolder = Callable[[str], Path]
KEY = "llm_int8_skip_modules"


@pytest.fixture(scope="module")
def saved(
    tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Any]]:
    """saved(name): a checkpoint of the tiny model with a third of its layers kept, and its manifest."""
    done: dict[str, tuple[Path, Any]] = {}

    def save(name: str) -> tuple[Path, Any]:
        if name not in done:
            folder = tiny_folder(name)
            manifest = manifest_for(folder, every_third(folder))
            model, _ = load_dynamic_4bit(manifest, str(folder), "cpu")
            path = tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            done[name] = path, manifest
        return done[name]

    return save


@pytest.fixture
def stale(saved: Any, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """stale(name, change): a copy of that checkpoint after `change(config)`."""

    def copy(name: str, change: Callable[[dict], object]) -> tuple[Path, Any]:
        source, manifest = saved(name)
        folder = Path(shutil.copytree(source, tmp_path / "copy"))
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder, manifest

    return copy


def entries(config: dict) -> list[str]:
    return config["quantization_config"][KEY]


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_sound_checkpoint_is_clear_with_the_bytes_of_its_manifest(name: str, saved: Any):
    folder, manifest = saved(name)
    found = audit(folder, manifest)
    assert found.ok and found.remarks == (), found.problems
    assert found.total_bytes == manifest.budget.total_bytes
    by_state = {x.name: x.state for x in found.layers}
    assert {n for n, s in by_state.items() if s == "4-bit"} == {
        x.name for x in manifest.layers if x.precision == "nf4"
    }
    assert {x.file for x in found.layers if x.state != "tied"} == {SINGLE}
    assert found.to_json()["layers_16bit"] == len(manifest.skip_modules)


def test_parameter_bytes_are_those_of_the_loaded_model(saved: Any, tiny_folder: TinyFolder):
    folder, manifest = saved("llama_tied")
    model, _ = load_dynamic_4bit(manifest, str(tiny_folder("llama_tied")), "cpu")
    stored, found = stored_bytes(model), audit(folder)
    assert (found.parameter_bytes, found.total_bytes) == (stored.parameter_bytes, stored.total_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllama", "qwen2_vl", "qwen2_5_vl", "llava_pixtral", "llama"])
def test_a_list_that_was_removed_is_caught(name: str, stale: Any):
    folder, manifest = stale(name, lambda c: c["quantization_config"].pop(KEY))
    found = audit(folder)
    plain = {x.name for x in found.layers if x.state == "plain in a 4-bit class"}
    assert plain == set(manifest.skip_modules) - {"lm_head"}  # which stays by default
    assert re.match(rf"{len(plain)} of {len(found.layers)} linears hold plain 16-bit data", found.problems[0])
    assert "the config has no list at all" in found.problems[0]
    # What the headers foretell is what loading gives: a Linear4bit without its state.
    loaded = audit(folder, load=True, device="cpu")
    assert rf"{len(plain)} of {len(found.layers)} linears are wrong once loaded" in loaded.problems[1]
    assert "is a Linear4bit that holds bfloat16 and no quant_state" in loaded.problems[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllama", "qwen2_vl", "qwen2_5_vl", "llava_pixtral", "llama"])
def test_one_misspelt_entry_is_caught_and_named(name: str, stale: Any):
    def misspell(config: dict) -> None:
        entries(config)[0] += "s"

    folder, manifest = stale(name, misspell)
    (problem,) = audit(folder).problems
    first = manifest.skip_modules[0]
    assert first in problem and f"entries that match nothing: '{first}s'" in problem


@pytest.mark.slow
def test_a_list_of_the_names_in_the_files_is_caught(stale: Any, saved: Any):
    _, manifest = saved("mllama")
    in_files = [x.checkpoint_name for x in manifest.layers if x.precision == "bf16"]

    def rename(config: dict) -> None:
        entries(config)[:] = in_files

    folder, _ = stale("mllama", rename)
    plain, *_ = audit(folder, manifest).problems
    assert "linears hold plain 16-bit data" in plain and "entries that match nothing" in plain


def test_a_dropped_head_is_named(stale: Any):
    folder, _ = stale("llama", lambda c: entries(c).remove("lm_head"))
    problems = audit(folder).problems
    assert any("does not name lm_head, the output head" in x for x in problems)
    assert sum("lm_head" in x for x in problems) == 2  # and it holds plain data


@pytest.mark.slow
def test_an_entry_that_matches_too_much_is_caught(stale: Any):
    folder, _ = stale("qwen2_vl", lambda c: entries(c).append("proj"))
    found = audit(folder)
    assert "packed 4-bit codes in the files, but the config's list keeps them" in found.problems[0]
    assert "the entry 'proj' matches 16 layers" in found.problems[0]
    assert any("'proj' matches 16 linears, 14 of these only as the ending" in x for x in found.remarks)
    loaded = audit(folder, load=True, device="cpu").problems
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["merger"], "1 of 9 entries matches no linear: 'merger'."),
        (["merger", "projector"], "2 of 10 entries match no linear: 'merger', 'projector'."),
    ],
)
def test_an_entry_that_matches_nothing_but_harms_nothing_is_a_remark(stale: Any, more: list[str], said: str):
    folder, manifest = stale("llama", lambda c: entries(c).extend(more))
    found = audit(folder, manifest)
    assert found.ok and said in found.remarks


def test_a_config_without_quantization_over_packed_files(stale: Any):
    folder, _ = stale("llama", lambda c: c.pop("quantization_config"))
    (problem,) = audit(folder).problems
    assert "packed 4-bit codes in the files, but the config says nothing of 4-bit" in problem


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bnb_4bit_quant_type", "fp4", "holds nf4, but the config says fp4"),
        ("bnb_4bit_use_double_quant", False, "was made with double quantization"),
    ],
)
def test_codes_of_another_format_are_caught(stale: Any, key: str, value: object, said: str):
    folder, _ = stale("llama", lambda c: c["quantization_config"].update({key: value}))
    assert said in audit(folder).problems[0]


PREFIX = "model.layers.0.mlp.up_proj.weight"
STATE = f"{PREFIX}.quant_state.bitsandbytes__nf4"


def numbers(**changed: object) -> Callable[[dict[str, torch.Tensor]], object]:
    """Changes the JSON object of one layer's quantization state."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        found = {**json.loads(bytes(tensors[STATE].tolist())), **changed}
        tensors[STATE] = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    return change


def scaled(part: str, factor: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({f"{PREFIX}.{part}": tensors[f"{PREFIX}.{part}"] * factor})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scaled("quant_map", 1.001), "a code table (quant_map) that is not that of nf4"),
        (lambda t: t.update({f"{PREFIX}.quant_map": t[f"{PREFIX}.quant_map"].flip(0)}), "quant_map"),
        (lambda t: t.pop(f"{PREFIX}.quant_map"), "quant_map"),
        (
            scaled("nested_quant_map", -1.0),
            "block scales (nested_quant_map) that is not that of bitsandbytes",
        ),
        (scaled("nested_absmax", -1.0), "nested_absmax) that are missing, negative or not finite"),
        (scaled("nested_absmax", float("nan")), "nested_absmax) that are missing, negative or not finite"),
        (numbers(blocksize=128), "has blocksize 128, not 64"),
        (numbers(shape=[64, 96]), "has shape [64, 96], not [96, 64]"),
        (numbers(quant_type="fp4"), "has quant_type 'fp4', not 'nf4'"),
        (numbers(nested_blocksize=128), "has nested_blocksize 128, not 256"),
        (numbers(nested_offset=-0.1), "has nested_offset -0.1, which is no mean of block scales"),
        (numbers(nested_offset=0.0), "has nested_offset 0, though its block scales are not all 0"),
        (numbers(nested_offset="0.1"), "which is no mean of block scales"),
        (lambda t: t.update({STATE: torch.zeros(4, dtype=torch.uint8)}), "a state that is no JSON object"),
    ],
)
def test_a_quantization_state_that_reads_other_weights_is_caught(
    change: Callable[[dict[str, torch.Tensor]], object], said: str, stale: Any
):
    folder, manifest = stale("llama", lambda _: None)
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    (problem,) = (x for x in audit(folder, manifest).problems if "quantization state" in x)
    assert problem.startswith("1 of 14 linears in 4-bit") and "model.layers.0.mlp.up_proj has" in problem
    assert said in problem


def test_a_lost_weight_and_a_weight_of_another_shape(stale: Any):
    folder, _ = stale("llama", lambda _: None)
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    tensors["lm_head.weight"] = torch.zeros(3, 3, dtype=torch.bfloat16)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    missing, shape = audit(folder).problems
    assert "1 of 22 linears have no weight in the files: model.layers.0.self_attn.k_proj" in missing
    assert "lm_head is BF16 of shape [3, 3], not [384, 64] in 16-bit" in shape


def test_another_manifest_is_caught(saved: Any, tiny_folder: TinyFolder):
    folder, _ = saved("llama")
    _, other = saved("llama_tied")
    said = audit(folder, other).problems[0]
    assert "The manifest was written for llama_tied (LlamaForCausalLM, 15 linears)" in said
    assert "this is a LlamaForCausalLM of 22; only one of them has model.layers.0.mlp.down_proj" in said
    nothing = manifest_for(tiny_folder("llama"))
    (more,) = audit(folder, nothing).problems
    assert "7 linears are in 16-bit, though the manifest does not" in more
    everything = manifest_for(tiny_folder("llama"), [x.name for x in nothing.layers])
    (fewer,) = audit(folder, everything).problems
    assert "14 linears are in 4-bit, though the manifest keeps them" in fewer


@pytest.mark.slow
def test_shards_are_read_like_one_file(tiny_folder: TinyFolder, tmp_path: Path):
    folder = tiny_folder("llama")
    manifest = manifest_for(folder, every_third(folder))
    model, _ = load_dynamic_4bit(manifest, str(folder), "cpu")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    found = audit(tmp_path, manifest, load=True, device="cpu")
    assert found.ok and len({x.file for x in found.layers}) > 1
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(ModelError, match=r"names model-00002-of-.* which is missing with \d+ tensors"):
        audit(tmp_path, manifest)


def test_a_16_bit_checkpoint_is_said_to_be_one(tiny_folder: TinyFolder):
    folder = tiny_folder("llama")
    found = audit(folder)
    assert found.ok and "not quantized" in found.remarks[0]
    assert not audit(folder, manifest_for(folder)).ok


def test_standard_4bit_without_a_list_is_clear(tiny_folder: TinyFolder, tmp_path: Path):
    model, _ = load_standard_4bit(str(tiny_folder("llama_tied")), device="cpu")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"][KEY] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = audit(tmp_path)
    assert found.ok and found.entries is None
    assert {x.name for x in found.layers if x.state == "tied"} == {"lm_head"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(model_type="nonsense"), "cannot be loaded"),
        (lambda c: c.update(quantization_config=[1]), "no JSON object"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "quantized by 'gptq'"),
        (lambda c: c["quantization_config"].update({KEY: "lm_head"}), "no list of names"),
    ],
)
def test_configs_that_cannot_be_audited(stale: Any, change: Callable[[dict], object], said: str):
    folder, _ = stale("llama", change)
    with pytest.raises(ModelError, match=said):
        audit(folder)


def test_a_file_that_is_cut_off_is_named(stale: Any):
    folder, _ = stale("llama", lambda _: None)
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="cut off"):
        audit(folder)


def test_an_index_beside_the_single_file_is_a_remark(stale: Any):
    folder, manifest = stale("llama", lambda _: None)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "lost.safetensors"}}))
    found = audit(folder, manifest, load=True, device="cpu")  # transformers loads the single file as well
    assert found.ok and any("ignores the other" in x for x in found.remarks)


@pytest.mark.parametrize("error", [AttributeError("no such part"), AssertionError(), TypeError("a\nb")])
def test_whatever_loading_ends_with_is_the_finding(
    error: Exception, saved: Any, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = saved("llama")

    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    (problem,) = audit(folder, load=True, device="cpu").problems
    said = str(error).partition("\n")[0] or type(error).__name__
    assert problem == f"transformers cannot load the checkpoint: {said}."


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("too little"),
        MemoryError("too little"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: too little"),
        OSError(12, "Cannot allocate memory: too little"),
    ],
)
def test_too_little_memory_is_no_finding(error: Exception, saved: Any, monkeypatch: pytest.MonkeyPatch):
    folder, _ = saved("llama")

    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(type(error), match="too little"):
        audit(folder, load=True, device="cpu")
