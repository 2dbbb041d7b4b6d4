"""Calibrated weights from a scan's folder to a model, a checkpoint and a comparison."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.comparing import course as course_module
from qprobe.checkpoint.comparing.compare import compare
from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.checkpoint.quantize import quantize
from qprobe.checkpoint.storage import stored_bytes
from qprobe.data.builtin import Samples
from qprobe.errors import ManifestError, ModelError
from qprobe.formats.codes_file import FILE_NAME, open_codes
from qprobe.inputs.batch import ANSWER
from qprobe.loading.config import model_class
from qprobe.loading.processor import load_processor
from qprobe.loading.reference import load_reference
from qprobe.loading.source import Source
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import moved
from qprobe.manifest.write import manifest_to_json, write_manifest
from qprobe.runs.folder import RunFolder
from qprobe.selection.select import select
from tests import tiny
from tests.reading import encode
from tests.scanning.asked import scan, write_lines

STATE = ".quant_state.bitsandbytes__nf4"  # JSON in bytes, as many as its numbers have digits
NAMES = ("mllama", "qwen2_vl", "qwen2_5_vl", "llava_pixtral", "llama", "odd", "tuned")


class Run(NamedTuple):
    """A finished scan of calibrated weights. model: the folder of the 16-bit weights."""

    name: str
    model: Path
    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "skiplist.json"


def kind_of(name: str) -> str:
    """The tiny model of `tests.tiny` whose samples the run `name` reads."""
    return "llama" if name in ("odd", "tuned", "untuned") else name


def write_odd(folder: Path) -> Path:
    """The tiny Llama with 100 in_features in every block: scales straddle rows."""
    tiny.write("llama", folder)
    sizes = {**tiny.decoder(100, 140, 2), "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 20}
    config = LlamaConfig(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        tiny.draw_weights(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def to_tune(folder: Path, steps: int) -> dict[str, Any]:
    """What a scan that tunes scales is asked for: 20 samples are for its codes, 2 of them kept back."""
    rows = [{"prompt": f"What comes after {i}?", "answer": f"the number {i + 1}"} for i in range(30)]
    return {"data": write_lines(folder / "rows.jsonl", *rows), "samples": 30, "tune": steps}


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory) -> Callable[[str], Run]:
    """`run(name)`: that scan, made once. Tests must not change its folder."""
    done: dict[str, Run] = {}

    def make(name: str) -> Run:
        if name not in done:
            root = tmp_path_factory.mktemp(name)
            model = write_odd(root / "model") if name == "odd" else tiny_folder(kind_of(name))
            few: dict[str, Any] = {"samples": 6, "max_new_tokens": 5, "device": "cpu"}
            few |= {"tuned": to_tune(root, 8), "untuned": to_tune(root, 0)}.get(name, {})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
                # All rows of a weight move at once, in a sixteenth of the steps.
                patch.setattr("qprobe.calibration.two_sided.GROUPS", 1)
                scan(str(model), out=root / "run", format="nf4-calibrated", **few)
            done[name] = Run(name, model, root / "run")
        return done[name]

    return make


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory) -> Callable[[str], Path]:
    """`saved(name)`: the checkpoint that `quantize` makes of that run, once. Tests must not change it."""

    @cache
    def made(name: str) -> Path:
        one = run(name)
        return quantize(one.manifest, tmp_path_factory.mktemp(name) / "out", str(one.model), "cpu").out

    return made


def logits(model: Any, processor: Any, name: str) -> torch.Tensor:
    batch = encode(processor, tiny.questions(kind_of(name), 2), model.dtype)
    with torch.no_grad():
        return model(**batch.inputs).logits


def without_repacking(model: torch.nn.Module) -> None:
    """As `qprobe.checkpoint.load` does: on CPUs with AVX512-BF16 bitsandbytes rewrites what it loaded."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_model_holds_the_weights_of_the_file_at_the_promised_bytes(name, run):
    one = run(name)
    manifest = read_manifest(one.manifest)
    model, _ = load_dynamic_4bit(one.manifest, str(one.model), "cpu")
    changed = 0
    with open_codes(one.folder / FILE_NAME) as file:
        for layer in manifest.layers:
            weight: Any = model.get_submodule(layer.name).weight
            if layer.precision == "nf4" and layer.name in file.layers:
                codes, state = file.raw(layer.name)
                assert torch.equal(weight.data, codes)
                assert torch.equal(weight.quant_state.absmax, state["absmax"])
                changed += 1
    assert changed > 0.6 * sum(x.precision == "nf4" for x in manifest.layers)
    assert stored_bytes(model).total_bytes == manifest.budget.total_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_checkpoint_loads_without_qprobe_and_computes_the_same(name, run, saved):
    one, folder = run(name), saved(name)
    ours, processor = load_dynamic_4bit(one.manifest, str(one.model), "cpu")
    theirs = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    without_repacking(theirs)
    assert torch.equal(logits(theirs, processor, name), logits(ours, processor, name))
    original = load_reference(str(one.model), "cpu").model
    assert not torch.equal(logits(theirs, processor, name), logits(original, processor, name))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning"
)
@pytest.mark.parametrize("name", NAMES)
def test_lora_trains_on_a_saved_checkpoint(name, saved):
    folder = saved(name)
    model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    without_repacking(model)
    processor = load_processor(Source("saved", str(folder)))
    batch = encode(processor, tiny.questions(kind_of(name), 2, "a red bar"), model.dtype)
    labels = batch.inputs["input_ids"].masked_fill(batch.kinds != ANSWER, -100)
    frozen = {n: p.data.clone() for n, p in model.named_parameters()}
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = tuned(**batch.inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    now = {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in tuned.named_parameters()
    }
    assert all(torch.equal(now[n], p) for n, p in frozen.items())


@pytest.mark.slow
def test_tuned_scales_reach_the_checkpoint_at_the_bytes_of_plain_nf4(run, saved, tmp_path):
    one, untuned = run("tuned"), run("untuned")
    (told,) = (x for x in RunFolder(one.folder).notes.sentences if x.startswith("Scales"))
    assert re.match(r"Scales were tuned for [1-8] steps?: .* the damage fell from ", told), told
    with open_codes(one.folder / FILE_NAME) as file, open_codes(untuned.folder / FILE_NAME) as before:
        assert file.layers == before.layers
        pairs = {name: (file.raw(name), before.raw(name)) for name in sorted(file.layers)}
    assert all(torch.equal(new[0], old[0]) for new, old in pairs.values())  # codes stay, scales move
    assert all(not torch.equal(new[1]["absmax"], old[1]["absmax"]) for new, old in pairs.values())
    manifest = read_manifest(one.manifest)
    plain = replace(manifest, format=replace(manifest.format, name="nf4"), codes=None)
    made = quantize(plain, tmp_path / "nearest", str(one.model), "cpu").out
    tuned, nearest = (load_file(folder / "model.safetensors") for folder in (saved("tuned"), made))
    assert {x: (t.dtype, t.shape) for x, t in tuned.items() if STATE not in x} == {
        x: (t.dtype, t.shape) for x, t in nearest.items() if STATE not in x
    }
    loaded = [load_dynamic_4bit(x, str(one.model), "cpu")[0] for x in (one.manifest, plain)]
    assert len({stored_bytes(model).total_bytes for model in loaded}) == 1


@pytest.mark.slow
def test_selecting_again_elsewhere_still_finds_the_weights(run, tmp_path):
    one = run("llama")
    manifest = select(one.folder, "+20%")
    assert manifest.codes is not None and manifest.codes.file == FILE_NAME
    path = tmp_path / "other" / "list.json"
    path.parent.mkdir()
    write_manifest(path, moved(manifest, one.folder, path.parent))
    model, processor = load_dynamic_4bit(path, str(one.model), "cpu")
    same, _ = load_dynamic_4bit(manifest, str(one.model), "cpu", folder=one.folder)
    assert torch.equal(logits(model, processor, "llama"), logits(same, processor, "llama"))


@pytest.mark.slow
def test_the_dtype_of_the_rest_can_be_another(run):
    model, _ = load_dynamic_4bit(run("llama").manifest, str(run("llama").model), "cpu", "float16")
    states = [m.weight.quant_state for m in model.modules() if isinstance(m, Linear4bit)]
    assert {state.dtype for state in states} == {torch.float16}


@pytest.mark.slow
def test_the_run_says_what_was_calibrated(run):
    one = run("llama")
    lines = (one.folder / "layers.csv").read_text().splitlines()
    assert lines[0].endswith(",rounding,samples,tokens")
    rounding = {row["layer"]: row["rounding"] for row in csv.DictReader(lines)}
    with open_codes(one.folder / FILE_NAME) as file:
        assert {name for name, how in rounding.items() if how == "calibrated"} == file.layers
    assert [name for name, how in rounding.items() if not how] == ["lm_head"]
    manifest = read_manifest(one.manifest)
    assert manifest.made_by.command.endswith("--format nf4-calibrated --budget +10%")
    assert {x.precision for x in manifest.layers} <= {"nf4", "bf16"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "odd"])
