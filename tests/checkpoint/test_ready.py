"""The way of an adapter: plain load, LoRA, save, reload, merge, unmerge; bit-exact where it can be."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model

from qprobe.checkpoint.load import load_dynamic_4bit, load_standard_4bit
from qprobe.checkpoint.quantize import quantize
from qprobe.checkpoint.ready import kept_whole, lora_targets, ready_for_training
from qprobe.formats.nf4 import Nf4
from qprobe.loading.processor import load_processor
from qprobe.loading.reference import load_reference
from qprobe.loading.source import resolve
from qprobe.models.family import VISION
from qprobe.options import DEFAULT_ADAPT
from tests import tiny
from tests.checkpoint.manifests import every_third, inventory_of, manifest_for
from tests.checkpoint.test_quantize import FIVE, logits, plainly
from tests.reading import encode

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
    "ignore:`is_gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning",
    # peft warns that a merge into 4-bit rounds; the test checks by how much.
    "ignore:Merge lora module to 4-bit linear:UserWarning",
    "ignore:Unmerge lora module to 4-bit linear:UserWarning",
)


def lora(model: Any, vision: bool = False) -> LoraConfig:
    # Random A and B, so that the adapter changes every answer.
    targets = lora_targets(model, "all" if vision else DEFAULT_ADAPT)
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)


def plain_weight(weight: Any) -> torch.Tensor:
    return dequantize_4bit(weight.data, weight.quant_state) if weight.dtype == torch.uint8 else weight.data


def changed(weight: torch.Tensor, delta: torch.Tensor, four_bit: bool) -> torch.Tensor:
    """The weight as it is stored after `delta` was added in float32; peft leaves 4-bit layers in float32."""
    summed = weight.float() + delta
    return Nf4().pack(summed).unpack() if four_bit else summed.to(torch.bfloat16)


def deltas(tuned: PeftModel) -> dict[str, torch.Tensor]:
    """By layer: what the adapter adds to its weight, from the saved matrices."""
    found = {n: m for n, m in tuned.named_modules() if hasattr(m, "lora_A")}
    return {
        name.removeprefix("base_model.model."): 2 * (m.lora_B["default"].weight @ m.lora_A["default"].weight)
        for name, m in found.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_an_adapter_goes_from_a_checkpoint_to_a_merged_model(name, tiny_folder, tmp_path):
    folder = tiny_folder(name)
    kept = every_third(folder)
    done = quantize(manifest_for(folder, kept), tmp_path / "base", str(folder), "cpu")
    base = plainly(done.out)
    before = {n: plain_weight(p).clone() for n, p in base.named_parameters()}
    processor = load_processor(resolve(str(folder)))
    untouched = logits(base, processor, name)

    torch.manual_seed(0)
    tuned = get_peft_model(base, lora(base)).eval()
    answers = logits(tuned, processor, name)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, processor, name), untouched)
    tuned.save_pretrained(tmp_path / "adapter")

    again = PeftModel.from_pretrained(plainly(done.out), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, processor, name), answers) and not torch.equal(answers, untouched)

    added = deltas(again)
    merged = again.merge_and_unload()
    precisions = set()
    for layer, delta in added.items():
        weight = merged.get_parameter(f"{layer}.weight")
        four_bit = weight.dtype == torch.uint8
        precisions.add(four_bit)
        assert torch.equal(plain_weight(weight), changed(before[f"{layer}.weight"], delta, four_bit)), layer
    assert precisions == {True, False}
    still = {n for n, p in merged.named_parameters() if torch.equal(plain_weight(p), before[n])}
    assert still == set(before) - {f"{layer}.weight" for layer in added}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_unmerging_rounds_once_more_so_only_16bit_layers_come_back(name, tiny_folder):
    folder = tiny_folder(name)
    model, _ = load_dynamic_4bit(manifest_for(folder, every_third(folder)), str(folder), "cpu")
    before = {n: plain_weight(p).clone() for n, p in model.named_parameters()}
    torch.manual_seed(0)
    tuned = get_peft_model(model, lora(model))
    added = deltas(tuned)
    tuned.merge_adapter()
    tuned.unmerge_adapter()
    for layer, delta in added.items():
        key = f"{layer}.weight"
        weight = tuned.get_submodule(f"base_model.model.{layer}").base_layer.weight
        four_bit = weight.dtype == torch.uint8
        merged = changed(before[key], delta, four_bit)
        taken = delta if four_bit else delta.to(torch.bfloat16).float()  # peft rounds before it subtracts
        assert torch.equal(plain_weight(weight), changed(merged, -taken, four_bit)), layer
        if not four_bit:  # sum, delta and difference are each rounded to bf16: at most 2^-9 of their size
            size = before[key].abs().max() + delta.abs().max()
            assert (plain_weight(weight) - before[key]).abs().max() <= 3 * 2**-9 * size


def trained_step(model: Any, processor: Any, name: str) -> dict[str, torch.Tensor | None]:
    given = encode(processor, tiny.questions(name, answer="a cat"), torch.bfloat16)
    labels = torch.full_like(given.inputs["input_ids"], -100)
    start, end = given.answers[0]
    labels[0, start:end] = given.inputs["input_ids"][0, start:end]
    model.train()
    model(**given.inputs, labels=labels).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_nothing_becomes_float32_and_every_adapter_learns(name, tiny_folder):
    folder = tiny_folder(name)
    manifest = manifest_for(folder, every_third(folder))
    model, processor = load_dynamic_4bit(manifest, str(folder), "cpu", for_training=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    tuned = get_peft_model(model, lora(model, vision=True))
    gradients = trained_step(tuned, processor, name)
    assert gradients and all("lora_" in n for n in gradients)
    still = [n for n, g in gradients.items() if g is None or not g.abs().sum() > 0]
    assert still == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in FIVE if x != "llama"])
def test_the_vision_tower_keeps_no_activations_where_nothing_trains_in_it(name, tiny_folder):
    folder = tiny_folder(name)
    manifest = manifest_for(folder)
    vision = [x.name for x in inventory_of(folder).layers if x.tower == VISION]
    model, processor = load_dynamic_4bit(manifest, str(folder), "cpu", for_training=True)
    tuned = get_peft_model(model, lora(model))
    tuned.enable_input_require_grads()  # as trainers do
    seen: dict[str, bool] = {}
    for layer in vision:
        module = tuned.get_submodule(f"base_model.model.{layer}")
        module.register_forward_hook(
            lambda _m, _i, out, layer=layer: seen.__setitem__(layer, out.requires_grad)
        )
    trained_step(tuned, processor, name)
    assert seen and not any(seen.values())


@pytest.mark.slow
def test_checkpointing_changes_no_gradient(tiny_folder):
    folder = tiny_folder("mllama")
    found = []
    for for_training in (True, False):
        manifest = manifest_for(folder)
        model, processor = load_dynamic_4bit(manifest, str(folder), "cpu", for_training=for_training)
        torch.manual_seed(0)
        tuned = get_peft_model(model, lora(model, vision=True))
        found.append(trained_step(tuned, processor, "mllama"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_targets_are_exactly_the_wanted_layers_on_every_base(name, tiny_folder):
    folder = tiny_folder(name)
    layers = [x for x in inventory_of(folder).layers if not x.fixed]
    everywhere, language = {x.name for x in layers}, {x.name for x in layers if x.tower != VISION}
    for model in (
        load_reference(str(folder), "cpu").model,
        load_standard_4bit(str(folder), device="cpu")[0],
        load_dynamic_4bit(manifest_for(folder, every_third(folder)), str(folder), "cpu")[0],
    ):
        for base, adapt, wanted in ((deepcopy(model), DEFAULT_ADAPT, language), (model, "all", everywhere)):
            tuned = get_peft_model(base, LoraConfig(r=2, target_modules=lora_targets(base, adapt)))
            assert {x.removeprefix("base_model.model.") for x in _adapted(tuned)} == wanted


def _adapted(tuned: Any) -> set[str]:
    return {n for n, m in tuned.named_modules() if hasattr(m, "lora_A")}


def test_a_model_that_cannot_recompute_trains_all_the_same_and_that_is_said(
    tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
):
    model = load_reference(str(tiny_folder("llama")), "cpu").model
    assert kept_whole(model) is None
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    said = kept_whole(model)
    assert said is not None and "LlamaForCausalLM" in said
    tuned = get_peft_model(ready_for_training(model), LoraConfig(r=2, target_modules=["q_proj"]))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in tuned.modules())
    ids = torch.arange(20, 28)[None]
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora_B" in n)
