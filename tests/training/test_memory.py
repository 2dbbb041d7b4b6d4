"""What plan --training says is what a step measurably occupies, part by part."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from qprobe.checkpoint.load import load_standard_4bit
from qprobe.checkpoint.ready import lora_targets, ready_for_training
from qprobe.checkpoint.storage import stored_bytes
from qprobe.cli import main
from qprobe.loading.inventory import list_layers
from qprobe.loading.skeleton import meta_model
from qprobe.options import DEFAULT_ADAPT
from qprobe.records import FormatSpec
from qprobe.training.memory import (
    CODE_TABLE_BYTES,
    GIB,
    Step,
    activations_of,
    adapted_linears,
    adapter_sizes,
    optimizer_bytes,
    training_plan,
)
from tests import tiny
from tests.benchmarks.cost import build, tiny_config
from tests.training.peak import LiveBytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("own_bf16"),  # tensors are counted
    pytest.mark.filterwarnings(
        # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
        "ignore:`is_gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning",
    ),
]


ADAPT = {False: DEFAULT_ADAPT, True: "all"}


def measured_peak(model: Any, vision: bool, inputs: dict[str, torch.Tensor]) -> int:
    """Most bytes that forward and backward pass of an adapted model have alive beyond model and inputs."""
    ready_for_training(model)
    config = peft.LoraConfig(r=16, target_modules=lora_targets(model, ADAPT[vision]))
    tuned = peft.get_peft_model(model, config).train()
    tuned(**inputs).loss.backward()  # gradients exist from now on, so that only activations are counted
    with LiveBytes() as live:
        tuned(**inputs).loss.backward()
    return live.peak


def llama(words: int, width: int, mlp: int, blocks: int) -> LlamaConfig:
    sizes = {**tiny.decoder(width, mlp, blocks), "vocab_size": words, "num_attention_heads": 8}
    return LlamaConfig(**sizes)


# The peak lies at the loss (many words), or in a block (wide, long); at few words with many blocks in inputs.
@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (llama(16_000, 128, 256, 2), 256),
        (llama(400, 128, 512, 3), 512),
        (llama(400, 128, 192, 12), 384),
    ],
)
def test_activations_of_a_language_model(config: LlamaConfig, tokens: int):
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    layers = list_layers(model, FormatSpec()).layers
    expected = activations_of(meta_model(config, "bfloat16"), layers, Step(1, tokens, 0))
    ids = torch.randint(4, 300, (1, tokens))
    assert measured_peak(model, False, {"input_ids": ids, "labels": ids}) == pytest.approx(
        expected.peak, rel=0.1
    )


@pytest.mark.parametrize(
    ("tokens", "words", "vision"), [(512, 512, False), (256, 6000, False), (256, 512, True)]
)
def test_activations_of_a_model_that_sees_four_tiles(tokens: int, words: int, vision: bool):
    config = tiny_config()
    config.text_config.vocab_size = config.image_token_index = words
    model = build(config, torch.device("cpu")).model
    layers = list_layers(model, FormatSpec()).layers
    expected = activations_of(model, layers, Step(1, tokens, 4, adapt=ADAPT[vision]))
    ids = torch.randint(3, words - 8, (1, tokens))
    labels = ids.clone()
    ids[:, 1] = words
    size = config.vision_config.image_size
    inputs = {
        "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 1, 4, 3, size, size).to(torch.bfloat16),
        "aspect_ratio_ids": torch.full((1, 1), 6), "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, tokens, 1, 4, dtype=torch.long),
    }  # fmt: skip
    assert measured_peak(model, vision, inputs) == pytest.approx(expected.peak, rel=0.1)


@pytest.mark.parametrize("name", tiny.GENERATING_NAMES)
@pytest.mark.parametrize("vision", [False, True])
def test_adapters_are_counted_to_the_parameter(name: str, vision: bool, tiny_folder: Any):
    model, _ = load_standard_4bit(str(tiny_folder(name)), device="cpu")
    found = training_plan(str(tiny_folder(name)), Step(rank=5, adapt=ADAPT[vision]))
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=5, target_modules=lora_targets(model, ADAPT[vision]))
    )
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert found.adapter_parameters == sum(p.numel() for p in trained)
    nf4 = next(x for x in found.layouts if x.name == "nf4")
    assert nf4.adapter_bytes == nf4.gradient_bytes == sum(p.nbytes for p in trained)


def test_several_processes_hold_a_copy_of_the_gradients_on_each_card(tiny_folder: Any):
    alone, shared = (training_plan(str(tiny_folder("llama")), Step(processes=n)).layouts[0] for n in (1, 2))
    assert (alone.exchange_bytes, shared.exchange_bytes) == (0, shared.gradient_bytes)
    assert shared.total_bytes - alone.total_bytes == shared.gradient_bytes > 0


def test_weights_are_those_in_memory_with_their_code_tables(tiny_folder: Any):
    model, _ = load_standard_4bit(str(tiny_folder("llama")), device="cpu")
    states = [p.quant_state for p in model.parameters() if p.dtype == torch.uint8]
    tables = sum(x.code.nbytes + x.state2.code.nbytes + x.offset.nbytes for x in states)
    assert tables == CODE_TABLE_BYTES * len(states)
    nf4 = next(x for x in training_plan(str(tiny_folder("llama")), Step()).layouts if x.name == "nf4")
    assert nf4.weight_bytes == stored_bytes(model).total_bytes + tables


def test_optimizer_states_are_those_of_the_optimizers():
    weight = torch.nn.Parameter(torch.zeros(16, 300))  # 4800 values
    small = torch.nn.Parameter(torch.zeros(16, 100))  # 1600 values, which bitsandbytes keeps in float32
    optimizer = torch.optim.AdamW([weight, small])
    (weight.sum() + small.sum()).backward()
    optimizer.step()
    states = sum(
        x.nbytes for state in optimizer.state.values() for k, x in state.items() if k.startswith("exp")
    )
    assert optimizer_bytes([4800, 1600], "adamw_torch") == states
    # two states of one byte a value and 19 scales of 4 bytes each; 8 bytes a value of the small one
    assert optimizer_bytes([4800, 1600], "adamw_8bit") == 2 * (4800 + 19 * 4) + 8 * 1600


def test_layers_by_name_are_those_lora_targets_matches(tiny_folder: Any):
    model, _ = load_standard_4bit(str(tiny_folder("mllama")), device="cpu")
    layers = list_layers(meta_model(model.config, "bfloat16"), FormatSpec()).layers
    adapted = adapted_linears(layers, "MllamaForConditionalGeneration", DEFAULT_ADAPT)
    assert len(adapter_sizes(adapted, 4)) == 2 * len(adapted)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=lora_targets(model)))
    found = {n.removeprefix("base_model.model.") for n, m in tuned.named_modules() if hasattr(m, "lora_A")}
    assert found == {x.name for x in adapted}


def plan(*more: str) -> Any:
    line = ["plan", "--model", "llama-3.2-11b-vision", *more]
    return CliRunner().invoke(main, line, prog_name="qprobe")


def test_the_full_size_model_on_cards():
    found = json.loads(plan("--training", "--json").stdout)["training"]
    by_name = {x["name"]: x for x in found["layouts"]}
    assert set(by_name) == {"16-bit", "nf4", "unsloth", "llm-compressor"}
    nf4 = by_name["nf4"]
    # Logits alone: 2,048 tokens x 128,256 words x 12 bytes.
    assert found["activations"]["at_loss"] == 2048 * 128_256 * 12
    # Inputs of 40 blocks, 2,048 x 4,096 in 16-bit each, and projector input (7,680) and output of 4 tiles.
    seen = 4 * 1601
    assert found["activations"]["kept"] == 40 * 2048 * 4096 * 2 + seen * (4 * 7680 + 2 * 4096)
    parts = ("weight", "adapter", "gradient", "optimizer", "activation")
    assert nf4["total_bytes"] == sum(nf4[f"{x}_bytes"] for x in parts)
    fits = {x["gb"]: x["fits"] for x in nf4["cards"]}
    assert fits[16] and fits[80] and not {x["gb"]: x["fits"] for x in by_name["16-bit"]["cards"]}[24]
    for card in nf4["cards"]:
        assert card["margin_bytes"] == card["usable_bytes"] - nf4["total_bytes"]
        assert card["usable_bytes"] < card["gb"] * GIB


@pytest.mark.parametrize(
    "more",
    [
        {"tokens": 128},
        {"batch_size": 2},
        {"tiles": 8},
        {"rank": 32},
        {"optimizer": "adamw_torch"},
        {"adapt": "all"},
    ],
)
def test_more_of_anything_takes_more(more: dict[str, Any], tiny_folder: Any):
    # A rank of 256 makes every matrix of adapters large enough for 8-bit states.
    least = {"tokens": 64, "rank": 16 if "rank" in more else 256}
    sizes = [
        training_plan(str(tiny_folder("mllama")), Step(**x)).layouts[1].total_bytes
        for x in (least, {**least, **more})
    ]
    assert sizes[1] > 1.001 * sizes[0]


def test_the_text_shows_parts_and_cards():
    result = plan("--training")
    assert result.exit_code == 0
    assert "80 GB" in result.stdout and "fits, " in result.stdout and "no, -" in result.stdout
    assert "2,048 tokens" in result.stdout and "One training step" not in plan().stdout
    wrong = plan("--rank", "8")
    assert wrong.exit_code == 2 and "--training" in wrong.stderr