def test_an_audit_tells_calibrated_codes_from_rounding_to_nearest(name, run, saved, tmp_path):
    one = run(name)
    manifest = read_manifest(one.manifest)
    found = audit(saved(name), one.manifest)
    assert found.ok, found.problems
    # The same list, the same layout, the same bytes; only the codes are those of plain NF4.
    plain = replace(manifest, format=replace(manifest.format, name="nf4"), codes=None)
    nearest = quantize(plain, tmp_path / "nearest", str(one.model), "cpu").out
    assert audit(nearest, plain).ok
    (problem,) = audit(nearest, one.manifest).problems
    with open_codes(one.folder / FILE_NAME) as file:
        held = [x.name for x in manifest.layers if x.precision == "nf4" and x.name in file.layers]
    assert problem.startswith(f"{len(held)} of {len(held)} linears in 4-bit do not hold the calibrated codes")
    assert held[0] in problem


@pytest.mark.slow
def test_an_audit_compares_block_scales_and_names_the_one_layer(run, saved, tmp_path):
    one, folder = run("llama"), Path(shutil.copytree(saved("llama"), tmp_path / "out"))
    with open_codes(one.folder / FILE_NAME) as file:
        manifest = read_manifest(one.manifest)
        layer = next(x.name for x in manifest.layers if x.precision == "nf4" and x.name in file.layers)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{layer}.weight.absmax"][0] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (problem,) = audit(folder, one.manifest).problems
    assert problem.startswith("1 of ") and f": {layer}." in problem


