"""What 4-bit loading never converts, or must not: listed with its reason, never promised in 4-bit."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from qprobe.checkpoint.quantize import refuse_rewritten
from qprobe.checkpoint.sizes import everything_outside
from qprobe.errors import ModelError
from qprobe.loading.inventory import (
    FLOAT32,
    READ_DIRECTLY,
    WHY_CONV1D,
    converted_modules,
    list_layers,
    read_directly,
    refuse_rewriting,
)
from qprobe.loading.skeleton import meta_model
from qprobe.measure.kl import refuse_unread
from qprobe.records import FormatSpec
from qprobe.scanning.check import check_inventory
from qprobe.selection.request import parse_request


def skeleton(architecture: str, config: transformers.PreTrainedConfig) -> nn.Module:
    config.architectures = [architecture]
    return meta_model(config, "bfloat16")


def test_a_conv1d_is_listed_with_its_reason_and_a_model_of_nothing_else_is_refused():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    model = skeleton("GPT2LMHeadModel", config)
    inventory = list_layers(model, FormatSpec())
    assert [x.name for x in inventory.uncovered if x.why == WHY_CONV1D] == [
        f"transformer.h.0.{x}.weight" for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel has no linear layer .*c_attn\.weight: a Conv1D"):
        check_inventory(inventory, model, parse_request(None, None), None)


def test_a_linear_whose_weight_is_read_directly_is_fixed_and_named():
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    layers = list_layers(skeleton("MambaForCausalLM", config), FormatSpec()).layers
    fixed = {x.name.rpartition(".")[2]: x.fixed for x in layers}
    assert fixed["dt_proj"] == READ_DIRECTLY and fixed["in_proj"] is None


def test_a_linear_whose_module_turns_inputs_into_its_weights_type_is_fixed():
    # The type of 4-bit codes is uint8, and LongT5 hands `wo` inputs of the type of its weight.
    config = transformers.LongT5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2)
    layers = list_layers(skeleton("LongT5ForConditionalGeneration", config), FormatSpec()).layers
    fixed = {x.name.rpartition(".")[2]: x.fixed for x in layers}
    assert fixed["wo"] == READ_DIRECTLY and fixed["wi"] is None


def test_a_router_that_converts_its_classifier_when_it_runs_is_listed_as_it_runs():
    config = transformers.SwitchTransformersConfig(d_model=32, num_layers=2, num_heads=2, num_experts=2)
    model = skeleton("SwitchTransformersForConditionalGeneration", config)
    routers = [x for x in list_layers(model, FormatSpec()).layers if x.name.endswith("router.classifier")]
    assert routers
    assert {(x.fixed, x.bytes_16bit) for x in routers} == {(FLOAT32, 4 * 2 * 32)}


def test_a_model_that_changes_its_own_weights_is_refused():
    config = transformers.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ModelError, match="RwkvForCausalLM rescales its own weights"):
        refuse_rewriting(skeleton("RwkvForCausalLM", config))


def test_transformers_itself_says_what_it_converts_and_the_model_stays_as_it_is():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "own": Own(2, 2), "kept": nn.Linear(2, 2)})
    model._keep_in_fp32_modules = ["kept"]
    before = list(model.modules())
    assert converted_modules(model) == {"plain"}
    assert converted_modules(model, ["plain"]) == frozenset()
    assert list(model.modules()) == before
    assert {x.name: x.fixed for x in list_layers(model, FormatSpec()).layers} == {
        "plain": None,
        "kept": FLOAT32,
    }


def test_linears_that_share_one_weight_are_fixed_and_counted_once():
    model = nn.ModuleDict({name: nn.Linear(64, 64, dtype=torch.bfloat16) for name in ("a", "b", "c")})
    model["b"].weight = model["a"].weight
    inventory = list_layers(model, FormatSpec())
    assert [(x.name, x.fixed, x.bytes_16bit) for x in inventory.layers] == [
        ("a", "tied", 2 * 64 * 64),
        ("b", "tied", 0),
        ("c", None, 2 * 64 * 64),
    ]
    stored = sum(x.nbytes for x in model.parameters())  # torch gives the shared one once
    assert inventory.total_bytes(frozenset("c")) == stored
    assert sum(x.bytes for x in everything_outside(model)) == inventory.other_bytes


def test_only_computing_with_a_weight_counts():
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(2, 2) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kind = self.a.weight.dtype
            if isinstance(self.b.weight, torch.Tensor) and x.dtype != kind:
                x = self.b(self.a(x))
            wide = self.e.weight.dtype
            if (guarded := self.f.weight.dtype).is_floating_point:
                x = self.f(x.to(guarded) + 1)
            return self.d(x.to(self.d.weight.dtype)) @ self.c.weight + self.e(x.to(dtype=wide))

    model = nn.ModuleDict({"asks": Asks()})
    found = read_directly(model, frozenset(f"asks.{x}" for x in "abcdef"))
    assert found == {"asks.c", "asks.d", "asks.e"}  # the type of 4-bit codes, uint8, is none for inputs


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("T5Model", transformers.T5Config(d_model=32, num_layers=1), "without a language head"),
        (
            "SwitchTransformersForConditionalGeneration",
            transformers.SwitchTransformersConfig(
                d_model=32, num_layers=2, num_heads=2, num_experts=2, decoder_start_token_id=0
            ),
            "keeps each expert as layers of its own",
        ),
        ("ViTForImageClassification", transformers.ViTConfig(num_hidden_layers=1), "reads pixel_values"),
        (
            "WhisperForConditionalGeneration",
            transformers.WhisperConfig(encoder_layers=1),
            r"works on audio \(input_features\), and qprobe measures text and images",
        ),
        (
            "SpeechT5ForTextToSpeech",
            transformers.SpeechT5Config(encoder_layers=1, decoder_layers=1),
            r"works on audio \(decoder_input_values\)",
        ),
    ],
)
def test_a_model_whose_inputs_samples_do_not_make_is_refused(
    architecture: str, config: transformers.PreTrainedConfig, said: str
):
    with pytest.raises(ModelError, match=said):
        refuse_unread(skeleton(architecture, config))


def test_quantize_refuses_a_model_that_transformers_rewrites_when_it_reads_4bit_files():
    config = transformers.Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with pytest.raises(ModelError, match=r"SequentialLlama4TextExperts in place of .*, a Llama4TextExperts"):
        refuse_rewritten(skeleton("Llama4ForCausalLM", config))
    refuse_rewritten(
        skeleton("MambaForCausalLM", transformers.MambaConfig(hidden_size=32, num_hidden_layers=1))
    )
