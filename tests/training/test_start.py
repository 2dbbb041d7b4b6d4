"""An adapter may begin at the correction that calibration left, and at no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qprobe import answer_collator
from qprobe.calibration import correction
from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.checkpoint.starts.held import hold, learned_numbers
from qprobe.errors import ManifestError, QprobeError, RunError
from qprobe.formats.codes_file import FILE_NAME, sha256_of, write_codes
from qprobe.formats.nf4 import Nf4
from qprobe.manifest.read import read_manifest
from qprobe.manifest.write import write_manifest
from qprobe.options import FinetuneOptions
from qprobe.records import CodesFile
from qprobe.runs.folder import RunFolder
from qprobe.runs.notes import CorrectionFile
from qprobe.training.finetune import finetune
from qprobe.training.refused import check_options, with_start
from tests.checkpoint.manifests import every_third, manifest_for

pytestmark = [
    pytest.mark.slow,
    # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # trl 1.16.0 hands transformers the options by their old names; can go with the first that does not.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def run(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the tiny Llama with 4-bit weights in a file of their own and corrections of rank 4."""
    folder, run = tiny_folder("llama"), tmp_path_factory.mktemp("run")
    plain = manifest_for(folder, every_third(folder))
    weights = load_file(folder / "model.safetensors")
    write_codes(
        run / FILE_NAME,
        {x.name: Nf4().stored(weights[f"{x.name}.weight"]) for x in plain.layers if x.is_four_bit},
    )
    codes = CodesFile(FILE_NAME, sha256_of(run / FILE_NAME))
    spec = replace(plain.format, name="nf4-calibrated")
    write_manifest(run / "skiplist.json", replace(plain, format=spec, codes=codes))
    torch.manual_seed(0)
    kept = {}
    for x in plain.layers:  # those that the list keeps in 16-bit as well, as a scan does
        kept |= {f"{x.name}.left": torch.randn(x.shape[0], 4), f"{x.name}.right": torch.randn(4, x.shape[1])}
    save_file({k: t.bfloat16() for k, t in kept.items()}, run / correction.FILE_NAME)
    noted = CorrectionFile(sha256_of(run / correction.FILE_NAME), codes.sha256, rank=4)
    (run / "notes").mkdir()
    RunFolder(run).notes.put("correction", noted)
    return run


def test_what_is_held_stays_to_the_bit_and_the_rest_is_trained_as_if_it_were_alone():
    import peft

    torch.manual_seed(0)
    inputs, wanted = torch.randn(8, 6), torch.randn(8, 5)
    adapters = []
    for rank in (4, 2):
        plain: Any = torch.nn.Sequential(torch.nn.Linear(6, 5))
        adapters.append(
            peft.get_peft_model(plain, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="0"))
        )
    (held, fresh), (left, right) = (
        (x.base_model.model[0] for x in adapters),
        (torch.randn(5, 2), torch.randn(2, 6)),
    )
    fresh.get_base_layer().load_state_dict(held.get_base_layer().state_dict())
    fresh.get_base_layer().weight.data += left @ right  # the base that the held part makes of its own
    a, b = held.lora_A["default"].weight, held.lora_B["default"].weight
    fresh.lora_A["default"].weight.data.copy_(a[:2])
    a.data[2:], b.data[:, 2:] = right, left
    hold(adapters[0], slice(2, None))
    assert [learned_numbers(x, 2) for x in adapters] == [2 * (6 + 5)] * 2
    for tuned in adapters:
        optimizer = torch.optim.AdamW(
            [x for x in tuned.parameters() if x.requires_grad], lr=1e-2, weight_decay=0.0
        )
        for _ in range(5):
            optimizer.zero_grad()
            (tuned(inputs) - wanted).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 0.1)
            optimizer.step()
    assert torch.equal(a[2:], right) and torch.equal(b[:, 2:], left)
    assert b[:, :2].any()
    for mine, alone in ((a[:2], fresh.lora_A), (b[:, :2], fresh.lora_B)):
        torch.testing.assert_close(mine, alone["default"].weight, rtol=1e-3, atol=1e-5)


