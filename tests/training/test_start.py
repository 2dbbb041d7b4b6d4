"""An adapter may begin at the correction that calibration left, and at no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qprobe import answer_collator
from qprobe.calibration import correction
from qprobe.calibration.gptq import metric_of
from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.checkpoint.starts.balanced import SQUARED_ROW, balanced
from qprobe.checkpoint.starts.corrected import correction_of, start_corrected
from qprobe.errors import ManifestError, QprobeError
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


@pytest.mark.parametrize("rank", [2, 6])
def test_the_adapter_starts_at_the_kept_factors(rank: int, run: Path, tiny_folder: Any):
    import peft

    from qprobe.checkpoint.ready import lora_targets
    from qprobe.training.bases import load_base

    model, _ = load_base(run / "skiplist.json", "dynamic", str(tiny_folder("llama")), "cpu")
    config = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=lora_targets(model))
    tuned = peft.get_peft_model(model, config)
    with correction_of(read_manifest(run / "skiplist.json"), run) as factors:
        started = start_corrected(tuned, factors)
    kept = {k: t.float() for k, t in load_file(run / "correction.safetensors").items()}
    manifest = read_manifest(run / "skiplist.json")
    four_bit = {x.name for x in manifest.layers if x.is_four_bit}
    assert started and set(started) <= four_bit
    for name in four_bit:
        layer = tuned.get_base_model().get_submodule(name)
        added = layer.get_delta_weight("default")
        r = min(rank, 4)
        wanted = kept[f"{name}.left"][:, :r] @ kept[f"{name}.right"][:r]
        assert torch.allclose(added, wanted, rtol=1e-5, atol=1e-5) and added.any()
    for name in {x.name for x in manifest.layers if not x.is_four_bit and x.name != "lm_head"}:
        assert not tuned.get_base_model().get_submodule(name).get_delta_weight("default").any()


@pytest.mark.parametrize(("rank", "kept"), [(4, 4), (4, 2), (8, 8)])
def test_balanced_factors_have_the_same_product_and_the_sizes_of_a_fresh_adapter(rank: int, kept: int):
    torch.manual_seed(0)
    sizes = torch.logspace(2, -2, rank)[:, None] * (torch.arange(rank) < kept)[:, None]
    a, b = 1e-3 * sizes * torch.randn(rank, 64), 10 * torch.randn(48, rank)
    left, right = balanced(b, a)
    torch.testing.assert_close(left @ right, b @ a, rtol=1e-5, atol=1e-5 * float((b @ a).abs().max()))
    torch.testing.assert_close(right @ right.T, torch.eye(rank) / 3, rtol=1e-5, atol=1e-6)


def test_a_fresh_adapter_of_peft_has_rows_of_the_length_that_is_taken():
    import peft

    torch.manual_seed(0)
    plain: Any = torch.nn.Sequential(torch.nn.Linear(64, 48))
    tuned: Any = peft.get_peft_model(plain, peft.LoraConfig(r=1024, target_modules="0"))
    drawn = tuned.base_model.model[0].lora_A["default"].weight.detach()
    assert float(drawn.square().sum(1).mean()) == pytest.approx(SQUARED_ROW, rel=0.03)


def test_more_directions_than_inputs_stay_as_they_are():
    left, right = torch.randn(5, 4), torch.randn(4, 3)
    assert balanced(left, right) == (left, right)


def test_a_step_moves_a_corrected_adapter_as_far_as_one_that_begins_at_zero():
    # The factors of the decomposition carry the sizes of inputs and the number of tokens: a step moves their
    # product many times as far.
    torch.manual_seed(0)
    inputs, rank = 4 * torch.randn(16384, 64), 8
    error = 3e-3 * torch.randn(48, 64)
    metric = metric_of(inputs.T @ inputs)
    assert metric is not None
    left, right = correction.best_correction(error, metric, rank)
    drawn = torch.nn.init.kaiming_uniform_(torch.empty(rank, 64), a=5**0.5)
    moved = [one_step(*x) for x in ((torch.zeros(48, rank), drawn), balanced(left, right), (left, right))]
    assert 0.7 < moved[1] / moved[0] < 1.4 and moved[2] > 5 * moved[0]


def one_step(left: torch.Tensor, right: torch.Tensor) -> float:
    """How far a step of Adam moves the product, down a gradient that has no direction of its own."""
    factors = [x.clone().requires_grad_() for x in (left, right)]
    gradient = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(factors, lr=2e-4)
    ((factors[0] @ factors[1]) * gradient).sum().backward()
    optimizer.step()
    return float((factors[0] @ factors[1] - left @ right).detach().norm())


@pytest.fixture
def loaded(run: Path, tiny_folder: Any) -> Callable[..., tuple[Any, Any]]:
    return partial(load_dynamic_4bit, run / "skiplist.json", str(tiny_folder("llama")), "cpu")


def test_the_loader_attaches_the_adapter_that_was_asked_for(run: Path, loaded: Callable[..., Any]):
    kept = {k: t.float() for k, t in load_file(run / "correction.safetensors").items()}
    four_bit = {x.name for x in read_manifest(run / "skiplist.json").layers if x.is_four_bit}
    asked = {"rank": 4, "adapt": "model.layers.0"}
    corrected, zero = (loaded(start=x, **asked)[0] for x in ("corrected", "zero"))
    for tuned in (corrected, zero):
        config = tuned.peft_config["default"]
        assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 4, 0)
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
        a = corrected.get_base_model().get_submodule(name).lora_A["default"].weight
        torch.testing.assert_close(a @ a.T, torch.eye(4) / 3, rtol=1e-5, atol=1e-6)
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
    moved = {n for n, p in after.items() if not torch.equal(p.float(), begun[n].bfloat16().float())}
    assert moved >= {n for n in after if "lora_B" in n}


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
    learned = load_file(corrected.out / "adapter_model.safetensors")  # one step from the balanced factors
    for layer in (x.name for x in read_manifest(run / "skiplist.json").layers if x.is_four_bit):
        a = learned[f"base_model.model.{layer}.lora_A.weight"]
        torch.testing.assert_close(a @ a.T, torch.eye(4) / 3, rtol=0, atol=0.02)
    assert "from the correction" in (corrected.out / "README.md").read_text()


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
        with pytest.raises(ManifestError, match="keeps no correction"):
            check_options(asked, manifest, run)
    finally:
        path.write_bytes(data)
    assert sha256_of(path) == before
