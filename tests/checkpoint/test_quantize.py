"""A quantized checkpoint is the dynamic model to the bit, for whoever loads it, or it is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from qprobe.checkpoint import quantize as quantize_module
from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.card import model_card
from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.checkpoint.quantize import Quantized, _made_from, quantize
from qprobe.errors import ManifestError, ModelError
from qprobe.exports.matchers import hits, transformers_5_0, transformers_5_21
from qprobe.loading.config import model_class
from qprobe.loading.source import Source
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Compared, Manifest, OtherKinds, Quality
from qprobe.manifest.write import write_manifest
from tests import tiny
from tests.checkpoint.manifests import every_third, manifest_for
from tests.reading import encode

FIVE = ("mllama", "qwen2_vl", "qwen2_5_vl", "llava_pixtral", "llama")


def plainly(folder: Path) -> Any:
    """The checkpoint as a user of transformers loads it; bitsandbytes' repacking on some CPUs is off."""
    model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.inference_mode()
def logits(model: Any, processor: Any, name: str) -> torch.Tensor:
    return model(**encode(processor, tiny.questions(name, answer="a cat"), torch.bfloat16).inputs).logits


@pytest.fixture(scope="module")
def quantized(tiny_folder, tmp_path_factory) -> Callable[[str], tuple[Manifest, Quantized]]:
    """`quantized(name)`: a manifest of that tiny model and what became of it, once. None may change it."""

    @cache
    def made(name: str) -> tuple[Manifest, Quantized]:
        folder = tiny_folder(name)
        manifest = manifest_for(folder, every_third(folder))
        return manifest, quantize(manifest, tmp_path_factory.mktemp(name) / "out", str(folder), "cpu")

    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_plain_loading_computes_the_same_bits(name, tiny_folder, quantized):
    folder, (manifest, done) = tiny_folder(name), quantized(name)
    model, processor = load_dynamic_4bit(manifest, str(folder), "cpu")
    assert torch.equal(logits(plainly(done.out), processor, name), logits(model, processor, name))
    assert done.total_bytes == manifest.budget.total_bytes
    assert done.layers_16bit == len(manifest.skip_modules)
    assert set(done.files) == {x.name for x in done.out.iterdir()} >= {"README.md", "skiplist.json"}
    assert read_manifest(done.out / "skiplist.json") == manifest
    assert AutoTokenizer.from_pretrained(done.out)("a cat") == AutoTokenizer.from_pretrained(folder)("a cat")