@pytest.fixture
def loaded(run: Path, tiny_folder: Any) -> Callable[..., tuple[Any, Any]]:
    return partial(load_dynamic_4bit, run / "skiplist.json", str(tiny_folder("llama")), "cpu")


def test_the_loader_attaches_the_adapter_that_was_asked_for(run: Path, loaded: Callable[..., Any]):
    kept = {k: t.float() for k, t in load_file(run / "correction.safetensors").items()}
    four_bit = {x.name for x in read_manifest(run / "skiplist.json").layers if x.is_four_bit}
    asked = {"rank": 4, "adapt": "model.layers.0"}
    corrected, zero = (loaded(start=x, **asked)[0] for x in ("corrected", "zero"))
    for tuned, rank in ((corrected, 8), (zero, 4)):
        config = tuned.peft_config["default"]
        assert (config.r, config.lora_alpha, config.lora_dropout) == (rank, rank, 0)
        trained = {n.split(".lora_")[0] for n, p in tuned.named_parameters() if p.requires_grad}
        assert {x.removeprefix("base_model.model.") for x in trained} == {
            n for n in kept_names(kept) if n.startswith("model.layers.0.")
        }
    for name in four_bit & {n for n in kept_names(kept) if n.startswith("model.layers.0.")}:
        added, nothing = (
            x.get_base_model().get_submodule(name).get_delta_weight("default") for x in (corrected, zero)
        )
        assert torch.allclose(added, kept[f"{name}.left"] @ kept[f"{name}.right"], rtol=1e-5, atol=1e-5)
        assert added.any() and not nothing.any()
        assert not corrected.get_base_model().get_submodule(name).lora_B["default"].weight[:, :4].any()
    plain, _ = loaded()
    assert not hasattr(plain, "peft_config") and not any(p.requires_grad for p in plain.parameters())


def kept_names(kept: dict[str, torch.Tensor]) -> set[str]:
    return {x.rpartition(".")[0] for x in kept} - {"lm_head"}


def test_trls_trainer_takes_the_model_with_its_start_and_trains_on_from_there(
    loaded: Callable[..., Any], tmp_path: Path
):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": f"what is {n}?", "completion": f"a coastal train {n}"} for n in range(2)]
    torch.manual_seed(0)
    model, processor = loaded(start="corrected", rank=4)
    begun = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, logging_steps=1, report_to="none",
            use_cpu=True, bf16=False, learning_rate=1e-3, save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        before = float(model(**batch).loss)
        with model.disable_adapter():
            at_zero = float(model(**batch).loss)
    trainer.train()
    (loss,) = (x["loss"] for x in trainer.state.log_history if "loss" in x)
    assert loss == pytest.approx(before, rel=1e-3) and loss != pytest.approx(at_zero, rel=1e-2)
    after = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert after.keys() == begun.keys()
    # TRL rounds adapters to bf16.
    differing = {n: p.float() != begun[n].bfloat16().float() for n, p in after.items()}
    assert all(x[:, :4].any() for n, x in differing.items() if "lora_B" in n)
    assert not any((x[:, 4:] if "lora_B" in n else x[4:]).any() for n, x in differing.items())


def test_finetune_begins_at_the_correction_where_one_is_kept_unless_it_is_told_otherwise(
    run: Path, loaded: Callable[..., Any], tiny_folder: Any, tmp_path: Path
):
    rows = [{"prompt": f"what is {n}?", "answer": f"a coastal train {n}"} for n in range(3)]
    asked = {
        "manifest": run / "skiplist.json", "data": rows[1:], "eval_data": rows[:1], "rank": 4, "steps": 1,
        "model": str(tiny_folder("llama")), "device": "cpu", "accumulation": 1, "max_length": 128,
    }  # fmt: skip
    corrected = finetune(**asked, out=tmp_path / "default")
    zero = finetune(**asked, out=tmp_path / "zero", start="zero")
    assert (corrected.start, zero.start) == ("corrected", "zero")
    for done in (corrected, zero):
        model, processor = loaded(start=done.start, rank=4)
        with torch.no_grad():
            loss = float(model(**answer_collator(processor)(rows[:1])).loss)
        assert done.eval_loss_before == pytest.approx(loss, rel=1e-3)
        assert json.loads((done.out / "finetune.json").read_text())["spec"]["start"] == done.start
    assert corrected.eval_loss_before != pytest.approx(zero.eval_loss_before, rel=1e-2)
    assert corrected.trainable_parameters == zero.trainable_parameters
    assert "from the correction" in (corrected.out / "README.md").read_text()


