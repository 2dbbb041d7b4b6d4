"""A merged checkpoint is its base with the adapter added, says what that cost, or is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from shutil import copytree
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from click.testing import CliRunner
from safetensors.torch import load_file

from qprobe.checkpoint.adapters.effect import TOO_SMALL
from qprobe.checkpoint.adapters.lora import read_adapter
from qprobe.checkpoint.adapters.record import Record, write_record
from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.cli import main
from qprobe.data.builtin import PHOTOGRAPHS, QUESTIONS, photographs, questions
from qprobe.errors import ManifestError
from qprobe.inputs.answers import Batching, answered
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import skeleton_of
from qprobe.loading.source import resolve
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Compared, OtherKinds, Quality
from qprobe.manifest.write import write_manifest
from qprobe.records import FormatSpec
from qprobe.system.devices import AskedDevice
from qprobe.training.merging.forms import WRITERS, Job, fold
from qprobe.training.merging.merge import merge
from qprobe.training.merging.merged import lost
from qprobe.training.origin import Origin, as_merged, origin_of
from tests.checkpoint import reference
from tests.checkpoint.manifests import manifest_for
from tests.training.adapters import SCALING, plainly, save

pytestmark = [
    pytest.mark.slow,
    # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def merged(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """(root, what `merge` found) of a tiny model, merged with both forms measured."""
    made: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in made:
            root, out = family(name), tmp_path_factory.mktemp("merged") / "out"
            made[name] = root, merge(
                root / "adapter", out=out, manifest=root / "skiplist.json", device="cpu", samples=3,
                max_new_tokens=4, batch_size=1, model=str(root / "model"),
            )  # fmt: skip
        return made[name]

    return of


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_the_kl_on_the_card_is_that_of_an_independent_measurement(name, merged):
    from peft import PeftModel

    root, made = merged(name)
    processor = load_processor(resolve(str(root / "model")))
    base, _ = load_dynamic_4bit(root / "skiplist.json", str(root / "model"), "cpu")
    tuned: Any = PeftModel.from_pretrained(base, str(root / "adapter"))
    builtin, all_of_it = (questions, QUESTIONS) if name == "llama" else (photographs, PHOTOGRAPHS)
    first = len(all_of_it) * 2 // 3
    samples = builtin(None, len(all_of_it) - first, first).samples[:3]
    assert all(x.seen for x in samples) == (name != "llama")
    samples = answered(tuned, ProcessedSamples(processor, torch.bfloat16), samples, Batching(3, 4))
    kept = plainly(made.out)
    both = [[reference.answer_logits(model, processor, x) for x in samples] for model in (tuned, kept)]
    kl = reference.mean_kl(*both)
    assert made.row.kl == pytest.approx(kl, rel=1e-6) and kl > 0
    assert f"{made.row.kl:.4g}" in (made.out / "README.md").read_text()
    assert made.row is not made.comparison.rows[0] and made.comparison.rows[0].kl == 0


def test_the_better_form_is_kept_and_nothing_else_is_left(merged):
    _, made = merged("llama")
    assert [x.name for x in made.comparison.rows] == ["base + adapter", "16-bit", "4-bit"]
    is_4bit = "quantization_config" in json.loads((made.out / "config.json").read_text())
    assert made.form == ("4-bit" if is_4bit else "16-bit") and made.why.startswith(made.form)
    assert [x.name for x in made.out.parent.iterdir()] == ["out"]
    assert set(made.files) == {x.name for x in made.out.iterdir()} >= {"README.md", "tokenizer.json"}


def test_audit_says_which_layers_of_the_adapter_took_effect(merged, tmp_path):
    root, made = merged("llama")
    found = audit(made.out, adapter=root / "adapter")
    assert found.ok and {x.state for x in found.adapter} == {"took effect"}
    layer = "model.layers.0.mlp.up_proj"
    adapter = copytree(root / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{layer}.lora_B.weight"
    save(adapter, {**tensors, key: -tensors[key]})
    found = audit(made.out, adapter=adapter)
    assert [x.layer for x in found.adapter if x.state == "no effect"] == [layer]
    assert any(layer in x for x in found.problems)
    nothing = audit(root / "model", adapter=root / "adapter")
    assert {x.state for x in nothing.adapter} == {"no effect"} and not nothing.ok


def test_an_adapter_of_the_16bit_base_merges_into_16bit_without_loss(family, tmp_path):
    root = family("llama")
    made = merge(
        root / "adapter", out=tmp_path / "out", as_="16-bit", base="16-bit", manifest=root / "skiplist.json",
        model=str(root / "model"), device="cpu", samples=2, max_new_tokens=4,
    )  # fmt: skip
    assert made.rounded_away == ()
    assert made.row.kl < 0.01 and made.arrived == pytest.approx(1, abs=0.01)


def test_layers_of_which_rounding_leaves_less_than_half_are_named_as_audit_names_them(family, tmp_path):
    root, layer = family("llama"), "model.layers.0.mlp.up_proj"
    adapter = copytree(root / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{layer}.lora_B.weight"
    save(adapter, {**tensors, key: tensors[key] * 1e-6})
    made = merge(
        adapter, out=tmp_path / "out", as_="16-bit", base="16-bit", manifest=root / "skiplist.json",
        model=str(root / "model"), device="cpu", samples=1, max_new_tokens=2,
    )  # fmt: skip
    assert made.rounded_away == (layer,) and made.arrived == pytest.approx(1, abs=0.01)
    assert f" in the stored weights, less than half of it in 1 of {made.layers} layers, since" in lost(made)
    found = audit(made.out, adapter=adapter, model=str(root / "model"))
    assert [x.layer for x in found.adapter if x.state == "rounded away"] == [layer]
    assert found.ok and any(x.endswith(f"as in any merge into this form: {layer}.") for x in found.remarks)


@pytest.mark.parametrize("base", ["dynamic", "16-bit"])
def test_of_a_hardly_trained_adapter_merge_and_audit_say_the_same_and_why(base, family, tmp_path):
    root = family("llama")
    adapter = copytree(root / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save(adapter, {n: t * 1e-6 if "lora_B" in n else t for n, t in tensors.items()})
    made = merge(
        adapter, out=tmp_path / "out", as_="4-bit", base=base, manifest=root / "skiplist.json",
        model=str(root / "model"), device="cpu", samples=1, max_new_tokens=2,
    )  # fmt: skip
    found = audit(made.out, adapter=adapter, model=str(root / "model"))
    states = {x.layer: x.state for x in found.adapter}
    assert {x for x in states if states[x] == "rounded away"} == set(made.rounded_away)
    assert {x for x in states if states[x] == "took effect"} == states.keys() - set(made.rounded_away)
    assert found.ok and len(made.rounded_away) > 15
    (said,) = [x for x in found.remarks if "of the adapter hold" in x]
    assert TOO_SMALL in said and TOO_SMALL in lost(made) and TOO_SMALL in (made.out / "README.md").read_text()


def test_what_arrived_in_4_bit_is_of_what_the_adapter_changes_and_not_of_what_rounding_does(family):
    root = family("llama")
    adapter = read_adapter(root / "adapter")
    tiny = replace(adapter, layers={n: replace(x, scaling=1e-9) for n, x in adapter.layers.items()})
    four, _ = load_dynamic_4bit(root / "skiplist.json", str(root / "model"), "cpu")
    found = fold(four, tiny, FormatSpec(), beside=plainly(root / "model"))
    in_4bit = [x for name, x in found.items() if isinstance(four.get_submodule(name), Linear4bit)]
    assert len(in_4bit) == 14 and {x.share for x in in_4bit} == {0.0}


def test_a_correction_that_an_adapter_holds_is_not_added_to_16bit_weights(family, tmp_path):
    root = family("llama")
    held = copytree(root / "adapter", tmp_path / "adapter")
    origin = origin_of(read_adapter(held), root / "skiplist.json", "dynamic", str(root / "model"), None)
    write_record(held, Record("finished", "f", {"start": "corrected", "rank": 3}))
    skeleton = skeleton_of(resolve(origin.model), "bfloat16")
    job = Job(read_adapter(held), origin, skeleton, tmp_path / "out", AskedDevice("cpu"))
    for form, write in WRITERS.items():
        (tmp_path / form).mkdir()
        write(job, tmp_path / form)
    before, after = (load_file(x / "model.safetensors") for x in (root / "model", tmp_path / "16-bit"))
    halves = load_file(held / "adapter_model.safetensors")
    for layer in job.adapter.layers:
        a, b = (halves[f"base_model.model.{layer}.lora_{x}.weight"].float() for x in "AB")
        learned = SCALING * (b[:, :3] @ a[:3])
        wanted = (before[f"{layer}.weight"].float() + learned).to(torch.bfloat16)
        assert learned.any() and torch.equal(after[f"{layer}.weight"], wanted)
    seen = [
        audit(x, adapter=held, model=origin.model) for x in (*(tmp_path / f for f in WRITERS), root / "model")
    ]
    assert [{x.state for x in one.adapter} for one in seen] == [
        {"took effect"},
        {"took effect"},
        {"no effect"},
    ]
    assert all(abs(x.arrived - 1) < 0.1 for x in seen[0].adapter)


def test_a_merge_for_vllm_lists_its_names_or_is_refused_at_once(family, tmp_path, monkeypatch):
    root = family("llama")
    kept = {x.name for x in manifest_for(root / "model").layers if ".layers.0." in x.name}
    write_manifest(tmp_path / "whole.json", manifest_for(root / "model", kept))
    asked = {
        "as_": "4-bit", "model": str(root / "model"), "device": "cpu", "samples": 1, "max_new_tokens": 2,
        "for_tool": "vllm",
    }  # fmt: skip
    made = merge(root / "adapter", out=tmp_path / "out", manifest=tmp_path / "whole.json", **asked)
    config = json.loads((made.out / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.qkv_proj" in config["llm_int8_skip_modules"]
    monkeypatch.setattr(Job, "base", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ManifestError, match=r"vLLM makes one matrix model\.layers\..*_proj of layers with"):
        merge(root / "adapter", out=tmp_path / "no", manifest=root / "skiplist.json", **asked)


def test_a_base_in_float16_merges_though_its_manifest_knows_the_model_in_bfloat16(family, tmp_path):
    root = family("llama")
    made = merge(
        root / "adapter", out=tmp_path / "out", as_="4-bit", manifest=root / "skiplist.json", samples=1,
        model=str(root / "model"), device="cpu", max_new_tokens=2, dtype="float16",
    )  # fmt: skip
    assert made.row.kl > 0
    merged, _ = load_dynamic_4bit(made.out, device="cpu")
    assert merged.dtype == torch.float16
    assert audit(made.out, made.out / "skiplist.json", load=True).ok


def test_the_manifest_of_a_merge_says_nothing_of_what_was_measured_on_its_base(family):
    root = family("llama")
    known = (Compared("nothing kept", 9, 0.3, 0.1, True),)
    measured = replace(
        read_manifest(root / "skiplist.json"),
        quality=Quality(5, 0.3, 0.1, 0.1),
        compared=known,
        other_kinds=OtherKinds("more.jsonl", 2, known),
    )
    origin = Origin(root / "skiplist.json", measured, "dynamic", str(root / "model"), None, None)
    found = as_merged(origin, skeleton_of(resolve(str(root / "model")), "bfloat16"))
    assert (found.quality, found.compared, found.other_kinds) == (Quality(), (), None)


def test_an_interrupted_merge_leaves_nothing(family, tmp_path):
    root = family("llama")

    def stop(stage: str, _done: int, _total: int) -> None:
        if stage == "4-bit":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(
            root / "adapter", out=tmp_path / "out", manifest=root / "skiplist.json", samples=1,
            model=str(root / "model"), device="cpu", max_new_tokens=2, progress=stop,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "error", "what"),
    [
        ("merging.forms.save_four_bit", torch.OutOfMemoryError("CUDA out of memory."), "The device"),
        ("merging.forms.fold", MemoryError(), "This machine"),
        (
            "merging.merge.load_plainly",
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "This machine",
        ),
    ],
)
def test_nothing_is_left_of_a_merge_that_memory_does_not_suffice_for(
    place, error, what, family, tmp_path, monkeypatch
):
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    root, out = family("llama"), tmp_path / "there" / "out"
    monkeypatch.setattr(f"qprobe.training.{place}", fail)
    done = CliRunner().invoke(
        main,
        ["merge", str(root / "adapter"), "--out", str(out), "--as", "4-bit", "--samples", "1",
         "--device", "cpu", "--manifest", str(root / "skiplist.json"), "--max-new-tokens", "2",
         "--model", str(root / "model")],
    )  # fmt: skip
    assert done.exit_code == 1
    (said,) = done.stderr.splitlines()[-1:]
    assert said.startswith(f"Error: {what} ran out of memory") and "Pass a smaller --batch-size" in said
    assert list(out.parent.iterdir()) == []


def test_the_command_prints_what_was_measured_and_audit_agrees(family, tmp_path):
    root = family("llama")
    run = CliRunner()
    out = str(tmp_path / "out")
    common = ["--model", str(root / "model"), "--device", "cpu"]
    made = run.invoke(
        main,
        ["merge", str(root / "adapter"), "--out", out, "--as", "16-bit", "--samples", "2", "--json",
         "--manifest", str(root / "skiplist.json"), "--max-new-tokens", "2", *common],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["form"] == "16-bit" and found["layers"] == 21 and found["rows"][1]["kl"] > 0
    seen = run.invoke(main, ["audit", out, "--adapter", str(root / "adapter"), *common])
    assert seen.exit_code == 0 and "The adapter took effect in 21 of 21 layers." in seen.stdout
