"""Each tool's text: readable by its format, exact by its rule, and true of the manifest."""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import replace

import pytest
import yaml
from peft import LoraConfig, inject_adapter_in_model

from qprobe.errors import ManifestError, QprobeError
from qprobe.exports import export_manifest, export_targets, matchers
from qprobe.exports.targets import autoround, gptqmodel, llama_cpp, llm_compressor, vllm
from qprobe.exports.targets.vllm import vllm_modules
from qprobe.manifest.records import Manifest
from qprobe.manifest.write import write_manifest
from qprobe.models.spellings import spellings
from qprobe.records import CodesFile, Uncovered
from qprobe.registry.precisions import measurable
from tests.exports.manifests import manifest_of, of_tree
from tests.models import trees

FORMATS = tuple(x.name for x in measurable())
TOOLS = tuple(export_targets())
GGUF_MODELS = (
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
)


def in_format(manifest: Manifest, name: str) -> Manifest:
    """`manifest` in another 4-bit format, with a file of weights where that has one."""
    codes = None if name == "nf4" else CodesFile("weights.safetensors", "0" * 64)
    return replace(manifest, format=replace(manifest.format, name=name), codes=codes)


def chosen(architecture: str) -> Manifest:
    """Half of the fused groups, from every tower."""
    inventory = trees.inventory(architecture)
    groups = list(dict.fromkeys(x.group for x in inventory.layers))[::2]
    # vLLM joins queries with keys and values also where qprobe does not: keep such an attention whole.
    parents = {g.partition(".{")[0] for g in groups if "{k_proj" in g or "{q_proj" in g}
    return of_tree(
        architecture,
        [
            x.name
            for x in inventory.layers
            if (x.name.rpartition(".")[0] in parents and x.name.endswith(("q_proj", "k_proj", "v_proj")))
            or (x.group in groups and not x.name.endswith(("q_proj", "k_proj", "v_proj")))
        ],
    )


def kept_by(rule, entries, names):
    return {name for name in names for entry in entries if rule(entry, name)}


@pytest.mark.parametrize("tool", TOOLS)
def test_calibrated_weights_are_exported_as_the_nf4_that_they_are(tool: str):
    manifest = chosen("LlamaForCausalLM")
    plain, made = (export_manifest(in_format(manifest, name), tool) for name in FORMATS)
    assert made.text == plain.text  # no tool has a type "nf4-calibrated"
    lost = set(made.notes) - set(plain.notes)
    if tool in ("vllm", "peft", "llama-factory"):  # which take a model that is in 4-bit already
        assert not lost
        return
    (note,) = lost
    assert note.endswith("The KL in the manifest is that of calibrated NF4.")
    # bitsandbytes rounds to nearest; the others have codes and ways of their own, and no use for a checkpoint
    # of NF4.
    if tool in ("transformers", "transformers-python", "transformers-4", "unsloth", "axolotl"):
        assert "itself and rounds to nearest" in note and "`qprobe quantize`" in note
    else:
        assert "chooses 4-bit codes of its own" in note and "`qprobe quantize`" not in note
        word = {"gptqmodel": "GPTQ on", "autoround": "gradient", "llm-compressor": "modifier"}
        assert word.get(tool, "importance matrix") in note