@pytest.mark.slow
def test_an_audit_finds_another_offset_of_the_block_scales(run, saved, tmp_path):
    one, folder = run("llama"), Path(shutil.copytree(saved("llama"), tmp_path / "out"))
    with open_codes(one.folder / FILE_NAME) as file:
        manifest = read_manifest(one.manifest)
        layer = next(x.name for x in manifest.layers if x.precision == "nf4" and x.name in file.layers)
    tensors = load_file(folder / "model.safetensors")
    state = f"{layer}.weight.quant_state.bitsandbytes__nf4"
    numbers = json.loads(bytes(tensors[state].tolist()))
    numbers["nested_offset"] *= 1.01  # every block scale is larger, all tables and codes the same
    tensors[state] = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (problem,) = audit(folder, one.manifest).problems
    assert "do not hold the calibrated codes" in problem and f": {layer}." in problem


@pytest.mark.slow
@pytest.mark.parametrize("size", ["5KB", "20KB"])  # at 20KB a weight and its block scales part
def test_an_audit_finds_calibrated_codes_in_whichever_shard_they_lie(size, run, tmp_path):
    one = run("llama")
    model, _ = load_dynamic_4bit(one.manifest, str(one.model), "cpu")
    model.save_pretrained(tmp_path, max_shard_size=size)
    found = audit(tmp_path, one.manifest)
    assert found.ok and len({x.file for x in found.layers}) > 1, found.problems


@pytest.mark.slow
@pytest.mark.parametrize(("harm", "why"), [("missing", "cannot be read"), ("changed", "SHA-256")])
def test_an_audit_without_the_calibrated_weights_is_not_clear(harm, why, run, saved, tmp_path):
    one, folder = run("llama"), saved("llama")
    manifest = Path(shutil.copy(one.manifest, tmp_path))
    if harm == "changed":
        (tmp_path / FILE_NAME).write_bytes((one.folder / FILE_NAME).read_bytes()[:-1] + b"!")
    (problem,) = audit(folder, manifest).problems
    assert problem.startswith("The calibrated codes could not be compared: ") and why in problem
    assert audit(folder, read_manifest(manifest), manifest_folder=one.folder).ok


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["missing", "changed", "another"])
def test_weights_that_are_not_those_of_the_scan_are_refused(harm, run, tmp_path):
    one = run("llama")
    folder = tmp_path / "run"
    shutil.copytree(one.folder, folder)
    file, source = folder / FILE_NAME, str(one.model)
    if harm == "missing":
        file.unlink()
    elif harm == "changed":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    else:  # the same architecture with other values
        source = str(shutil.copytree(one.model, tmp_path / "model"))
        model = LlamaForCausalLM.from_pretrained(source)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.roll(1, 0))
        model.save_pretrained(source)
    wanted = {"missing": "cannot be read", "changed": "SHA-256", "another": "of another model"}[harm]
    with pytest.raises(ManifestError, match=wanted):
        load_dynamic_4bit(folder / "skiplist.json", source, "cpu")


def test_a_full_folder_is_not_written_into(run, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ModelError, match="not empty"):
        quantize(run("llama").manifest, tmp_path, str(run("llama").model), "cpu")


@pytest.mark.slow
def test_compare_shows_both_ways_of_rounding_with_and_without_the_list(run, monkeypatch):
    one = run("llama")
    given = Samples(tuple(tiny.questions("llama", 3)), ())
    monkeypatch.setattr(course_module, "choose_samples", lambda *_: given)
    found = compare(one.manifest, model=str(one.model), device="cpu", max_new_tokens=5)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["16-bit", "nf4", "nf4-calibrated", "dynamic-nf4", "dynamic"]
    assert rows["nf4"].total_bytes == rows["nf4-calibrated"].total_bytes
    assert rows["dynamic-nf4"].total_bytes == rows["dynamic"].total_bytes > rows["nf4"].total_bytes
    assert len({row.kl for row in rows.values()}) == 5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.pop("codes"), "names no file of weights"),
        (lambda m: m["format"].update(name="nf4"), "has no calibrated weights to name"),
        (lambda m: m["codes"].update(file="/etc/passwd"), "codes.file"),
        (lambda m: m["codes"].update(sha256="abc"), "codes.sha256"),
    ],
)
def test_manifests_whose_format_and_file_disagree_are_refused(change, match, run, tmp_path):
    data = manifest_to_json(read_manifest(run("llama").manifest))
    change(data)
    path = tmp_path / "skiplist.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=match):
        read_manifest(path)
