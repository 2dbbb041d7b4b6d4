"""A merge into a calibrated base calibrates the codes again, on samples that do not judge, if that helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any
from weakref import ref

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

from qprobe import scan
from qprobe.calibration.planned import limit as planned
from qprobe.calibration.planned.limit import GIB
from qprobe.calibration.planned.memory import DeviceNeed
from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.errors import ManifestError
from qprobe.formats.codes_file import open_codes
from qprobe.inputs.answers import Batching, answered
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from qprobe.manifest.read import read_manifest
from qprobe.options import Base
from qprobe.training.merging import calibrated, sixteen
from qprobe.training.merging import merge as merging
from qprobe.training.merging.forms import Job
from qprobe.training.merging.merge import merge
from qprobe.training.merging.merged import Merged
from tests import tiny
from tests.checkpoint import reference
from tests.training.adapters import SCALING, added, plainly, save, write_adapter

pytestmark = [
    pytest.mark.slow,
    # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

FEW: dict[str, Any] = {"samples": 6, "max_new_tokens": 5, "device": "cpu"}
LEFT = "model.layers.0.mlp.up_proj"  # which one adapter leaves as it is


@dataclass(frozen=True)
class Made:
    """A merge. fitted: the `Work` that its codes were calibrated by; weights: of its 16-bit model then.

    codes: the layers that were.
    """

    root: Path
    merged: Merged
    fitted: Any
    weights: dict[str, torch.Tensor]
    codes: frozenset[str]


def adapted(root: Path, out: Path, **options: Any) -> Merged:
    asked = {"manifest": root / "run" / "skiplist.json", "model": str(root / "model"), **FEW, **options}
    return merge(root / "adapter", out=out, batch_size=1, **asked)


def watched(patch: pytest.MonkeyPatch, seen: list[Any]) -> None:
    """`seen` gets the work of each calibration, with the weights of its model and the layers calibrated."""

    def watch(work: Any) -> None:
        subject = work.subject
        weights = {name: subject.dequantized.own(name).clone() for name in subject.modules}
        real(work)
        with open_codes(work.run.path / work.run.codes.file) as file:
            seen.append((work, weights, frozenset(file.layers)))

    real = calibrated.calibrate_model
    patch.setattr(calibrated, "calibrate_model", watch)


@pytest.fixture(scope="module")
def base(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, with a calibrated scan and an adapter beside it."""

    @cache
    def made(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        copytree(tiny_folder(name), root / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
            patch.setattr("qprobe.calibration.two_sided.GROUPS", 1)  # as `quick_rounding`
            scan(str(root / "model"), out=root / "run", format="nf4-calibrated", **FEW)
        write_adapter(root / "model", root / "adapter")
        if name == "llama":
            halves = load_file(root / "adapter" / "adapter_model.safetensors")
            key = f"base_model.model.{LEFT}.lora_B.weight"
            save(root / "adapter", {**halves, key: halves[key] * 0})
        return root

    return made


@pytest.fixture(scope="module")
def made(base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """`made(name)`: that base, merged with all candidates measured, once."""

    @cache
    def of(name: str) -> Made:
        seen: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qprobe.calibration.two_sided.GROUPS", 1)
            watched(patch, seen)
            merged = adapted(base(name), tmp_path_factory.mktemp("merged") / "out")
        ((work, weights, codes),) = seen
        return Made(base(name), merged, work, weights, codes)

    return of


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_calibrated_codes_are_kept_where_they_are_nearer_to_base_and_adapter(name, made):
    merged = made(name).merged
    kl = {x.name: x.kl for x in merged.comparison.rows}
    assert list(kl) == ["base + adapter", "16-bit", "4-bit", "4-bit, calibrated"]
    assert kl["4-bit, calibrated"] < kl["4-bit"]
    assert (merged.form, merged.rounding) == ("4-bit", "calibrated") == (
        merged.to_json()["form"], merged.to_json()["rounding"],
    )  # fmt: skip
    card = (merged.out / "README.md").read_text()
    assert all(f"{kl[x]:.4g}" in card for x in ("4-bit", "4-bit, calibrated"))
    assert (
        "**4-bit, calibrated** (this model)" in card
        and "Codes of what it changes were calibrated on samples" in card
    )
    assert [x.name for x in merged.out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_the_kl_of_calibrated_codes_is_that_of_an_independent_measurement(name, made):
    from peft import PeftModel

    one = made(name)
    processor = load_processor(resolve(str(one.root / "model")))
    four, _ = load_dynamic_4bit(one.root / "run" / "skiplist.json", str(one.root / "model"), "cpu")
    tuned: Any = PeftModel.from_pretrained(four, str(one.root / "adapter"))
    ids = [x.id for x in one.merged.comparison.samples]
    judges = [x for x in judging(name) if x.id in ids]
    assert len(judges) == len(ids)
    judges = answered(tuned, ProcessedSamples(processor, torch.bfloat16), judges, Batching(4, 5))
    both = [
        [reference.answer_logits(x, processor, s) for s in judges] for x in (tuned, plainly(one.merged.out))
    ]
    assert one.merged.row.kl == pytest.approx(reference.mean_kl(*both), rel=1e-6)


def judging(name: str) -> tuple[Any, ...]:
    """The built-in samples on which models are compared."""
    from qprobe.data.builtin import PHOTOGRAPHS, QUESTIONS, photographs, questions

    of, every = (photographs, PHOTOGRAPHS) if name in tiny.VISION_NAMES else (questions, QUESTIONS)
    first = len(every) * 2 // 3
    return of(None, len(every) - first, first).samples


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_codes_are_fitted_to_dequantized_weights_with_the_adapter_added(name, made):
    one = made(name)
    four, _ = load_dynamic_4bit(one.root / "run" / "skiplist.json", str(one.root / "model"), "cpu")
    delta = added(one.root / "adapter", SCALING)
    kinds = set()
    for layer, more in delta.items():
        module = four.get_submodule(layer)
        is_4bit = isinstance(module, Linear4bit)
        weight = module.weight.data
        before = dequantize_4bit(weight, module.weight.quant_state) if is_4bit else weight
        wanted = (before.float() + more).to(torch.bfloat16)
        assert torch.equal(one.weights[layer].to(torch.bfloat16), wanted), layer
        kinds.add(is_4bit)
    assert kinds == {True, False}


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_no_code_is_fitted_to_a_sample_that_judges(name, made):
    one = made(name)
    judges = {x.prompt for x in one.merged.comparison.samples}
    fitted = [x for group in one.fitted.samples for x in group]
    assert len(fitted) >= 6 and all(x.answer for x in fitted)
    assert not {x.id for x in fitted} & {x.id for x in one.merged.comparison.samples}
    assert name in tiny.VISION_NAMES or not {x.prompt for x in fitted} & judges
    assert any("Codes were calibrated again on" in x for x in one.merged.comparison.notes)


def test_layers_that_the_adapter_leaves_keep_the_codes_of_the_base(made):
    one = made("llama")
    before, _ = load_dynamic_4bit(one.root / "run" / "skiplist.json", str(one.root / "model"), "cpu")
    after = plainly(one.merged.out)
    assert one.merged.unchanged == (LEFT,)
    same = {
        layer
        for layer in added(one.root / "adapter", SCALING)
        if torch.equal(before.get_submodule(layer).weight.data, after.get_submodule(layer).weight.data)
    }
    assert same == {LEFT}


def test_the_checkpoint_names_no_codes_of_its_base_and_audit_agrees(made):
    one = made("llama")
    manifest = read_manifest(one.merged.out / "skiplist.json")
    assert (manifest.format.name, manifest.codes) == ("nf4", None)
    found = audit(
        one.merged.out, one.merged.out / "skiplist.json", load=True, adapter=one.root / "adapter",
        model=str(one.root / "model"),
    )  # fmt: skip
    assert found.ok and {x.state for x in found.adapter} == {"took effect", "zero"}


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_no_layer_is_calibrated_but_those_in_4_bit_that_the_adapter_changes(name, made):
    one = made(name)
    changed = set(added(one.root / "adapter", SCALING)) - set(one.merged.unchanged)
    stored = plainly(one.merged.out)
    assert one.codes == {x for x in changed if isinstance(stored.get_submodule(x), Linear4bit)} != changed


def without_room(patch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """A merge finds so many bytes free, and that its 16-bit model takes 8 GiB."""
    patch.setattr(sixteen, "free_memory", lambda _: free_bytes)
    patch.setattr(planned, "device_need", lambda *_: DeviceNeed(7 * GIB, GIB))


@pytest.mark.usefixtures("quick_rounding")
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_without_room_weights_wait_on_the_host_for_the_same_codes_and_the_base_is_gone_by_then(
    name, base, made, tmp_path, monkeypatch
):
    bases: list[ref[Any]] = []
    seen: list[Any] = []

    def opened(job: Job, asked: Base) -> Any:
        found = real_base(job, asked)
        bases.append(ref(found[0]))
        return found

    def loaded(*given: Any) -> Any:
        assert len(bases) > 1 and all(x() is None for x in bases)  # it judged, and gave its weights
        return real_reference(*given)

    real_base, real_reference = Job.base, sixteen.reference_of
    monkeypatch.setattr(Job, "base", opened)
    monkeypatch.setattr(sixteen, "reference_of", loaded)
    watched(monkeypatch, seen)
    without_room(monkeypatch, 8 * GIB)
    merged = adapted(base(name), tmp_path / "out", as_="4-bit")
    ((work, weights, _),) = seen
    assert work.subject.streamed_bytes and made(name).fitted.subject.streamed_bytes is None
    assert all(torch.equal(weight, weights[x]) for x, weight in made(name).weights.items())
    both = [load_file(x / "model.safetensors") for x in (merged.out, made(name).merged.out)]
    assert merged.rounding == "calibrated" and both[0].keys() == both[1].keys()
    assert all(torch.equal(tensor, both[1][x]) for x, tensor in both[0].items())
    (note,) = [x for x in merged.comparison.notes if "GiB free" in x]
    assert note.startswith("cpu has 8.0 GiB free, and with all weights on it calibrating the merged model")
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("quick_rounding")
def test_an_adapter_of_the_16_bit_base_is_calibrated_alike_with_room_and_without(base, tmp_path, monkeypatch):
    seen: list[Any] = []
    watched(monkeypatch, seen)
    given: dict[str, Any] = {"as_": "4-bit", "base": "16-bit"}
    roomy = adapted(base("llama"), tmp_path / "roomy", **given)
    without_room(monkeypatch, 8 * GIB)
    tight = adapted(base("llama"), tmp_path / "tight", **given)
    assert [x[0].subject.streamed_bytes is None for x in seen] == [True, False]
    assert [x.kl for x in roomy.comparison.rows] == [x.kl for x in tight.comparison.rows]
    (_, weights, _), (_, same, _) = seen
    assert all(torch.equal(weight, same[x]) for x, weight in weights.items())


@pytest.mark.usefixtures("quick_rounding")
@pytest.mark.parametrize("on", ["16-bit", "dynamic"])
def test_layers_that_an_adapter_leaves_alone_have_the_codes_of_the_scan_in_each_rounding(
    on, base, tmp_path, monkeypatch
):
    root, forms = base("llama"), {}

    def kept(job: Job, folder: Path, codes: Path | None = None) -> Any:
        written = real(job, folder, codes)
        forms[codes is None] = plainly(folder)
        return written

    real = merging.write_4bit
    monkeypatch.setattr(merging, "write_4bit", kept)
    monkeypatch.setitem(merging.WRITERS, "4-bit", kept)
    adapter = write_adapter(root / "model", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    merge(
        adapter, out=tmp_path / "out", manifest=root / "run" / "skiplist.json", base=on, as_="4-bit",
        model=str(root / "model"), batch_size=1, **FEW,
    )  # fmt: skip
    scanned, _ = load_dynamic_4bit(root / "run" / "skiplist.json", str(root / "model"), "cpu")
    assert forms.keys() == {True, False}
    for made in forms.values():
        other = {
            name
            for name, module in scanned.named_modules()
            if isinstance(module, Linear4bit)
            and not torch.equal(module.weight.data, made.get_submodule(name).weight.data)
        }
        assert other and all(name.endswith(("q_proj", "v_proj")) for name in other)


def test_without_the_codes_of_the_scan_a_merge_into_4_bit_is_refused_before_weights_are_loaded(
    base, tmp_path, monkeypatch
):
    monkeypatch.setattr(merging, "_merged", lambda *_: pytest.fail("weights are loaded"))
    manifest = copytree(base("llama") / "run", tmp_path / "run") / "skiplist.json"
    (tmp_path / "run" / "nf4-calibrated.safetensors").unlink()
    with pytest.raises(ManifestError, match=r"nf4-calibrated\.safetensors"):
        adapted(base("llama"), tmp_path / "out", manifest=manifest, base="16-bit")


def test_without_room_for_a_block_codes_are_rounded_to_nearest_before_memory_runs_out(
    base, tmp_path, monkeypatch
):
    without_room(monkeypatch, 2**20)
    monkeypatch.setattr(calibrated, "calibrate_model", lambda _: pytest.fail("codes are fitted"))
    merged = adapted(base("llama"), tmp_path / "out", as_="4-bit", samples=2)
    assert merged.rounding == "nearest" and [x.name for x in tmp_path.iterdir()] == ["out"]
    (note,) = [x for x in merged.comparison.notes if "calibrated again" in x]
    assert note.startswith("Codes were not calibrated again, since memory does not suffice")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_where_memory_is_short_codes_are_rounded_to_nearest_and_a_note_says_so(
    error, base, tmp_path, monkeypatch
):
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(sixteen, "reference_of", fail)
    merged = adapted(base("llama"), tmp_path / "out", as_="4-bit", samples=2)
    assert [x.name for x in merged.comparison.rows] == ["base + adapter", "4-bit"]
    assert merged.rounding == "nearest" and [x.name for x in tmp_path.iterdir()] == ["out"]
    (note,) = [x for x in merged.comparison.notes if "calibrated again" in x]
    assert note.startswith("Codes were not calibrated again, since memory does not suffice")


def test_a_mistake_of_ours_in_calibration_is_not_taken_for_a_want_of_memory(base, tmp_path, monkeypatch):
    monkeypatch.setattr(sixteen, "reference_of", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapted(base("llama"), tmp_path / "out", as_="4-bit", samples=2)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_calibrated_for_a_merge_into_16_bit(base, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "fitted_codes", lambda *_: pytest.fail("codes are fitted"))
    merged = adapted(base("llama"), tmp_path / "out", as_="16-bit", samples=2)
    assert merged.rounding is None and merged.to_json()["rounding"] is None
