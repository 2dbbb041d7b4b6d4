"""The traps that silently undo a skip-list: each is refused with a sentence, or repaired."""

from __future__ import annotations

import json

import pytest
from transformers import MllamaConfig

from qprobe.errors import ManifestError
from qprobe.exports import export_manifest, matchers
from qprobe.exports.keys import check_entries, reader, transformers_4_readers, transformers_readers
from qprobe.exports.targets import vllm
from qprobe.loading.inventory import WHY_ATTENTION, WHY_CONV, WHY_SUBCLASS, list_layers
from qprobe.loading.skeleton import meta_model
from qprobe.manifest.records import Manifest
from qprobe.models.families.mllama import UNSLOTH_LLAMA_11B
from qprobe.records import FormatSpec, Uncovered
from tests.exports.manifests import manifest_of, of_tree

Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")


def entries_of(manifest: Manifest, tool: str) -> list[str]:
    return json.loads(export_manifest(manifest, tool).text)["llm_int8_skip_modules"]


@pytest.fixture(scope="module")
def published() -> Manifest:
    """Llama-3.2-11B-Vision with the 19 layers that Unsloth's list means."""
    inventory = list_layers(meta_model(MllamaConfig(), "bfloat16"), FormatSpec())
    kept = UNSLOTH_LLAMA_11B.kept(inventory)
    return manifest_of(
        {x.name: x.name in kept for x in inventory.layers},
        "MllamaForConditionalGeneration",
        {x.name: x.checkpoint_name for x in inventory.layers},
    )


@pytest.mark.slow
def test_a_list_of_old_names_is_refused_and_written_anew(published: Manifest):
    # Its names are those of the files; transformers 5 calls the layers otherwise.
    with pytest.raises(ManifestError, match=r"of the 16 entries matches model\.language_model\.layers\.1\."):
        check_entries(UNSLOTH_LLAMA_11B.entries, transformers_readers(published)[:1])
    today = entries_of(published, "transformers")
    assert len(today) == 19 and "model.language_model.layers.13.mlp.down_proj" in today
    old = entries_of(published, "transformers-4")
    assert "language_model.model.layers.13.mlp.down_proj" in old and set(today) < set(old)


def test_transformers_4_keeps_every_layer_with_a_listed_last_part():
    manifest = of_tree("LlamaForCausalLM", ["model.layers.0.mlp.down_proj"])
    with pytest.raises(
        ManifestError, match=r"transformers 4.*the entry 'down_proj' keeps 3 layers.*layers\.1\."
    ):
        check_entries(["lm_head", "down_proj"], transformers_4_readers(manifest)[:1])


def test_transformers_5_0_reads_a_layer_number_without_its_end(published: Manifest):
    kept = {x.name: x.name.startswith("model.language_model.layers.1.") for x in published.layers}
    manifest = manifest_of(kept)
    said = (
        r"Under transformers 5\.0 to 5\.20 the entry 'model\.language_model\.layers\.1' keeps 77 layers in "
        r"16-bit, 70 of them unwanted, first model\.language_model\.layers\.10\."
    )
    with pytest.raises(ManifestError, match=said):
        check_entries(["model.language_model.layers.1"], transformers_readers(manifest))
    assert len(entries_of(manifest, "transformers")) == 7


def test_today_an_entry_is_still_an_ending_without_a_boundary():
    name = "model.visual.blocks.0.attn.proj"
    manifest = of_tree("Qwen2VLForConditionalGeneration", [name])
    # 2 blocks of vision with a proj, 2 layers of text with 7 linears that end in it.
    with pytest.raises(
        ManifestError, match=r"5\.21 or newer the entry 'proj' keeps 16 layers in 16-bit, 15 of"
    ):
        check_entries(["lm_head", "proj"], transformers_readers(manifest))
    assert entries_of(manifest, "transformers") == [name, "lm_head"]


def test_vllm_needs_a_fused_group_whole():
    manifest = manifest_of({Q: True, K: False, V: False, "lm_head": True})
    with pytest.raises(
        ManifestError, match=r"one matrix model\.layers\.0\.self_attn\.qkv_proj.*q_proj stays"
    ):
        export_manifest(manifest, "vllm")
    whole = manifest_of({Q: True, K: True, V: True, "lm_head": True})
    config = json.loads(export_manifest(whole, "vllm").text)["quantization_config"]
    assert config["llm_int8_skip_modules"] == [Q, K, V, "lm_head", "model.layers.0.self_attn.qkv_proj"]


def test_vllm_does_not_find_a_fused_layer_by_the_names_of_its_parts():
    keep = {"model.layers.0.self_attn.qkv_proj": True}
    assert not any(vllm.rule(entry, name) for entry in (Q, K, V) for name in keep)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2VLForConditionalGeneration"])
def test_a_list_replaces_the_default_so_the_head_must_be_named(architecture: str):
    manifest = of_tree(architecture, [])  # only the head stays: untied in the one, tied in the other
    said = r"the empty list does not name lm_head.*A list replaces the tool's own default"
    with pytest.raises(ManifestError, match=said):
        check_entries([], transformers_readers(manifest))
    assert entries_of(manifest, "transformers") == ["lm_head"]


def test_what_only_older_versions_convert_is_named_for_them():
    others = (
        Uncovered("router.weight", 100, WHY_SUBCLASS),
        Uncovered("attn.out_proj.weight", 100, WHY_ATTENTION),
        Uncovered("patch.weight", 100, WHY_CONV),
        Uncovered("experts.gate_up", 100, "a fused weight"),
    )
    manifest = manifest_of({"a": False, "lm_head": True}, uncovered=others)
    for tool in ("transformers", "transformers-4"):
        assert entries_of(manifest, tool) == ["lm_head", "router", "attn.out_proj"]


def test_the_published_list_as_it_stands_keeps_3_or_2_of_19(published: Manifest):
    today, four = transformers_readers(published)[0], transformers_4_readers(published)[0]
    for one, count in ((today, 3), (four, 2)):
        names = {n for e in UNSLOTH_LLAMA_11B.entries for n in one.keep if one.rule(e, n)}
        assert len(names) == count
        with pytest.raises(ManifestError, match=rf"so {19 - count} layers that must stay in 16-bit"):
            check_entries(UNSLOTH_LLAMA_11B.entries, [one])
    hub = reader(published, "files", matchers.transformers_4, lambda x: x.legacy)
    with pytest.raises(ManifestError, match="'merger' matches no linear layer"):
        check_entries(UNSLOTH_LLAMA_11B.entries, [hub])


def test_kbit_training_of_peft_is_warned_of(published: Manifest):
    assert any("prepare_model_for_kbit_training" in x for x in export_manifest(published, "peft").notes)


def test_such_a_module_is_named_as_the_files_name_it_too():
    # SigLIP's pooling head attends through nn.MultiheadAttention, which transformers 4 and 5.0 would break.
    manifest = of_tree("Gemma3ForConditionalGeneration", [])
    four = entries_of(manifest, "transformers-4")
    assert "vision_tower.vision_model.head.attention.out_proj" in four  # 4.51 and before
    assert "model.vision_tower.vision_model.head.attention.out_proj" in four  # 4.52 to 4.57
