"""Adapters that train side by side are what each would be by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qprobe.checkpoint.ready import adapted_linears
from qprobe.loading.reference import load_reference
from qprobe.measure.subject import subject_of
from qprobe.options import DEFAULT_ADAPT
from qprobe.records import FormatSpec
from tests.benchmarks.starts.bases import Asked, Task, base_weights, corrections, prepared
from tests.benchmarks.starts.lanes import Lanes, loftq_start, train, zero_start
from tests.calibration.test_calibrate import samples_of

RANK, STEPS, RATE = 4, 3, 1e-2


@pytest.fixture
def model(tiny_folder: Any) -> Any:
    return load_reference(str(tiny_folder("llama")), "cpu").model.float()


def batch(seed: int) -> dict[str, Tensor]:
    """Two lines of 10 tokens, of which the last 4 and 3 are learned."""
    ids = torch.randint(20, 300, (2, 10), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    labels[0, 6:], labels[1, 7:] = ids[0, 6:], ids[1, 7:]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def by_lane(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.cat([x, second[key]]) for key, x in first.items()}


def test_a_lane_computes_with_its_own_adapter_alone(model: Any):
    names = adapted_linears(model, DEFAULT_ADAPT, None).names
    torch.manual_seed(0)
    begun = [zero_start(model, names, RANK, seed) for seed in (0, 1)]
    adapters = [{n: (a, 0.1 * torch.randn_like(b)) for n, (a, b) in x.items()} for x in begun]
    lanes = Lanes(model, names, RANK, 2)
    for number, adapter in enumerate(adapters):
        lanes.set(number, adapter)
    one, two = batch(0), batch(1)
    found = lanes.losses(by_lane(one, two)).detach()
    by_line = lanes.line_losses(one)
    lanes.remove()
    assert not any("lane_" in n for n, _ in model.named_parameters())
    for number, (adapter, inputs) in enumerate(zip(adapters, (one, two), strict=True)):
        before = {n: model.get_submodule(n).weight.detach().clone() for n in names}
        for n, (a, b) in adapter.items():
            model.get_submodule(n).weight.data += b @ a
        with torch.no_grad():
            assert float(found[number]) == pytest.approx(float(model(**inputs).loss), rel=1e-5)
            alone = {key: x[:1] for key, x in one.items()}
            assert by_line[number][0] == pytest.approx(float(model(**alone).loss), rel=1e-5)
        for n, weight in before.items():
            model.get_submodule(n).weight.data = weight


def test_lanes_that_train_side_by_side_end_where_each_ends_with_torchs_own_clipping(model: Any):
    names = adapted_linears(model, DEFAULT_ADAPT, None).names
    begun = [zero_start(model, names, RANK, seed) for seed in (0, 1)]
    data = [[batch(10 * lane + step) for step in range(STEPS)] for lane in (0, 1)]
    together = Lanes(model, names, RANK, 2)
    for number, adapter in enumerate(begun):
        together.set(number, adapter)
    batches = (by_lane(*x) for x in zip(*data, strict=True))
    assert list(train(together, batches, STEPS, RATE, 1)) == [0, 1, 2, 3]
    found = [together.adapter(number) for number in (0, 1)]
    together.remove()
    for number in (0, 1):
        alone = Lanes(model, names, RANK, 1)
        alone.set(0, begun[number])
        optimizer = torch.optim.AdamW(alone.parameters, weight_decay=0.0)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * min(step + 1, (STEPS - step) / (STEPS - 1))
            optimizer.zero_grad()
            model(**data[number][step]).loss.backward()
            torch.nn.utils.clip_grad_norm_(alone.parameters, 1.0)
            optimizer.step()
        for name, (a, b) in alone.adapter(0).items():
            torch.testing.assert_close(found[number][name][0], a, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found[number][name][1], b, rtol=1e-3, atol=1e-4)
            assert bool(b.any())
        alone.remove()


@pytest.mark.slow
def test_the_calibrated_base_of_the_study_is_calibrated_and_leaves_the_matrices(tiny_folder: Any):
    folder = str(tiny_folder("llama"))
    subject = subject_of(load_reference(folder, "cpu"), FormatSpec())
    samples = samples_of("llama")
    task = Task(subject, folder, samples, samples, samples, samples)
    given = prepared(task)
    asked = Asked("llama", "calibrated", "cpu", (0,), 1, 1, 1, 4, 4, Path())
    calibrated, nearest = (base_weights(task, replace(asked, base=x), given) for x in ("calibrated", "nf4"))
    assert calibrated.keys() == nearest.keys() == subject.quantized
    assert not any(torch.equal(calibrated[n], nearest[n]) for n in nearest)
    assert all(bool(x.total.any()) for x in given.gathering.grams.values())
    residuals = {n: subject.modules[n].weight.float() - w.float() for n, w in calibrated.items()}
    assert corrections(residuals, given).keys() == residuals.keys()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_start_of_loftq_is_the_product_that_peft_finds(shape: tuple[int, int]):
    from peft.utils.loftq_utils import _low_rank_decomposition

    residual = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b = loftq_start(residual, RANK)
    theirs = _low_rank_decomposition(residual, reduced_rank=RANK)
    torch.testing.assert_close(b @ a, theirs["L"] @ theirs["R"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.norm(), theirs["R"].norm(), rtol=1e-4, atol=1e-5)
