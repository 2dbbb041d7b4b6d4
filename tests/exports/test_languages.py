"""`import` reads what `export` writes and what others publish, each by its tool's own rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qprobe.errors import ManifestError
from qprobe.exports import export_manifest, export_targets
from qprobe.exports.languages import MAX_TEXT, from_text
from qprobe.exports.lists import match_list, read_list
from tests.exports.test_targets import chosen
from tests.models import trees
from tests.runs.runs import four_layers, inventory_of, linear

# The one names a checkpoint that carries the list, the other tensors of another file format.
NO_LISTS = ("llama-factory", "llama.cpp")
MODELS = ("LlamaForCausalLM", "Qwen2VLForConditionalGeneration", "LlavaForConditionalGeneration")


def kept(path: Path, inventory: Any, architecture: str = "LlamaForCausalLM") -> set[str]:
    given = read_list(path)
    matched = match_list(given.entries or (), inventory, given.language, architecture)
    return {name for one in matched for name in one.layers}


def config(folder: Path, **quantization: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"quantization_config": quantization}))
    return path


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("tool", [x for x in export_targets() if x not in NO_LISTS])
def test_what_is_exported_comes_back_as_it_was(tool: str, architecture: str, tmp_path: Path):
    manifest, path = chosen(architecture), tmp_path / "list"
    path.write_text(export_manifest(manifest, tool).text)
    assert kept(path, trees.inventory(architecture), architecture) == set(manifest.skip_modules)


@pytest.mark.parametrize("tool", NO_LISTS)
def test_a_text_without_a_list_is_refused(tool: str, tmp_path: Path):
    (tmp_path / "list").write_text(export_manifest(chosen("LlamaForCausalLM"), tool).text)
    with pytest.raises(ManifestError, match=r"no valid JSON .* what qprobe export wrote"):
        read_list(tmp_path / "list")


Q, K, A = "model.q", "model.k", "model.a"  # of `four_layers`, beside model.b and lm_head


@pytest.mark.parametrize(
    ("quantization", "expected", "label"),
    [
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*[qk]$"]}, {Q, K}, "compressed-tensors"),
        ({"quant_method": "compressed-tensors", "ignore": ["model.*"]}, set(), "compressed-tensors"),
        ({"quant_method": "modelopt", "ignore": ["model.?", "*.q", "model.k*"]}, {Q, K}, "ModelOpt"),
        ({"exclude_modules": ["lm_head"]}, {"lm_head"}, "ModelOpt"),
        ({"quant_method": "gptq", "dynamic": {"-:.*[qk]": {}, "-:^model$": {}}}, {Q, K}, "GPTQModel"),
        ({"quant_method": "auto-round", "extra_config": {A: {"bits": 16}}}, {A}, "AutoRound"),
        ({"quant_method": "auto-round", "extra_config": {".*[qk]": {"bits": 16}}}, {Q, K}, "AutoRound"),
        ({"quant_method": "awq", "modules_to_not_convert": ["odel.a"]}, {A}, "AutoAWQ"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["odel.a"]}, {A}, "transformers 5.21 or newer"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["a"]}, {A}, None),
    ],
)
def test_a_published_list_is_read_by_the_rule_of_its_tool(
    quantization: dict, expected: set[str], label: str | None, tmp_path: Path
):
    path = config(tmp_path, **quantization)
    assert kept(path, four_layers()) == expected
    assert label is None or read_list(path).language.label == label


def test_the_name_of_a_module_means_that_module_to_autoround(tmp_path: Path):
    # As a pattern, "model.a" is found in "vision.model.a" as well; as the name of a module it is not.
    inventory = inventory_of(linear("model.a"), linear("vision.model.a"))
    path = config(tmp_path, quant_method="auto-round", extra_config={"model.a": {"bits": 16}})
    assert kept(path, inventory) == {"model.a"}


def test_other_bits_are_said(tmp_path: Path):
    found = read_list(config(tmp_path, quant_method="gptq", dynamic={"-:a": {}, "+:b": {"bits": 8}}))
    assert found.entries == ("-:a",) and "'+:b'" in found.notes[-1]
    found = read_list(config(tmp_path, quant_method="auto-round", extra_config={"a": {"bits": 8}, "b": {}}))
    assert found.entries == () and "'a', 'b'" in found.notes[-1]


def test_the_config_that_modelopt_puts_beside_a_checkpoint_is_read(tmp_path: Path):
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["model.a*"]}}))
    assert kept(path, four_layers()) == {A}


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "hqq", "skip_modules": ["lm_head"]},
        {"quant_method": "fp8", "ignored_layers": ["lm_head"]},
        {"quant_method": "new", "layers_to_keep": {"lm_head": 16}},
        {"quant_method": "awq", "modules_to_not_convert": ["a"], "unquantized_layers": ["b"]},
    ],
)
def test_a_list_in_an_unknown_language_is_never_no_list(quantization: dict, tmp_path: Path):
    with pytest.raises(ManifestError, match=r"says under \w+ what stays in 16-bit, in a language of"):
        read_list(config(tmp_path, **quantization))


@pytest.mark.parametrize(
    "text", ["skip_modules = [", "skip_modules = open('x')", "(" * 5000, "a: [", "x" * (MAX_TEXT + 1), "\0"]
)
def test_hostile_text_is_no_config(text: str):
    assert from_text(text) is None
