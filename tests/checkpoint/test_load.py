"""Loading gives the model of the manifest, to the bit and to the byte, on every tiny architecture."""

from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from qprobe.checkpoint.load import load_dynamic_4bit, load_standard_4bit, source_of
from qprobe.checkpoint.storage import stored_bytes
from qprobe.checkpoint.verify import verify
from qprobe.errors import ManifestError, ModelError, QprobeError, VerificationError
from qprobe.formats.nf4 import Nf4
from qprobe.loading.reference import load_reference
from qprobe.manifest.write import write_manifest
from qprobe.records import FormatSpec
from tests import tiny
from tests.checkpoint.manifests import every_third, inventory_of, manifest_for, with_layer
from tests.reading import encode, greedy_answers

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_weight_is_the_manifests_and_every_byte_is_counted(name, double_quant, device, tiny_folder):
    folder, spec = tiny_folder(name), FormatSpec(double_quant=double_quant)
    kept = every_third(folder)
    manifest = manifest_for(folder, kept, spec)
    model, _ = load_dynamic_4bit(manifest, str(folder), device)
    original = load_reference(str(folder), device).model
    four_bit = {f"{x.name}.weight" for x in manifest.layers if x.precision == "nf4"}
    assert len(four_bit) >= len(manifest.layers) // 2
    found = dict(model.named_parameters())
    for key, weight in original.named_parameters():
        is_four_bit = key in four_bit
        expected = Nf4(double_quant=double_quant).pack(weight).unpack() if is_four_bit else weight
        actual = found[key]
        if is_four_bit:
            actual = dequantize_4bit(actual.data, actual.quant_state)
        assert torch.equal(actual, expected), key
    total = inventory_of(folder, spec).total_bytes(frozenset(kept))
    assert stored_bytes(model).total_bytes == manifest.budget.total_bytes == total


@pytest.mark.parametrize("name", tiny.NAMES)
def test_standard_4bit_keeps_only_what_must_be_kept(name, tiny_folder):
    inventory = inventory_of(tiny_folder(name))
    model, _ = load_standard_4bit(str(tiny_folder(name)), device="cpu")
    linears = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    assert linears == [x.name for x in inventory.layers if x.fixed]
    assert stored_bytes(model).total_bytes == inventory.standard_4bit_bytes


CONV1D = GPT2LMHeadModel, GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4)
EXPERTS = MixtralForCausalLM, MixtralConfig(num_local_experts=2, **tiny.decoder(64, 96, 1))


@pytest.mark.parametrize(("cls", "config", "count"), [(*CONV1D, 4), (*EXPERTS, 1)])
def test_weights_outside_layers_stay_in_16bit_and_are_named(cls, config, count, tmp_path):
    # transformers would turn GPT-2's four Conv1D modules into 4-bit too, though no manifest lists them. Of a
    # mixture of experts the router stays.
    cls(config).to(torch.bfloat16).save_pretrained(tmp_path)
    manifest = manifest_for(tmp_path)
    model, _ = load_dynamic_4bit(manifest, str(tmp_path), "cpu")
    left = [model.get_parameter(x.name) for x in manifest.uncovered]
    assert len(left) == count and {p.dtype for p in left} == {torch.bfloat16}
    assert stored_bytes(model).total_bytes == manifest.budget.total_bytes


def test_the_manifests_revision_is_loaded_unless_the_user_names_a_place(tiny_folder):
    manifest = manifest_for(tiny_folder("llama"))
    pinned = replace(manifest, model=replace(manifest.model, id="owner/name", revision="abc123"))
    assert source_of(pinned, None).revision == "abc123"
    assert source_of(pinned, "owner/name").revision == "abc123"
    assert source_of(pinned, "other/name").revision is None
    assert source_of(pinned, str(tiny_folder("llama"))).revision is None


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.GENERATING_NAMES)
def test_a_loaded_model_answers_and_is_unchanged_by_it(name, tiny_folder):
    # On a CPU with AVX512-BF16, bitsandbytes would repack every layer on its first forward.
    folder = tiny_folder(name)
    manifest = manifest_for(folder, every_third(folder))
    model, processor = load_dynamic_4bit(manifest, str(folder), "cpu")
    before = stored_bytes(model)
    first = greedy_answers(model, processor, tiny.questions(name), 8, 1)
    verify(model, manifest)
    assert stored_bytes(model) == before and not model.training
    assert first == greedy_answers(model, processor, tiny.questions(name), 8, 1) != [""]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama"])  # both have in_features that are no multiple of 64