def adapters_and_corrections(run: Path, out: Path) -> list[tuple[torch.Tensor, ...]]:
    """(lora_A, lora_B, right, left) of the first block's 4-bit layers: as saved in `out`, and as kept."""
    kept = {k: t.float() for k, t in load_file(run / correction.FILE_NAME).items()}
    learned = load_file(out / "adapter_model.safetensors")
    four_bit = {x.name for x in read_manifest(run / "skiplist.json").layers if x.is_four_bit}
    names = [n for n in sorted(kept_names(kept) & four_bit) if n.startswith("model.layers.0.")]
    assert names
    return [
        (
            *(learned[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB"),
            kept[f"{name}.right"],
            kept[f"{name}.left"],
        )
        for name in names
    ]


def test_a_correction_is_held_over_an_interruption(run: Path, tiny_folder: Any, tmp_path: Path):
    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "train" and done == 2:
            raise KeyboardInterrupt

    rows = [{"prompt": f"what is {n}?", "answer": f"a coastal train {n}"} for n in range(4)]
    asked = {
        "manifest": run / "skiplist.json", "data": rows, "rank": 2, "steps": 2, "save_every": 1,
        "model": str(tiny_folder("llama")), "device": "cpu", "accumulation": 1, "max_length": 128,
        "adapt": "model.layers.0", "out": tmp_path / "out",
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        finetune(**asked, progress=stop)
    other = copytree(run, tmp_path / "run")
    save_file(
        {k: 2 * t for k, t in load_file(run / correction.FILE_NAME).items()}, other / correction.FILE_NAME
    )
    noted, sha256 = RunFolder(other).notes.get("correction"), sha256_of(other / correction.FILE_NAME)
    assert noted is not None
    RunFolder(other).notes.put("correction", replace(noted, sha256=sha256))
    with pytest.raises(RunError, match=r"asked for otherwise \(correction\)"):
        finetune(**{**asked, "manifest": other / "skiplist.json"})
    done = finetune(**asked)
    assert (done.resumed_from, done.steps) == (1, 2)
    for a, b, right, left in adapters_and_corrections(run, done.out):
        assert torch.equal(a[2:], right) and torch.equal(b[:, 2:], left)
        assert b[:, :2].any()


def test_what_is_distilled_is_the_correction_alone_which_is_held_from_then_on(
    run: Path, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.training.distilled.RATE", 5e-3)
    rows = [{"prompt": f"what is {n}?", "answer": f"a coastal train {n}"} for n in range(18)]
    done = finetune(
        manifest=run / "skiplist.json", data=rows, rank=2, steps=1, distill=4,
        model=str(tiny_folder("llama")), device="cpu", accumulation=1, max_length=128,
        adapt="model.layers.0", out=tmp_path / "out",
    )  # fmt: skip
    assert done.distilled is not None and done.distilled.steps > 0
    for a, b, right, left in adapters_and_corrections(run, done.out):
        assert not torch.equal(a[2:], right)
        assert not torch.equal(b[:, 2:], left)
        assert not b[:, :2].any()  # the first step of a schedule has a rate of 0


def test_what_was_distilled_is_said_by_a_run_that_goes_on_too(run: Path, tiny_folder: Any, tmp_path: Path):
    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "train" and done == 2:
            raise KeyboardInterrupt

    rows = [{"prompt": f"what is {n}?", "answer": f"a coastal train {n}"} for n in range(18)]
    asked = {
        "manifest": run / "skiplist.json", "data": rows, "rank": 2, "steps": 2, "save_every": 1,
        "model": str(tiny_folder("llama")), "device": "cpu", "accumulation": 1, "max_length": 128,
        "adapt": "model.layers.0", "start": "zero", "distill": 1, "held_out": 0.0,
    }  # fmt: skip
    whole = finetune(**asked, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune(**asked, out=tmp_path / "out", progress=stop)
    done = finetune(**asked, out=tmp_path / "out")
    assert done.resumed_from == 1
    assert done.distilled == whole.distilled is not None


def test_the_start_that_is_left_open_is_zero_where_nothing_is_kept(run: Path, tmp_path: Path):
    manifest = read_manifest(run / "skiplist.json")
    asked = FinetuneOptions(run / "skiplist.json", data=None, out=tmp_path / "out")
    assert with_start(asked, manifest, run).start == "corrected"
    assert manifest.codes is not None
    notes = RunFolder(run).notes
    noted = notes.get("correction")
    cases = (
        (replace(asked, base="nf4"), manifest, run),
        (asked, replace(manifest, codes=None), run),
        (asked, replace(manifest, codes=replace(manifest.codes, sha256="0" * 64)), run),
        (asked, manifest, tmp_path),
    )
    assert [with_start(*x).start for x in cases] == ["zero"] * len(cases)
    sixteen = next(x.name for x in manifest.layers if not x.is_four_bit and "proj" in x.name)
    alone = replace(asked, adapt=sixteen, rank=2)
    assert with_start(alone, manifest, run).start == "zero"
    with pytest.raises(QprobeError, match="stay in 16-bit"):
        check_options(replace(alone, start="corrected"), manifest, run)
    try:
        notes.put("correction", replace(noted, sha256=None))
        assert with_start(asked, manifest, run).start == "zero"
        assert with_start(replace(asked, start="corrected"), manifest, run).start == "corrected"
    finally:
        notes.put("correction", noted)


def test_no_such_start_and_no_such_rank_are_refused_before_weights_are_read(
    loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.checkpoint.load.check_model", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(QprobeError, match="'loftq' is no start of an adapter"):
        loaded(start="loftq")
    with pytest.raises(QprobeError, match="--rank 0 makes no adapter"):
        loaded(start="zero", rank=0)
    with pytest.raises(QprobeError, match=r"--rank 1,000 is higher than that of any layer"):
        loaded(start="corrected", rank=1000)
    for asked in ({"rank": 8}, {"adapt": "all"}):
        with pytest.raises(QprobeError, match="without a start the model gets none"):
            loaded(**asked)


def test_what_is_no_correction_of_these_weights_is_one_sentence(run: Path, tmp_path: Path):
    manifest = read_manifest(run / "skiplist.json")
    assert manifest.codes is not None
    asked = FinetuneOptions(run / "skiplist.json", data=None, out=tmp_path / "out", start="corrected", rank=2)
    check_options(asked, manifest, run)
    with pytest.raises(QprobeError, match="--base is nf4"):
        check_options(replace(asked, base="nf4"), manifest, run)
    with pytest.raises(ManifestError, match="keeps no correction"):
        check_options(asked, manifest, tmp_path)
    with pytest.raises(ManifestError, match="needs calibrated weights"):
        check_options(asked, replace(manifest, codes=None), run)
    other = replace(manifest, codes=replace(manifest.codes, sha256="0" * 64))
    with pytest.raises(ManifestError, match="of other calibrated weights"):
        check_options(asked, other, run)
    notes = RunFolder(run).notes
    noted = notes.get("correction")
    try:
        notes.put("correction", replace(noted, sha256=None))
        with pytest.raises(ManifestError, match="no better than none on the samples"):
            check_options(asked, manifest, run)
    finally:
        notes.put("correction", noted)
    path = run / "correction.safetensors"
    before, data = sha256_of(path), path.read_bytes()
    try:
        path.write_bytes(data[:-1])
        with pytest.raises(ManifestError, match="is damaged"):
            check_options(asked, manifest, run)
        path.unlink()
        left_open = with_start(replace(asked, start=None), manifest, run)
        with pytest.raises(
            ManifestError, match=r"which the scan wrote, is missing. Put it back, or begin at"
        ):
            check_options(left_open, manifest, run)
    finally:
        path.write_bytes(data)
    assert sha256_of(path) == before
