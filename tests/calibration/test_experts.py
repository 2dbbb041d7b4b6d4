"""Fused experts are calibrated one by one, each by the tokens that it read, and stored as one weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import qprobe
from qprobe.calibration.codes import Readers, calibrate
from qprobe.calibration.experts.gram import at_once, gathered_experts
from qprobe.calibration.experts.rounding import TRANSPOSED, rounded_experts
from qprobe.calibration.gram import Gram
from qprobe.calibration.room import check_limit
from qprobe.checkpoint.experts.four_bit import codes_of_experts
from qprobe.formats.codes_file import open_codes
from qprobe.formats.nf4 import Nf4
from qprobe.inputs.batch import PAD
from qprobe.manifest.read import read_manifest
from qprobe.measure.attribution import walking
from qprobe.records import Sample, asked
from qprobe.runs.folder import RunFolder
from tests import mixtures
from tests.calibration.test_calibrate import subject_for
from tests.scanning.asked import options, scan
from tests.scanning.test_experts import ROWS

EXPERTS = "model.layers.0.mlp.experts"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
MANY = [
    {"prompt": f"what is {a} and {b}?", "answer": f"{b} {a} {row['answer']}"}
    for a, b, row in zip(WORDS * 2, WORDS[3:] + WORDS[:3] + WORDS, ROWS * 4, strict=True)
]


def slow_grams(subject: Any, batch: Any) -> tuple[dict[tuple[str, int], Tensor], dict[int, int]]:
    """By product and expert the sum over tokens, one by one, of what Mixtral's first experts read."""
    module = subject.model.get_submodule(EXPERTS)
    sums: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.tensor(0.0, dtype=torch.float64))
    tokens: dict[int, int] = defaultdict(int)
    kinds = batch.kinds.reshape(-1)

    def note(_: Any, args: tuple[Any, ...]) -> None:
        hidden, index, _weights = args
        for token, (x, chosen) in enumerate(zip(hidden, index, strict=True)):
            if kinds[token] == PAD:
                continue
            for expert in chosen.tolist():
                gate, up = (module.gate_up_proj[expert].float() @ x.float()).chunk(2)
                inner = (torch.nn.functional.silu(gate) * up).double()
                sums["gate_up_proj", expert] = sums["gate_up_proj", expert] + x.double().outer(x.double())
                sums["down_proj", expert] = sums["down_proj", expert] + inner.outer(inner)
                tokens[expert] += 1

    handle = module.register_forward_pre_hook(note)
    with torch.no_grad():
        subject.model(**batch.inputs)
    handle.remove()
    return sums, tokens