def test_it_computes_what_the_16bit_model_with_rounded_weights_computes(name, tiny_folder):
    folder = tiny_folder(name)
    manifest = manifest_for(folder, every_third(folder))
    model, processor = load_dynamic_4bit(manifest, str(folder), "cpu")
    rounded = load_reference(str(folder), "cpu").model
    for layer in manifest.layers:
        if layer.precision == "nf4":
            weight = rounded.get_parameter(f"{layer.name}.weight")
            weight.data = Nf4().pack(weight.data).unpack()
    inputs = encode(processor, tiny.questions(name), torch.bfloat16).inputs
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, rounded(**inputs).logits)


@pytest.mark.parametrize("name", ["llama_tied", "qwen2_vl"])
def test_a_tied_head_stays_tied_and_in_16bit(name, tiny_folder):
    model, _ = load_standard_4bit(str(tiny_folder(name)), device="cpu")
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_float16_everywhere_for_cards_without_bfloat16(tiny_folder):
    manifest = manifest_for(tiny_folder("llama"))
    model, _ = load_dynamic_4bit(manifest, str(tiny_folder("llama")), "cpu", dtype="float16")
    dtypes = {p.dtype for p in model.parameters()}
    assert dtypes == {torch.float16, torch.uint8}
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.dtype == torch.float16
    with pytest.raises(QprobeError, match="float32"):
        load_dynamic_4bit(manifest, str(tiny_folder("llama")), "cpu", dtype="float32")


def test_a_manifest_file_loads_and_names_its_model_for_the_user(tiny_folder, tmp_path):
    manifest = manifest_for(tiny_folder("llama"), ["model.layers.1.mlp.up_proj"])
    write_manifest(tmp_path / "skiplist.json", manifest)
    model, _ = load_dynamic_4bit(str(tmp_path / "skiplist.json"), str(tiny_folder("llama")), "cpu")
    verify(model, manifest)
    with pytest.raises(ModelError, match="names the model 'llama'"):  # a folder's name is no address
        load_dynamic_4bit(tmp_path / "skiplist.json", device="cpu")


def test_a_manifest_for_another_model_is_refused_with_both_fingerprints(tiny_folder):
    manifest = manifest_for(tiny_folder("llama"))
    other = manifest_for(tiny_folder("llama_tied")).model.fingerprint
    with pytest.raises(ManifestError) as caught:
        load_dynamic_4bit(manifest, str(tiny_folder("llama_tied")), "cpu")
    assert manifest.model.fingerprint[:16] in str(caught.value) and other[:16] in str(caught.value)


def test_a_stale_name_is_refused_before_loading(tiny_folder):
    manifest = manifest_for(tiny_folder("llama"))
    stale = with_layer(manifest, "model.layers.1.mlp.up_proj", name="language_model.layers.1.mlp.up_proj")
    with pytest.raises(VerificationError, match=r"language_model\.layers\.1\.mlp\.up_proj"):
        load_dynamic_4bit(stale, str(tiny_folder("llama")), "cpu")


def test_another_blocksize_is_refused(tiny_folder):
    manifest = manifest_for(tiny_folder("llama"))
    odd = replace(manifest, format=replace(manifest.format, blocksize=128))
    with pytest.raises(ManifestError, match="128"):
        load_dynamic_4bit(odd, str(tiny_folder("llama")), "cpu")


def test_a_checkpoint_without_weights_is_one_sentence(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_folder("llama") / "config.json").read_bytes())
    with pytest.raises(ModelError, match="safetensors"):
        load_standard_4bit(str(tmp_path), device="cpu")


# peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning"
)
def test_adapters_train_on_4bit_and_on_kept_linears(tiny_folder):
    peft = pytest.importorskip("peft")
    folder = tiny_folder("mllama")
    kept = "model.language_model.layers.0.self_attn.q_proj"
    model, processor = load_dynamic_4bit(manifest_for(folder, [kept]), str(folder), "cpu")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian")
    tuned = peft.get_peft_model(model, config)
    tuned.train()
    inputs = encode(processor, tiny.questions("mllama", answer="a cat"), torch.bfloat16).inputs
    image_token = inputs["input_ids"] == model.config.image_token_id  # lies behind the vocabulary of the head
    tuned(**inputs, labels=inputs["input_ids"].masked_fill(image_token, -100)).loss.backward()
    graded = {n for n, p in tuned.named_parameters() if p.grad is not None}
    assert graded == {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert graded and all("lora_" in n for n in graded)
    down_proj = "model.language_model.layers.0.mlp.down_proj"
    for layer in (kept, down_proj):
        moved = [p.grad for n, p in tuned.named_parameters() if f"{layer}.lora_B" in n]
        assert moved[0].abs().sum() > 0