@pytest.mark.slow
@pytest.mark.parametrize("architecture", trees.CONFIGS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tool", [x for x in TOOLS if x != "llama.cpp"])
def test_every_tool_takes_every_architecture(tool: str, fmt: str, architecture: str):
    manifest = in_format(chosen(architecture), fmt)
    made = export_manifest(manifest, tool)
    assert made.tool == tool and made.layers_16bit == manifest.skip_modules
    assert made.text.endswith("\n") and json.dumps(made.to_json())
    assert all(note.endswith(".") for note in made.notes)
    listed = entries_in(tool, made.text)
    assert {
        x.name
        for x in manifest.layers
        if listed.intersection(spellings(x.name, x.checkpoint_name, architecture).all)
    } == set(manifest.skip_modules)


def entries_in(tool: str, text: str) -> set[str]:
    """The module names that the text for `tool` keeps in 16-bit, without the marks of its patterns."""
    if tool in ("transformers-python", "unsloth"):
        found = ast.literal_eval(text.partition("skip_modules = ")[2].partition("]")[0] + "]")
    elif tool == "axolotl":
        found = yaml.safe_load(text)["bnb_config_kwargs"]["llm_int8_skip_modules"]
    elif tool == "llama-factory":
        found = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    else:
        data = json.loads(text)
        data = data.get("quantization_config", data)
        keys = ("llm_int8_skip_modules", "layers_16bit", "ignore", "dynamic", "layer_config")
        (found,) = [data[key] for key in keys if key in data]
    assert len(set(found)) == len(found)
    return {re.sub(r"^(-:|re:)?\^?|\$$", "", entry).replace("\\", "") for entry in found}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", trees.CONFIGS)
def test_lists_are_exact_by_the_rule_of_each_tool(architecture: str):
    manifest = chosen(architecture)
    names = {x.name: spellings(x.name, x.checkpoint_name, architecture) for x in manifest.layers}
    kept = set(manifest.skip_modules)

    def data(tool: str) -> dict:
        return json.loads(export_manifest(manifest, tool).text)

    today = data("transformers")["llm_int8_skip_modules"]
    assert kept_by(matchers.transformers_5_21, today, names) == kept
    assert kept_by(matchers.transformers_5_0, today, names) == kept
    wrapped = {x.wrapped for n, x in names.items() if n in kept}
    assert kept_by(matchers.transformers_5_0, today, [x.wrapped for x in names.values()]) == wrapped
    four = data("transformers-4")["llm_int8_skip_modules"]
    assert kept_by(matchers.transformers_4, four, [x.wrapped for x in names.values()]) == wrapped
    assert kept_by(matchers.transformers_4, four, [x.legacy for x in names.values()]) == {
        x.legacy for n, x in names.items() if n in kept
    }
    assert kept_by(llm_compressor.rule, data("llm-compressor")["ignore"], names) == kept
    dynamic = data("gptqmodel")["dynamic"]
    assert kept_by(gptqmodel.rule, dynamic, names) == kept and set(map(len, dynamic.values())) == {0}
    layer_config = data("autoround")["layer_config"]
    assert kept_by(autoround.rule, layer_config, names) == kept
    assert {x["bits"] for x in layer_config.values()} == {16}
    config = data("vllm")["quantization_config"]["llm_int8_skip_modules"]
    fused = vllm_modules(manifest)
    assert kept_by(vllm.rule, config, fused) == {x for x, is_kept in fused.items() if is_kept}
    assert kept_by(matchers.transformers_5_21, config, names) == kept


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        # From vLLM's own mapping of the names in files: text under language_model, vision as it is.
        ("Qwen2VLForConditionalGeneration", "language_model.model.layers.0.self_attn.qkv_proj"),
        ("Qwen2VLForConditionalGeneration", "visual.blocks.0.attn.qkv"),
        ("Qwen2VLForConditionalGeneration", "language_model.lm_head"),
        ("LlavaForConditionalGeneration", "vision_tower.transformer.layers.0.feed_forward.gate_up_proj"),
        ("LlavaForConditionalGeneration", "language_model.model.layers.1.mlp.down_proj"),
        ("Gemma3ForConditionalGeneration", "vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj"),
        ("Idefics3ForConditionalGeneration", "model.text_model.layers.0.mlp.gate_up_proj"),
        ("LlamaForCausalLM", "model.layers.0.self_attn.qkv_proj"),
    ],
)
def test_the_names_that_vllm_gives(architecture: str, expected: str):
    assert expected in vllm_modules(chosen(architecture))


def test_yaml_is_read_back_as_it_was_meant():
    manifest = chosen("Qwen2VLForConditionalGeneration")
    data = yaml.safe_load(export_manifest(manifest, "axolotl").text)
    config = data["bnb_config_kwargs"]
    assert config["llm_int8_skip_modules"] == list(manifest.skip_modules)
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert (data["adapter"], data["load_in_4bit"], data["bf16"]) == ("qlora", True, True)
    assert re.fullmatch(data["lora_target_modules"], "model.visual.merger.mlp.0")
    text = export_manifest(manifest, "llama-factory").text
    assert set(yaml.safe_load(text)) == {"model_name_or_path", "finetuning_type", "lora_target"}
    assert all(f"#   {name}\n" in text for name in manifest.skip_modules)


@pytest.mark.parametrize(
    "architecture", ["Qwen2VLForConditionalGeneration", "MllamaForConditionalGeneration"]
)
def test_peft_puts_adapters_on_exactly_the_layers_of_the_pattern(architecture: str):
    manifest = chosen(architecture)
    data = json.loads(export_manifest(manifest, "peft", adapt="all").text)
    fresh = trees.tree.__wrapped__(architecture)
    model = inject_adapter_in_model(LoraConfig(r=1, target_modules=data["target_modules"]), fresh)
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted == {x.name for x in manifest.layers} - {"lm_head"}
    assert data["layers_16bit"] == list(manifest.skip_modules)
    assert data["layers_4bit"] == [x.name for x in manifest.layers if x.precision == "nf4"]