@pytest.mark.slow
def test_another_16bit_type_is_told_and_measurements_in_the_first_are_not(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    known = (Compared("nothing kept", 9, 0.3, 0.1, True),)
    manifest = replace(
        manifest_for(folder, every_third(folder)),
        quality=Quality(5, 0.3, 0.1, 0.1),
        compared=known,
        other_kinds=OtherKinds("more.jsonl", 2, known),
    )
    done = quantize(manifest, tmp_path / "out", str(folder), "cpu", "float16")
    written = read_manifest(done.out / "skiplist.json")
    assert written.format.compute_dtype == "float16" and written.quality == Quality()
    assert (written.compared, written.other_kinds) == ((), None)
    assert audit(done.out, written).ok
    card = (done.out / "README.md").read_text()
    assert "float16" in card and "bfloat16" not in card
    for given in ((done.out,), (written, str(folder))):  # the checkpoint, and the weights that were scanned
        loaded, _ = load_dynamic_4bit(*given, device="cpu")
        assert loaded.get_input_embeddings().weight.dtype == torch.float16


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_its_list_means_the_same_to_every_transformers_5(name, quantized):
    manifest, done = quantized(name)
    entries = AutoConfig.from_pretrained(done.out).quantization_config["llm_int8_skip_modules"]
    names = [x.name for x in manifest.layers]
    for rule in (transformers_5_0, transformers_5_21):
        kept = {hit for entry in entries for hit in hits(rule, entry, names)}
        assert kept == set(manifest.skip_modules)
    assert audit(done.out, manifest, load=True, device="cpu").problems == ()


WITHOUT_QPROBE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qprobe":
            raise ImportError("no qprobe here")

sys.meta_path.insert(0, Blocked())
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
AutoProcessor.from_pretrained(sys.argv[1])
for module in model.modules():
    if isinstance(module, Linear4bit):
        module.support_avx512bf16_for_cpu = False
with torch.inference_mode():
    torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
assert not any(name.partition(".")[0] == "qprobe" for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("own_bf16")  # as the process without qprobe has it
def test_it_loads_where_qprobe_is_not_installed_also_from_shards(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize_module, "MAX_SHARD", "100KB")
    folder = tiny_folder("mllama")
    manifest = manifest_for(folder, every_third(folder))
    done = quantize(manifest, tmp_path / "out", str(folder), "cpu")
    assert sum(name.endswith(".safetensors") for name in done.files) > 2
    model, processor = load_dynamic_4bit(manifest, str(folder), "cpu")
    given = encode(processor, tiny.questions("mllama", answer="a cat"), torch.bfloat16).inputs
    torch.save(given, tmp_path / "given.pt")
    places = [str(tmp_path / x) for x in ("out", "given.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", WITHOUT_QPROBE, *places], check=True, cwd=tmp_path)
    with torch.inference_mode():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(**given).logits)
    assert AutoProcessor.from_pretrained(done.out).chat_template == processor.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_that_ends_early_leaves_nothing(error, tiny_folder, tmp_path, monkeypatch):
    folder = tiny_folder("llama")

    def stop(_processor: Any, written: Path) -> None:
        # The weights are written by now; what kills the process here must find no checkpoint at `out`.
        assert (written / "model.safetensors").is_file() and not (tmp_path / "out").exists()
        raise error

    monkeypatch.setattr(quantize_module, "save_processor", stop)
    with pytest.raises((ModelError, KeyboardInterrupt)) as caught:
        quantize(manifest_for(folder), tmp_path / "out", str(folder), "cpu")
    assert list(tmp_path.iterdir()) == []
    assert isinstance(error, KeyboardInterrupt) or "No space left" in str(caught.value)


@pytest.mark.slow
def test_the_card_shows_what_was_measured_and_what_was_not(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    manifest = manifest_for(folder, every_third(folder))
    quantize(manifest, tmp_path / "plain", str(folder), "cpu")
    plain = (tmp_path / "plain" / "README.md").read_text()
    assert "was not measured" in plain and "AutoModelForCausalLM" in plain and "base_model" not in plain
    total = manifest.budget.total_bytes
    measured = replace(
        manifest,
        quality=Quality(64, 0.269, 0.00226, 0.002),
        compared=(Compared("by sensitivity", total, 0.00226, 0.00058, True),),
    )
    quantize(measured, tmp_path / "measured", str(folder), "cpu")
    card = (tmp_path / "measured" / "README.md").read_text()
    assert f"| this list | {total:,} | 0.00226 |" in card and "| 0.269 |" in card
    assert "64 held-out samples" in card and "0.00226 ± 0.0006" in card
    assert all(f"`{name}`" in card for name in manifest.skip_modules)


@pytest.mark.slow
def test_figures_are_this_model_s_only_where_the_weights_are_those_that_were_measured(tiny_folder, tmp_path):
    """Another folder of the same shapes has the same fingerprint; a name on the hub is the same weights."""
    folder = tiny_folder("llama")
    known = manifest_for(folder)
    known = replace(
        known,
        model=replace(known.model, id="owner/measured", revision="abc"),
        quality=Quality(9, 0.2, 0.1, 0.1),
    )
    card = model_card(known, "LlamaForCausalLM")
    assert "base_model: owner/measured" in card and "**this model**" in card and "not checked" not in card
    quantize(known, tmp_path / "out", str(folder), "cpu")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "measured on the weights of `owner/measured`" in card and "**this model**" not in card
    assert card.count("owner/measured") == 1 and f"# {folder.name}, dynamic" in card
    assert str(folder) not in card
    quantize(replace(known, quality=Quality()), tmp_path / "plain", str(folder), "cpu")
    assert "were measured on" not in (tmp_path / "plain" / "README.md").read_text()


PEAK = """
import sys, threading, time
from pathlib import Path
from qprobe.checkpoint.quantize import quantize
from qprobe.manifest.read import read_manifest

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

small, big, root = map(Path, sys.argv[1:])
quantize(small / "skiplist.json", root / "small", str(small), "cpu")  # imports everything
start = anonymous()
peak = [start]
threading.Thread(target=watch, daemon=True).start()
quantize(big / "skiplist.json", root / "big", str(big), "cpu")
print(peak[0] - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's process status")
def test_memory_holds_the_4bit_model_and_never_the_16bit_one(tiny_folder, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**tiny.decoder(512, 1536, 14), "num_attention_heads": 8})
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    big, small = tmp_path / "model", tiny_folder("llama")
    model.save_pretrained(big)
    for folder in (big, small):
        place = big if folder is big else tmp_path
        write_manifest(place / "skiplist.json", manifest_for(folder))
    code = PEAK.replace('small / "skiplist.json"', f'Path({str(tmp_path)!r}) / "skiplist.json"')
    in_16bit = sum(p.numel() * 2 for p in model.parameters())
    in_4bit = manifest_for(big).budget.total_bytes
    # A fixed threshold, or the allocator keeps what was freed: even so one of three peaks must do.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = []
    for run in ("first", "second", "third"):
        (tmp_path / run).mkdir()
        command = [sys.executable, "-c", code, small, big, tmp_path / run]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
        peaks.append(int(ran.stdout))
        if peaks[-1] < in_16bit:
            break
    # 95 MB in 16-bit, 25 MB in 4-bit; rounding one weight takes some 20 MB more. Both models: 120 MB.
    assert 0.8 * in_4bit < peaks[-1] < in_16bit, (peaks, in_4bit, in_16bit)


def test_a_manifest_whose_names_no_list_can_tell_apart_is_refused_before_writing(
    tiny_folder, tmp_path, monkeypatch
):
    def refuse(*_arguments: Any) -> None:
        raise ManifestError("The entry 'x' keeps 2 layers.")

    monkeypatch.setattr("qprobe.exports.export.exact_entries", refuse)
    folder = tiny_folder("llama")
    with pytest.raises(ManifestError, match="keeps 2 layers"):
        quantize(manifest_for(folder), tmp_path / "out", str(folder), "cpu")
    assert list(tmp_path.iterdir()) == []


def named(model: str) -> Any:
    """As much of a manifest as says which model was measured."""
    return SimpleNamespace(model=SimpleNamespace(id=model))


def test_weights_in_a_user_s_folder_need_not_be_those_that_were_measured(tmp_path: Path):
    demo, mine = (named(x) for x in ("demo", "mine"))
    of_the_package, of_the_user = Source("demo", str(tmp_path)), Source("mine", str(tmp_path))
    for model in (None, "demo"):
        assert _made_from(demo, model, of_the_package) is None
    assert _made_from(mine, str(tmp_path), of_the_user) == _made_from(mine, None, of_the_user) == "mine"
    assert _made_from(demo, str(tmp_path), of_the_user) == "mine"
    assert _made_from(mine, None, Source("mine", "hub/mine")) is None