def test_each_expert_has_the_matrix_of_the_tokens_that_it_read(mixture: Callable[[str], Path]):
    subject = subject_for(mixture("mixtral"))
    samples = tuple(_sample(x) for x in ("one", "which of the two is the larger one, please?"))
    batch = subject.encode(samples).in_dtype(subject.path.dtype)
    assert bool((batch.kinds == PAD).any())  # the shorter one is padded
    names = [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"]
    with walking(subject.path):
        sums, tokens = slow_grams(subject, batch)
    found = gathered_experts(subject, names, [batch])
    for name in names:
        for expert, gram in enumerate(found[name]):
            wanted = sums[name.rpartition(".")[2], expert]
            assert gram.tokens == tokens[expert]
            assert torch.allclose(gram.total, wanted.expand_as(gram.total), rtol=1e-4, atol=1e-4)
    assert sum(tokens.values()) == 2 * int((batch.kinds != PAD).sum())
    twice = gathered_experts(subject, names[:1], [batch, batch])[names[0]]
    assert all(torch.allclose(a.total, 2 * b.total) for a, b in zip(twice, found[names[0]], strict=True))


def _sample(prompt: str) -> Any:
    return Sample(prompt, asked(prompt), answer="two")


def test_matrices_are_held_as_many_at_once_as_fit(mixture: Callable[[str], Path]):
    subject = subject_for(mixture("mixtral"))
    names = [x.name for x in subject.inventory.layers if x.experts]
    one = mixtures.EXPERTS * 64**2 * 8  # float64 on a CPU
    assert [len(x) for x in at_once(subject, names, 3 * one)] == [3, 1]
    assert [len(x) for x in at_once(subject, names, 1)] == [1, 1, 1, 1]


def test_a_memory_limit_below_the_matrices_of_all_experts_of_a_layer_is_refused_at_once(
    mixture: Callable[[str], Path],
):
    subject = subject_for(mixture("mixtral"))
    asked: list[tuple[int, str]] = []
    limited: Any = SimpleNamespace(
        inventory=subject.inventory,
        reference=subject.reference,
        path=subject.path,
        limit=SimpleNamespace(check=lambda needed, what: asked.append((needed, what))),
    )
    check_limit(limited)
    ((needed, what),) = asked
    fused = max((x for x in subject.inventory.layers if x.experts), key=lambda x: x.in_features)
    assert what == f"calibrating {fused.name}"
    assert needed > mixtures.EXPERTS * fused.in_features**2 * 8  # float64 on a CPU


@pytest.mark.parametrize("double_quant", [False, True])
def test_an_expert_is_rounded_as_alone_and_one_without_tokens_to_nearest(double_quant: bool):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, 64, generator=generator).bfloat16()
    x = torch.randn(3, 200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    counts = [200, 31, 32]  # 32 tokens are the fewest that are rounded for
    grams = [Gram(a[:n].T @ a[:n], n) for a, n in zip(x, counts, strict=True)]
    subject: Any = SimpleNamespace(dequantized=SimpleNamespace(own=lambda _: weight))
    found = rounded_experts(subject, "w", grams, Nf4(double_quant=double_quant), 2**20)
    assert found.nearest == 1 and found.tokens == sum(counts)
    assert found.whole.stored is not None and found.whole.error is not None and found.whole.error < 0.9
    w_hat, plain = found.whole.stored.packed().unpack(), Nf4(double_quant=False)
    assert w_hat.shape == weight.shape
    for expert in (0, 2):
        (alone,) = calibrate(Readers([weight[expert]], grams[expert].total, grams[expert].tokens), plain)
        assert alone.stored is not None
        near = 0.0 if not double_quant else 0.02  # scales are rounded once more
        wanted = alone.stored.packed().unpack().float()
        assert float((w_hat[expert].float() - wanted).abs().max()) <= near * float(wanted.abs().max())
    nearest = plain.pack(weight[1]).unpack().float()
    assert float((w_hat[1].float() - nearest).norm()) <= (0.02 if double_quant else 0.0) * float(
        nearest.norm()
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding", "no_pictures")
def test_a_calibrated_scan_counts_experts_and_its_weights_are_loaded(
    mixture: Callable[[str], Path], tmp_path: Path
):
    source = mixture("mixtral")
    found = scan(
        **options(source, tmp_path / "run", data=MANY, samples=16, format="nf4-calibrated", budget="+2%")
    )
    run = RunFolder(found.run)
    rows = run.units("calibration").set_index("layer")
    fused = [x.name for x in run.key.inventory.layers if x.experts]
    assert (rows.loc[fused, "why"] == "").any() and rows.loc[fused, "tokens"].gt(0).all()
    assert rows["nearest"].drop(fused).isna().all()
    partly = rows.loc[fused].query("nearest > 0 and why == ''")["nearest"].astype(int)
    table = run.table.set_index("layer")["rounding"]
    for name, count in partly.items():
        assert table[name] == f"calibrated, {count} of 4 experts to nearest"
    assert found.skiplist is not None
    manifest = read_manifest(found.skiplist)
    reasons = {x.name: x.reason for x in manifest.layers if x.is_four_bit}
    assert all(
        reasons[name].endswith(f"; {n} of 4 experts to nearest")
        for name, n in partly.items()
        if name in reasons
    )
    assert (f"{partly.sum()} of {4 * len(partly)} experts in" in found.verdict) == bool(len(partly))
    model, _ = qprobe.load_dynamic_4bit(found.skiplist, str(source), "cpu")
    with open_codes(found.run / "nf4-calibrated.safetensors") as file:
        held = [name for name in fused if name in file.layers and name in reasons]
        assert held
        for name in held:
            codes, _ = file.raw(name)
            assert torch.equal(codes_of_experts(model, name), codes)
            parent, _, leaf = name.rpartition(".")
            assert torch.equal(
                getattr(model.get_submodule(parent), leaf), file.stored(name, "cpu").packed().unpack()
            )

    qprobe.quantize(found.skiplist, tmp_path / "out", str(source), "cpu")
    again, _ = qprobe.load_dynamic_4bit(tmp_path / "out", device="cpu")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[x], after[x]) for x in before)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding", "no_pictures")
def test_transposed_experts_are_named(mixture: Callable[[str], Path], tmp_path: Path):
    found = scan(
        **options(mixture("llama4"), tmp_path / "run", data=ROWS, samples=4, format="nf4-calibrated", nodes=2)
    )
    table = RunFolder(found.run).table
    fused = table.loc[table["experts"].notna(), "rounding"]
    assert set(fused) == {f"nearest: {TRANSPOSED}"}
    assert any(TRANSPOSED in note for note in found.notes) and pd.notna(fused).all()
