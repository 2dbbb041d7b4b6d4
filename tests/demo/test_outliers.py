from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from qprobe.demo.evaluate import inputs, score
from qprobe.demo.outliers import PLANTED, outliers_folder, planted_layers
from qprobe.demo.scenes import CALIBRATION_SEED, scenes
from qprobe.errors import MachineError
from qprobe.inputs.batch import Batch
from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import attribute
from qprobe.measure.kl import ANSWERS, in_four_bit, read_out
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec
from tests.demo.conftest import answers_of, load

NODES = 6  # on these scenes 2 nodes miss the KL by 9.9 %, 4 by 2.2 %, 6 by 0.7 %


def round_trip(weight: Tensor) -> Tensor:
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    return dequantize_4bit(codes, state).to(weight.dtype)


def linears(model: Any) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def in_nf4(model: Any, keep: tuple[str, ...] = ()) -> Any:
    model_hat = copy.deepcopy(model)
    with torch.no_grad():
        for name, linear in linears(model_hat).items():
            if name not in keep:
                linear.weight.copy_(round_trip(linear.weight))
    return model_hat


@pytest.fixture(scope="module")
def planted(outliers: Path) -> Any:
    return load(outliers)


@pytest.fixture(scope="module")
def subject(outliers: Path) -> Subject:
    reference = load_reference(str(outliers), "cpu")
    reference.model.float()  # the same weights; bf16 arithmetic is nine times slower on most processors
    return subject_of(reference, FormatSpec())


@pytest.fixture(scope="module")
def calibration(subject: Subject) -> list[Batch]:
    return [subject.encode(tuple(scenes(16, CALIBRATION_SEED)))]


def ends(subject: Subject, batch: Batch, names: frozenset[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Answer logits of the 16-bit model, and with the linears `names` in 4-bit."""
    with torch.inference_mode():
        plain = read_out(subject.model, batch)
        with in_four_bit(subject.modules, subject.dequantized, names):
            return plain, read_out(subject.model, batch)


@pytest.mark.slow
def test_16_bit_logits_are_bit_identical(demo: Any, planted: Any, processor: Any):
    batch = inputs(processor, scenes(8, CALIBRATION_SEED))
    with torch.inference_mode():
        assert torch.equal(demo(**batch).logits, planted(**batch).logits)


def test_weights_differ_only_in_the_planted_rows_and_columns(demo: Any, planted: Any):
    touched = {f"{name}.weight" for p in PLANTED for name in (p.layer, p.feeder)}
    theirs = dict(demo.named_parameters())
    changed = {n for n, p in planted.named_parameters() if not torch.equal(p, theirs[n])}
    assert changed == touched


def test_planted_columns_stand_out_and_every_block_has_one(planted: Any):
    for planting in PLANTED:
        peaks = planted.get_submodule(planting.layer).weight.detach().float().abs().amax(0)
        columns = planting.columns()
        others = torch.ones_like(peaks, dtype=torch.bool)
        others[columns] = False
        assert float(peaks[columns].min() / peaks[others].median()) > 8
        assert {c // 64 for c in columns} == set(range(len(peaks) // 64))


@pytest.mark.slow
def test_nf4_loses_a_fifth_of_the_facts_and_keeping_the_planted_layers_wins_them_back(
    planted: Any, processor: Any, held_out: list, demo_answers: list[str]
):
    # The 16-bit model answers as the demo does: its logits are bit-identical.
    def share(model: Any) -> float:
        return score(held_out, answers_of(model, processor, held_out)).share

    reference = score(held_out, demo_answers).share
    loss = reference - share(in_nf4(planted))
    kept = reference - share(in_nf4(planted, keep=planted_layers()))
    # On 400 scenes NF4 loses 22.6 points of facts, and 0.2 are left.
    assert 0.18 <= loss <= 0.35
    assert (loss - kept) / loss >= 0.90


def test_planted_layers_fit_into_seven_percent(planted: Any):
    quantized = {f"{n}.weight": p.weight.numel() for n, p in linears(planted).items()}
    bytes_4bit = {n: count / 2 + count / 64 + 4 * -(-count // (64 * 256)) for n, count in quantized.items()}
    total = sum(bytes_4bit.get(n, 2 * p.numel()) for n, p in planted.named_parameters())
    extra = sum(2 * quantized[f"{n}.weight"] - bytes_4bit[f"{n}.weight"] for n in planted_layers())
    assert extra / total < 0.07


@pytest.mark.slow
def test_planted_layers_head_the_ranking_by_activation_error(
    planted: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
):
    sums: dict[str, list[float]] = {}
    handles = []
    for name, linear in linears(planted).items():
        error = round_trip(linear.weight.detach()).float() - linear.weight.detach().float()

        def observe(module: Any, args: Any, y: Tensor, name: str = name, error: Tensor = error) -> None:
            noise = (args[0].float() @ error.T).double().square().sum()
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float(noise)
            total[1] += float(y.double().square().sum())

        handles.append(linear.register_forward_hook(observe))
    with torch.inference_mode():
        planted(**inputs(processor, scenes(16, CALIBRATION_SEED)))
    for handle in handles:
        handle.remove()
    nmse = {name: noise / signal for name, (noise, signal) in sums.items()}
    ranking = sorted(nmse, key=nmse.__getitem__, reverse=True)
    assert set(ranking[: len(PLANTED)]) == set(planted_layers())
    assert nmse[ranking[len(PLANTED) - 1]] > 10 * nmse[ranking[len(PLANTED)]]


@pytest.mark.slow
def test_planted_layers_stand_in_three_towers_and_in_no_fused_group(subject: Subject):
    layers = [subject.layers[name] for name in planted_layers()]
    assert {x.tower for x in layers} == {"vision", "cross_attention", "language"}
    assert all(x.group == x.name for x in layers)


@pytest.mark.slow
def test_each_planted_layer_hurts_alone_and_more_than_all_others_together(
    subject: Subject, calibration: list[Batch]
):
    def kl(names: frozenset[str]) -> float:
        frames = [ANSWERS.sums(*ends(subject, batch, names)) for batch in calibration]
        sums = [s for frame in frames for s in frame]
        return sum(s.kl for s in sums) / sum(s.tokens for s in sums)

    alone = [kl(frozenset([name])) for name in planted_layers()]
    others = kl(subject.quantized - {*planted_layers()})
    assert min(alone) > 10 * others
    assert max(alone) < 3 * min(alone)  # none is hidden behind another


@pytest.mark.slow
def test_planted_layers_head_the_ranking_by_attribution(subject: Subject, calibration: list[Batch]):
    results = [attribute(subject.path, b, nodes=NODES, tolerance=float("inf")) for b in calibration]
    shares = pd.concat([r.rows for r in results]).groupby("layer").kl_sum.sum().sort_values(ascending=False)
    total = sum(s.kl for r in results for s in r.kl)
    first = len(PLANTED)
    assert set(shares.index[:first]) == set(planted_layers())
    assert shares.iloc[first - 1] > 10 * shares.iloc[first] > 0
    assert shares.sum() == pytest.approx(total, rel=0.02)


def test_the_cached_folder_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = outliers_folder()
    assert first.parent == tmp_path / "qprobe"
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert outliers_folder() == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert [f.name for f in first.parent.iterdir()] == [first.name]  # no temporary folder is left
    assert not (first / "training.json").exists()


def test_another_table_makes_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = outliers_folder()
    monkeypatch.setattr("qprobe.demo.outliers.PLANTED", PLANTED[:1])
    assert outliers_folder() != first


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="XDG_CACHE_HOME"):
        outliers_folder()
