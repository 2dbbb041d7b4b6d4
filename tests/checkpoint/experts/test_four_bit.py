"""Experts in 4-bit by qprobe's loader: what is loaded is what was listed, saved, and read again."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.experts.four_bit import codes_of_experts, four_bit_experts
from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.checkpoint.quantize import quantize
from qprobe.checkpoint.storage import stored_bytes
from qprobe.checkpoint.verify import verify
from qprobe.errors import ModelError, QprobeError, VerificationError
from qprobe.loading.experts.weights import expert_weights
from qprobe.loading.reference import load_reference
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Compared, OtherKinds
from qprobe.records import FormatSpec
from tests import mixtures
from tests.checkpoint.experts.conftest import Packed
from tests.checkpoint.manifests import inventory_of, manifest_for, with_layer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.slow
@pytest.mark.parametrize("name", mixtures.NAMES)
def test_a_folder_of_experts_in_4_bit_is_read_again_bit_by_bit_and_trains(
    name: str, packed: Callable[[str], Packed]
):
    source, manifest, out = packed(name)
    first, _ = load_dynamic_4bit(manifest, str(source), "cpu")
    again, _ = load_dynamic_4bit(out, device="cpu")
    saved, read = first.state_dict(), again.state_dict()
    assert saved.keys() == read.keys() and all(torch.equal(saved[key], read[key]) for key in saved)
    with torch.no_grad():
        assert torch.equal(first(mixtures.IDS).logits, again(mixtures.IDS).logits)
    fused = [x for x in manifest.layers if len(x.shape) == 3]
    assert set(four_bit_experts(again)) == {x.name for x in fused[:-1]} and not fused[-1].is_four_bit
    assert stored_bytes(again).total_bytes == manifest.budget.total_bytes
    found = audit(out, manifest)
    assert found.ok and {x.name: x.state for x in found.layers if x.state == "16-bit"}.keys() == {
        *manifest.skip_modules
    }
    losses = mixtures.three_steps(again)
    assert losses[2] < losses[0]
    assert torch.equal(again.state_dict()[fused[0].name], saved[fused[0].name])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_are_rounded_by_bitsandbytes_along_their_memory(name: str, packed: Callable[[str], Packed]):
    source, manifest, _ = packed(name)
    own = load_reference(str(source), "cpu").model
    loaded, _ = load_dynamic_4bit(manifest, str(source), "cpu")
    for layer, state in four_bit_experts(loaded).items():
        weight = expert_weights(own)[layer].weight.data
        codes, expected = quantize_4bit(weight, compress_statistics=True, quant_type="nf4", blocksize=64)
        assert torch.equal(codes_of_experts(loaded, layer).reshape(-1), codes.reshape(-1))
        parent, _, leaf = layer.rpartition(".")
        read = getattr(loaded.get_submodule(parent), leaf)
        assert torch.equal(read, dequantize_4bit(codes, expected)) and read.shape == weight.shape
        assert state.nested


def test_plain_transformers_refuses_a_folder_of_4_bit_experts_and_names_who_reads_it(
    packed: Callable[[str], Packed],
):
    with pytest.raises(AttributeError, match=r"load it with qprobe\.load_dynamic_4bit"):
        AutoModelForCausalLM.from_pretrained(packed("mixtral").out)


def test_a_list_that_keeps_all_linears_is_loaded_without_a_word(
    packed: Callable[[str], Packed],
):
    source, manifest, _ = packed("mixtral")
    kept = manifest_for(source, [x.name for x in manifest.layers if len(x.shape) == 2])
    said = StringIO()
    handler, logger = logging.StreamHandler(said), logging.getLogger("transformers.integrations.bitsandbytes")
    logger.addHandler(handler)
    model, _ = load_dynamic_4bit(kept, str(source), "cpu")
    logger.removeHandler(handler)
    assert len(four_bit_experts(model)) == 4 and not said.getvalue()


def test_a_folder_is_loaded_as_it_is(packed: Callable[[str], Packed]):
    with pytest.raises(QprobeError, match="is loaded as it is"):
        load_dynamic_4bit(packed("mixtral").out, device="cpu", dtype="float16")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("mixtral", float("nan")), ("gpt_oss", float("inf"))])
def test_experts_that_4_bit_cannot_hold_are_refused_by_name(
    name: str, value: float, mixture: Callable[[str], Path], tmp_path: Path
):
    source = shutil.copytree(mixture(name), tmp_path / "source")
    path = source / "model.safetensors"
    tensors = load_file(path)
    where = [x for x in tensors if "layers.1." in x and (".experts.2.w2" in x or x.endswith("down_proj"))]
    (hurt,) = (tensors[x] if "w2" in x else tensors[x][2] for x in where)
    hurt[3, 5] = value
    save_file(tensors, path, {"format": "pt"})
    layer = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(
        ModelError, match=rf"^{re.escape(layer)} has NaN or infinity in expert 2, which 4-bit"
    ):
        quantize(manifest_for(source), tmp_path / "out", str(source), "cpu")
    quantize(manifest_for(source, [layer]), tmp_path / "out", str(source), "cpu")


def test_a_model_with_other_experts_in_4_bit_than_listed_is_refused(packed: Callable[[str], Packed]):
    _, manifest, out = packed("mixtral")
    model, _ = load_dynamic_4bit(out, device="cpu")
    kept = next(x for x in manifest.layers if len(x.shape) == 3 and not x.is_four_bit)
    four_bit = next(x for x in manifest.layers if len(x.shape) == 3 and x.is_four_bit)
    with pytest.raises(VerificationError, match="must be in 4-bit but has no parametrization"):
        verify(model, with_layer(manifest, kept.name, precision="nf4", bytes=four_bit.bytes))
    with pytest.raises(VerificationError, match="must stay in 16-bit but is in 4-bit"):
        verify(model, with_layer(manifest, four_bit.name, precision="bf16"))


@pytest.mark.slow
def test_experts_in_16_bit_give_a_folder_that_plain_transformers_reads(
    mixture: Callable[[str], Path], tmp_path: Path
):
    source = mixture("mixtral")
    known = OtherKinds("more.jsonl", 2, (Compared("nothing kept", 9, 0.3, 0.1, False),))
    given = replace(manifest_for(source), other_kinds=known)
    quantize(given, tmp_path / "out", str(source), "cpu", experts="16-bit")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype="auto")
    manifest = read_manifest(tmp_path / "out" / "skiplist.json")
    verify(plain, manifest)
    experts = {x.name for x in inventory_of(source, FormatSpec(experts="16-bit")).layers if x.fixed}
    assert set(manifest.skip_modules) == experts and manifest.format.experts == "16-bit"
    assert manifest.other_kinds is None  # measured with experts in 4-bit
