"""No tensor of a model is invented: what its files lack, or hold in another shape, is refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qprobe
from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.quantize import quantize
from qprobe.errors import ModelError
from qprobe.loading.pretrained import check_files, load_pretrained, loading_info
from qprobe.loading.skeleton import skeleton_of
from qprobe.loading.source import resolve
from qprobe.manifest.write import write_manifest
from qprobe.models.headers import read_headers
from tests.checkpoint.manifests import manifest_for

TinyFolder = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]
Change = Callable[..., None]

KINDS = {
    "embedding": ("llava_pixtral", "language_model.model.embed_tokens.weight"),
    "linear": ("llava_pixtral", "language_model.model.layers.1.self_attn.o_proj.weight"),
    "bias": ("llava_pixtral", "multi_modal_projector.linear_1.bias"),
    "norm": ("llava_pixtral", "language_model.model.norm.weight"),
    "head": ("llava_pixtral", "language_model.lm_head.weight"),
    "patch embedding": ("llava_pixtral", "vision_tower.patch_conv.weight"),
    "gate": ("mllama", "language_model.model.layers.1.cross_attn_attn_gate"),
    "class embedding": ("mllama", "vision_model.class_embedding"),
    "table": ("bert", "embeddings.position_embeddings.weight"),
    "pooler": ("bert", "pooler.dense.weight"),
    "tied embedding": ("llama_tied", "model.embed_tokens.weight"),
}


def removed(tensors: Tensors, name: str) -> None:
    del tensors[name]


def renamed(tensors: Tensors, name: str) -> None:
    tensors[f"{name}_"] = tensors.pop(name)


def reshaped(tensors: Tensors, name: str) -> None:
    tensors[name] = torch.zeros(3, 3, dtype=torch.bfloat16)


CHANGES = (removed, renamed, reshaped)


def changed(folder: Path, out: Path, change: Change) -> Path:
    """`out`, the model in `folder` with other tensors."""
    out.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def stored(folder: Path, name: str) -> str:
    """The tensor of `folder` that ends in `name`, whatever comes before it."""
    short = name.removeprefix("language_model.").removeprefix("model.")
    return next(x for x in read_headers(folder) if x.endswith(short))


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_tensor_is_named_if_it_is_removed_renamed_or_of_another_shape(
    tiny_folder: TinyFolder, tmp_path: Path, kind: str, change: Change
):
    model, name = KINDS[kind]
    folder = tiny_folder(model)
    key = stored(folder, name)
    broken = changed(folder, tmp_path / "broken", partial(change, name=key))
    with pytest.raises(ModelError) as error:
        check_files(skeleton_of(resolve(str(broken)), "bfloat16"))
    said = str(error.value)
    count = 2 if kind == "tied embedding" and change is not reshaped else 1  # and the head, tied to it
    assert f" {count} tensor" in said and ".".join(key.split(".")[-2:]) in said
    assert ("[3, 3]" in said) == (change is reshaped)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_every_command_that_reads_weights_refuses_such_a_checkpoint(
    tiny_folder: TinyFolder, tmp_path: Path, change: Change
):
    folder, name = tiny_folder("llama"), "model.layers.1.post_attention_layernorm.weight"
    broken = changed(folder, tmp_path / "llama", partial(change, name=name))
    skiplist, out = tmp_path / "skiplist.json", tmp_path / "out"
    write_manifest(skiplist, manifest_for(folder))
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"prompt": "a cat", "answer": "a train"}) + "\n")
    model = str(broken)
    commands = {
        "scan": lambda: qprobe.scan(model, out=out),
        "scan --measures weight": lambda: qprobe.scan(model, out=out, measures=("weight",)),
        "load": lambda: qprobe.load_dynamic_4bit(skiplist, model),
        "load standard": lambda: qprobe.load_standard_4bit(model),
        "compare": lambda: qprobe.compare(skiplist, model=model),
        "quantize": lambda: quantize(skiplist, out, model=model),
        **{
            f"finetune on {base}": partial(
                qprobe.finetune, skiplist, data=lines, out=out, model=model, base=base, held_out=0.0
            )
            for base in ("dynamic", "nf4", "16-bit")
        },
    }
    for command, run in commands.items():
        with pytest.raises(ModelError, match=name):
            run()
        assert not out.exists() or not list(out.rglob("*.safetensors")), command
    assert any(name in x for x in audit(broken).problems)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_audit_names_such_a_tensor_of_a_4bit_checkpoint(
    tiny_folder: TinyFolder, tmp_path: Path, change: Change
):
    folder, name = tiny_folder("llama"), "model.layers.1.post_attention_layernorm.weight"
    quantize(manifest_for(folder), tmp_path / "whole", model=str(folder), device="cpu")
    assert audit(tmp_path / "whole").problems == ()
    broken = changed(tmp_path / "whole", tmp_path / "broken", partial(change, name=name))
    for load in (False, True):
        assert any(name in x for x in audit(broken, load=load, device="cpu").problems)


@pytest.mark.slow
def test_what_is_not_saved_is_not_missed(tiny_folder: TinyFolder):
    # llama_tied has no head in its files, bert no position_ids, all of them no rotary frequencies
    for name in ("llama_tied", "bert", "mllama", "qwen2_vl", "qwen2_5_vl", "llava_pixtral"):
        skeleton = skeleton_of(resolve(str(tiny_folder(name))), "bfloat16")
        found = loading_info(skeleton, read_headers(tiny_folder(name)))
        assert not found["missing_keys"] and not found["mismatched_keys"] and not found["unexpected_keys"]
        check_files(skeleton)


def test_of_more_tensors_a_few_are_named_and_all_counted(tiny_folder: TinyFolder, tmp_path: Path):
    def without_layer(tensors: Tensors) -> None:
        for name in [x for x in tensors if x.startswith("model.layers.2.")]:
            del tensors[name]

    broken = changed(tiny_folder("llama"), tmp_path / "llama", without_layer)
    with pytest.raises(
        ModelError, match=r"lack 9 tensors of LlamaForCausalLM.*model\.layers\.2\.input_layer"
    ):
        check_files(skeleton_of(resolve(str(broken)), "bfloat16"))


def test_a_tensor_that_the_model_has_no_place_for_is_said_once(
    tiny_folder: TinyFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def with_more(tensors: Tensors) -> None:
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)

    folder = changed(tiny_folder("llama"), tmp_path / "with-more", with_more)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            load_pretrained(skeleton_of(resolve(str(folder)), "bfloat16"), dtype=torch.bfloat16)
    said = [x for x in caplog.messages if "model.layers.9.mlp.up_proj.weight" in x]
    assert len(said) == 1 and "no place" in said[0]


def test_a_config_that_ties_what_the_files_hold_apart_is_refused(tiny_folder: TinyFolder, tmp_path: Path):
    def with_head(tensors: Tensors, factor: float) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor

    same = changed(tiny_folder("llama_tied"), tmp_path / "same", partial(with_head, factor=1.0))
    check_files(skeleton_of(resolve(str(same)), "bfloat16"))
    apart = changed(tiny_folder("llama_tied"), tmp_path / "apart", partial(with_head, factor=2.0))
    with pytest.raises(
        ModelError, match=r"ties .*embed_tokens\.weight and lm_head\.weight.*different values"
    ):
        check_files(skeleton_of(resolve(str(apart)), "bfloat16"))


def test_a_head_that_is_missing_though_the_config_ties_nothing_gets_a_hint(
    tiny_folder: TinyFolder, tmp_path: Path
):
    broken = changed(tiny_folder("llama"), tmp_path / "llama", partial(removed, name="lm_head.weight"))
    with pytest.raises(ModelError, match="If its head is tied"):
        check_files(skeleton_of(resolve(str(broken)), "bfloat16"))


def test_quantize_refuses_a_weight_that_is_not_finite_by_name(tiny_folder: TinyFolder, tmp_path: Path):
    name = "model.layers.0.mlp.up_proj.weight"

    def spoilt(tensors: Tensors) -> None:
        tensors[name][3, 5] = float("nan")

    folder = changed(tiny_folder("llama"), tmp_path / "llama", spoilt)
    with pytest.raises(ModelError, match=f"{name} in 'llama' has NaN or infinity"):
        quantize(manifest_for(folder), tmp_path / "out", model=str(folder), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_quantized_checkpoint_is_refused_wherever_16bit_weights_are_needed(
    tiny_folder: TinyFolder, tmp_path: Path
):
    quantize(
        manifest_for(tiny_folder("llama")), tmp_path / "4bit", model=str(tiny_folder("llama")), device="cpu"
    )
    for run in (qprobe.load_standard_4bit, lambda x: qprobe.scan(x, out=tmp_path / "run")):
        with pytest.raises(ModelError, match="'4bit' is quantized already, by 'bitsandbytes'"):
            run(str(tmp_path / "4bit"))


def test_finetune_refuses_a_model_without_a_loss(tiny_folder: TinyFolder, tmp_path: Path):
    folder = tiny_folder("bert")
    write_manifest(tmp_path / "skiplist.json", manifest_for(folder))
    with pytest.raises(ModelError, match="BertModel gives no answers in tokens, so there is no loss"):
        qprobe.finetune(
            tmp_path / "skiplist.json", data=tmp_path / "none.jsonl", out=tmp_path / "out", model=str(folder)
        )
