"""Every way in which a loaded model can differ from its manifest is caught, by the layer's name."""

import re
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.checkpoint.verify import verify
from qprobe.errors import VerificationError
from tests.checkpoint.manifests import manifest_for, with_layer

KEPT = "model.layers.1.mlp.up_proj"
FOUR_BIT = "model.layers.0.self_attn.k_proj"


@pytest.fixture
def manifest(tiny_folder):
    return manifest_for(tiny_folder("llama"), [KEPT])


@pytest.fixture
def model(tiny_folder, manifest):
    return load_dynamic_4bit(manifest, str(tiny_folder("llama")), "cpu")[0]


def four_bit_copy(linear, **options):
    options = {"compute_dtype": torch.bfloat16, "quant_type": "nf4", **options}
    copy = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **options)
    copy.weight.data = torch.randn(linear.out_features, linear.in_features, dtype=torch.bfloat16)
    return copy.to("cpu")


def assert_caught(model, manifest, name, *words):
    with pytest.raises(VerificationError) as caught:
        verify(model, manifest)
    message = str(caught.value)
    assert name in message
    assert [word for word in words if word not in message] == []


def test_what_was_loaded_passes(model, manifest):
    verify(model, manifest)


def test_a_kept_layer_that_was_quantized(model, manifest):
    model.set_submodule(KEPT, four_bit_copy(model.get_submodule(KEPT)))
    assert_caught(model, manifest, KEPT, "must stay in 16-bit", "Linear4bit")


def test_an_extra_layer_that_was_kept(model, manifest):
    plain = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    model.set_submodule(FOUR_BIT, plain)
    assert_caught(model, manifest, FOUR_BIT, "must be in 4-bit")


def test_a_kept_layer_in_another_dtype(model, manifest):
    model.get_submodule(KEPT).float()
    assert_caught(model, manifest, KEPT, "torch.float32")


def test_a_lost_quantization_state(model, manifest):
    model.get_submodule(FOUR_BIT).weight.quant_state = None
    assert_caught(model, manifest, FOUR_BIT, "lost its quant_state")


def test_a_4bit_module_that_holds_16bit_weights(model, manifest):
    # What a checkpoint with a stale list gives: it loads without an error and dies on the first forward.
    weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.bfloat16), requires_grad=False)
    model.get_submodule(FOUR_BIT)._parameters["weight"] = weight
    assert_caught(model, manifest, FOUR_BIT, "torch.bfloat16")


@pytest.mark.parametrize(
    ("key", "value"),
    [("quant_type", "fp4"), ("blocksize", 128), ("nested", False), ("shape", torch.Size([64, 32]))],
)
def test_a_quantization_state_of_another_kind(model, manifest, key, value):
    setattr(model.get_submodule(FOUR_BIT).weight.quant_state, key, value)
    assert_caught(model, manifest, FOUR_BIT, key)


def test_another_compute_dtype(model, manifest):
    model.get_submodule(FOUR_BIT).compute_dtype = torch.float32
    assert_caught(model, manifest, FOUR_BIT, "torch.float32")


def test_codes_that_bitsandbytes_repacked_for_the_cpu(model, manifest):
    model.get_submodule(FOUR_BIT).weight.quant_state.packing_format_for_cpu = True
    assert_caught(model, manifest, FOUR_BIT, "repacked")


def test_a_linear_that_the_manifest_does_not_list(model, manifest):
    shorter = replace(manifest, layers=tuple(x for x in manifest.layers if x.name != KEPT))
    assert_caught(model, shorter, KEPT, "not listed")
    shorter = replace(manifest, layers=tuple(x for x in manifest.layers if x.name != FOUR_BIT))
    assert_caught(model, shorter, FOUR_BIT, "not listed")


def test_a_layer_that_the_model_does_not_have(model, manifest):
    stale = with_layer(manifest, FOUR_BIT, name="language_model.model.layers.0.self_attn.k_proj")
    assert_caught(model, stale, "language_model.model.layers.0.self_attn.k_proj", "no such module")


def test_a_layer_of_another_shape(model, manifest):
    assert_caught(model, with_layer(manifest, KEPT, shape=(96, 128)), KEPT, "(96, 64)", "(96, 128)")
    assert_caught(model, with_layer(manifest, FOUR_BIT, shape=(64, 64)), FOUR_BIT, "1024", "2048")


@pytest.mark.slow
def test_an_uncovered_weight_that_was_touched(tiny_folder):
    folder = tiny_folder("llava_pixtral")
    manifest = manifest_for(folder)
    model, _ = load_dynamic_4bit(manifest, str(folder), "cpu")
    assert [x.name for x in manifest.uncovered] == ["model.vision_tower.patch_conv.weight"]
    model.model.vision_tower.patch_conv.float()
    assert_caught(model, manifest, "model.vision_tower.patch_conv.weight", "torch.float32")


def test_bytes_that_differ_though_every_layer_is_right(model, manifest):
    model.model.norm.float()  # 64 weights of a norm: 128 B more
    wanted = manifest.budget.total_bytes
    assert_caught(model, manifest, f"{wanted + 128:,} B", f"{wanted:,} B")


def test_many_problems_name_the_first_and_count_the_rest(model, manifest):
    for layer in manifest.layers:
        if layer.precision == "nf4":
            model.get_submodule(layer.name).weight.quant_state = None
    with pytest.raises(VerificationError) as caught:
        verify(model, manifest)
    assert str(caught.value).count("lost its quant_state") == 5
    assert re.search(r"and 15 more", str(caught.value))  # 3 layers of 7 linears, one of them kept
