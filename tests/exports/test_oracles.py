"""Exported lists under each tool's matching rule, written a second time; none of the package's own rules.

The writers check their entries with rules of the package. Were such a rule wrong, writer and check would
agree; these oracles, from each tool's documented behaviour, would not. They look at names as today's
transformers, or the tool's own models, have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from qprobe.exports import export_manifest
from qprobe.manifest.records import ManifestLayer
from tests.exports.test_targets import chosen, entries_in, gguf_options
from tests.models import trees

Keeps = Callable[[list[str], str], bool]


def by_transformers(entries: list[str], name: str) -> bool:
    """The installed transformers itself."""
    return not should_convert_module(name, entries)


def by_llm_compressor(entries: list[str], name: str) -> bool:
    """`ignore`: a name in full, or "re:" and a regular expression that is matched from the name's start."""
    patterns = [re.compile(x[3:]) for x in entries if x[:3] == "re:"]
    return name in entries or any(p.match(name) for p in patterns)


def by_gptqmodel(entries: list[str], name: str) -> bool:
    """`dynamic`: "-:" before a regular expression leaves what it matches from the start unquantized."""
    return any(re.compile(x[2:]).match(name) for x in entries if x[:2] == "-:")


def by_autoround(entries: list[str], name: str) -> bool:
    """`layer_config`: a key between ^ and $ is a name in full; dots are no wildcards."""
    assert all(x[0] == "^" and x[-1] == "$" for x in entries)
    return name in {x[1:-1] for x in entries}


def by_transformers_4(entries: list[str], name: str) -> bool:
    """A last part by itself, a name in full, or a text followed by a dot somewhere in the name."""
    return name in entries or name.split(".")[-1] in entries or any(name.find(x + ".") >= 0 for x in entries)


def in_transformers_4(layer: ManifestLayer) -> str:
    """The name in 4.51 and before: that of the files, where CLIP and SigLIP still had a `vision_model`."""
    name = layer.checkpoint_name
    for part in ("encoder.layers.", "head."):
        name = name.replace(f"vision_tower.{part}", f"vision_tower.vision_model.{part}")
    return name


RULES: dict[str, tuple[str, Keeps]] = {
    "transformers": ("llm_int8_skip_modules", by_transformers),
    "transformers-4": ("llm_int8_skip_modules", by_transformers_4),
    "llm-compressor": ("ignore", by_llm_compressor),
    "gptqmodel": ("dynamic", by_gptqmodel),
    "autoround": ("layer_config", by_autoround),
}


@pytest.mark.parametrize("architecture", trees.CONFIGS)
@pytest.mark.parametrize("tool", RULES)
def test_the_list_keeps_exactly_the_layers_of_the_manifest(tool: str, architecture: str):
    manifest = chosen(architecture)
    key, keeps = RULES[tool]
    entries = list(json.loads(export_manifest(manifest, tool).text)[key])
    names = [in_transformers_4(x) if tool == "transformers-4" else x.name for x in manifest.layers]
    wanted = [x.precision == "bf16" for x in manifest.layers]
    assert [keeps(entries, name) for name in names] == wanted
    assert {*wanted} == {True, False}


@pytest.mark.parametrize("tool", ["transformers-python", "unsloth", "axolotl"])
def test_lists_in_other_wrappings_are_read_by_transformers_alike(tool: str):
    manifest = chosen("Qwen2VLForConditionalGeneration")
    entries = list(entries_in(tool, export_manifest(manifest, tool).text))
    kept = [x.name for x in manifest.layers if by_transformers(entries, x.name)]
    assert kept == list(manifest.skip_modules)


def test_vllm_keeps_a_fused_layer_by_its_own_name_and_no_other():
    # vLLM skips a layer where an entry is a part of its name, or its first parts; it joins q, k and v.
    manifest = chosen("LlamaForCausalLM")
    config = json.loads(export_manifest(manifest, "vllm").text)["quantization_config"]
    entries = set(config["llm_int8_skip_modules"])
    for layer in manifest.layers:
        joint = re.sub(r"\b[qkv]_proj$", "qkv_proj", layer.name)
        name = re.sub(r"\b(gate|up)_proj$", "gate_up_proj", joint)
        parts = name.split(".")
        beginnings = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        assert bool(entries & (beginnings | {*parts})) == (layer.precision == "bf16"), name


def test_llama_quantize_keeps_exactly_the_tensors_of_the_manifest():
    # It searches the pattern, in lower case, anywhere in the tensor's name.
    manifest = chosen("LlamaForCausalLM")
    leaves = dict(
        q="attn_q", k="attn_k", v="attn_v", o="attn_output", gate="ffn_gate", up="ffn_up", down="ffn_down"
    )
    options = gguf_options(export_manifest(manifest, "llama.cpp").text)["--tensor-type"]
    patterns = [option.rsplit("=", 1)[0].lower() for option in options]
    for layer in manifest.layers:
        found = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(\w+)_proj", layer.name)
        if found is None:
            assert layer.name == "lm_head"
            continue
        tensor = f"blk.{found[1]}.{leaves[found[2]]}.weight"
        assert any(re.search(p, tensor) for p in patterns) == (layer.precision == "bf16"), tensor