# By hand from gguf's tables; the list of gguf_tensors' own must not serve as its oracle.
SEVEN = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_options(text: str) -> dict[str, list[str]]:
    """The values of each option of a command line of llama-quantize, which ends in three plain words."""
    words = shlex.split(text.replace("\\\n", ""))  # shlex does not join lines as a shell does
    assert words[0] == "llama-quantize" and words[-1] == "IQ4_NL"
    options: dict[str, list[str]] = {}
    given = words[1:-3]
    for name, value in zip(given[::2], given[1::2], strict=True):
        options.setdefault(name, []).append(value)
    return options


@pytest.mark.parametrize("architecture", GGUF_MODELS)
def test_llama_quantize_keeps_exactly_the_decoders_layers(architecture: str):
    manifest = chosen(architecture)
    options = gguf_options(export_manifest(manifest, "llama.cpp").text)
    entries = options.pop("--tensor-type", [])
    assert all(e.endswith("=bf16") for e in entries)
    decoder = {
        f"blk.{match[1]}.{SEVEN[match[2]]}.weight": layer.precision == "bf16"
        for layer in manifest.layers
        if not re.search("vision|visual", layer.name)
        and (match := re.search(r"layers\.(\d+)\.(.+)$", layer.name))
    }
    blocks = {x.split(".")[1] for x in decoder}
    assert len(decoder) == 7 * len(blocks) and set(decoder.values()) == {True, False}
    assert {x for x in decoder if any(llama_cpp.rule(e, x) for e in entries)} == {
        x for x, is_kept in decoder.items() if is_kept
    }
    assert len(entries) == sum(decoder.values())
    tied = next(x for x in manifest.layers if x.name == "lm_head").reason == "tied"
    head = {} if tied else {"--output-tensor-type": ["bf16"]}
    assert options == {"--token-embedding-type": ["bf16"], **head}


def with_experts(*more: str) -> Manifest:
    """Attention and stacked experts, which no skip-list can name, as Qwen3-MoE has them."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight", *more]
    uncovered = [Uncovered(f"model.layers.3.{x}", 100, "a fused weight") for x in names]
    layers = {"model.layers.3.self_attn.q_proj": False, "lm_head": True}
    return manifest_of(layers, "Qwen3MoeForCausalLM", uncovered=uncovered)


def test_experts_stay_in_16_bit_in_a_gguf_file():
    options = gguf_options(export_manifest(with_experts(), "llama.cpp").text)
    stacked = [f"blk.3.ffn_{x}_exps.weight" for x in ("gate", "up", "down")]
    others = ["blk.3.attn_q.weight", "blk.13.ffn_up_exps.weight", "blk.3.ffn_gate_inp.weight"]
    entries = options["--tensor-type"]
    assert [x for x in [*stacked, *others] if any(llama_cpp.rule(e, x) for e in entries)] == stacked
    with pytest.raises(
        ManifestError, match=r"layers\.3\.mixer\.weight .* stays in 16-bit, but llama-quantize"
    ):
        export_manifest(with_experts("mixer.weight"), "llama.cpp")


def with_fused(four_bit: bool) -> Manifest:
    """The same, with experts as layers."""
    manifest = manifest_of({"model.layers.3.self_attn.q_proj": False, "lm_head": True}, "Qwen3MoeForCausalLM")
    fused = [
        replace(
            manifest.layers[0 if four_bit else 1],
            name=f"model.layers.3.mlp.experts.{x}",
            checkpoint_name=f"model.layers.3.mlp.experts.{x}",
            shape=(4, 64, 64),
        )
        for x in ("gate_up_proj", "down_proj")
    ]
    layers = (*manifest.layers, *fused)
    kept = tuple(x.name for x in layers if not x.is_four_bit)
    return replace(manifest, layers=layers, skip_modules=kept)


def test_llama_cpp_is_told_of_fused_experts_by_its_own_names():
    stacked = {f"blk.3.ffn_{x}_exps.weight" for x in ("gate", "up", "down")}
    for four_bit in (True, False):
        found = llama_cpp.gguf_tensors(with_fused(four_bit))
        assert {name: kept for name, kept in found.items() if name in stacked} == dict.fromkeys(
            stacked, not four_bit
        )


HOLD_EXPERTS = ("llama.cpp", "peft")


@pytest.mark.parametrize("tool", [x for x in TOOLS if x not in HOLD_EXPERTS])
def test_a_tool_that_cannot_hold_experts_in_4_bit_is_refused_by_name(tool: str):
    with pytest.raises(
        ManifestError,
        match=rf"experts\.gate_up_proj, are in 4-bit, which {re.escape(tool)} cannot be told.*"
        r"qprobe\.load_dynamic_4bit, or scan with --experts 16-bit",
    ):
        export_manifest(with_fused(True), tool)


@pytest.mark.parametrize("tool", TOOLS)
def test_experts_in_16_bit_are_in_no_list_of_linears(tool: str):
    made = export_manifest(with_fused(False), tool)
    if tool == "llama.cpp":
        entries = gguf_options(made.text)["--tensor-type"]
        assert sum("_exps" in x for x in entries) == 3
    elif tool == "llama-factory":
        assert "experts.down_proj" in made.text  # a comment that names all that the checkpoint keeps
    elif tool == "peft":
        data = json.loads(made.text)
        assert not re.search("experts", data["target_modules"])
        assert [x for x in data["layers_16bit"] if "experts" in x]
    else:
        assert "experts" not in made.text


def test_peft_is_told_which_experts_are_in_4_bit_and_puts_no_adapter_on_them():
    made = export_manifest(with_fused(True), "peft", adapt="all")
    data = json.loads(made.text)
    assert "(2 in all): fused weights of experts take none." in made.notes[-1]
    assert [x for x in data["layers_4bit"] if "experts" in x] == [
        f"model.layers.3.mlp.experts.{x}" for x in ("gate_up_proj", "down_proj")
    ]
    assert re.fullmatch(data["target_modules"], "model.layers.3.self_attn.q_proj")
    assert not re.fullmatch(data["target_modules"], "model.layers.3.mlp.experts.down_proj")


@pytest.mark.parametrize("tool", ["vllm", "llm-compressor", "autoround", "gptqmodel"])
@pytest.mark.parametrize("are_layers", [False, True])
def test_what_becomes_of_experts_is_said(are_layers: bool, tool: str):
    manifest = with_fused(False) if are_layers else with_experts()
    note = export_manifest(manifest, tool).notes[-1]
    assert note.startswith("2 stacked expert weights, such as model.layers.3.mlp.experts.gate_up_proj,")
    assert not any("expert" in x for x in export_manifest(chosen("LlamaForCausalLM"), tool).notes)


def test_llama_quantize_is_said_to_choose_some_types_itself():
    notes = export_manifest(chosen("LlamaForCausalLM"), "llama.cpp").notes
    assert any("may itself give a larger type" in x for x in notes)


def test_what_llama_cpp_does_not_know_is_refused():
    with pytest.raises(ManifestError, match=r"no tensor for model\.language_model\.layers\.1\.cross_attn"):
        export_manifest(chosen("MllamaForConditionalGeneration"), "llama.cpp")


def test_the_dtype_of_the_manifest_is_the_one_that_is_kept():
    manifest = chosen("LlamaForCausalLM")
    half = replace(manifest, format=replace(manifest.format, compute_dtype="float16"))
    assert "=f16" in export_manifest(half, "llama.cpp").text
    assert yaml.safe_load(export_manifest(half, "axolotl").text)["fp16"] is True
    assert json.loads(export_manifest(half, "transformers").text)["bnb_4bit_compute_dtype"] == "float16"


def test_a_path_serves_as_well_and_an_unknown_tool_is_named(tmp_path):
    manifest = manifest_of({"a": False, "lm_head": True})
    write_manifest(tmp_path / "m.json", manifest)
    assert export_manifest(tmp_path / "m.json", "peft") == export_manifest(manifest, "peft")
    with pytest.raises(QprobeError, match=r"No tool 'ollama'.*llama\.cpp"):
        export_manifest(manifest, "ollama")


@pytest.mark.parametrize("tool", ["transformers-python", "unsloth", "axolotl"])
def test_a_model_that_is_not_on_the_hub_is_said_to_need_a_folder(tool: str):
    manifest = chosen("LlamaForCausalLM")
    local = replace(manifest, model=replace(manifest.model, id="demo"))
    assert "'demo' is no name on the hub" in export_manifest(local, tool).notes[-1]
    assert not any("hub" in note for note in export_manifest(manifest, tool).notes)


def test_a_model_that_vllm_does_not_serve_is_named():
    assert (
        "vLLM serves no Mllama" in export_manifest(chosen("MllamaForConditionalGeneration"), "vllm").notes[-1]
    )
    assert not any("serves no" in x for x in export_manifest(chosen("LlamaForCausalLM"), "vllm").notes)


def test_python_for_unsloth_and_transformers_compiles():
    manifest = chosen("LlavaForConditionalGeneration")
    for tool in ("unsloth", "transformers-python"):
        text = export_manifest(manifest, tool).text
        compile(text, tool, "exec")
        assert ("use_exact_model_name=True" in text) == (tool == "unsloth")
        assert all(f"    {json.dumps(name)},\n" in text for name in manifest.skip_modules)
