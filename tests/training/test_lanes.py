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
from tests.benchmarks.starts.lanes import Begun, Lanes, loftq_start, train, zero_start
from tests.benchmarks.starts.variants import beginning
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


def test_rows_learn_at_their_own_pace_as_in_parameter_groups_of_their_own(model: Any):
    names = adapted_linears(model, DEFAULT_ADAPT, None).names
    torch.manual_seed(0)
    drawn = zero_start(model, names, RANK, 0)
    adapter = {n: (a, 0.1 * torch.randn_like(b)) for n, (a, b) in drawn.items()}
    half, kept = torch.full((RANK,), 0.5), torch.tensor([1.0, 1.0, 0.0, 0.0])
    lanes = Lanes(model, names, RANK, 1)
    lanes.begin(0, Begun(adapter, dict.fromkeys(names, (half, kept))))
    list(train(lanes, iter([batch(0)]), 1, RATE, 1))
    found = lanes.adapter(0)
    lanes.set(0, adapter)
    a, b = lanes.parameters[: len(names)], lanes.parameters[len(names) :]
    groups = [{"params": a, "lr": RATE / 2}, {"params": b, "lr": RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    optimizer.zero_grad()
    lanes.losses(batch(0)).sum().backward()
    for x in b:
        assert x.grad is not None
        x.grad[..., 2:] = 0
    torch.nn.utils.clip_grad_norm_(lanes.parameters, 1.0)
    optimizer.step()
    for name, (found_a, found_b) in found.items():
        alone_a, alone_b = lanes.adapter(0)[name]
        torch.testing.assert_close(found_a, alone_a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_b, alone_b, rtol=1e-4, atol=1e-4)
        assert torch.equal(found_b[:, 2:], adapter[name][1][:, 2:])
    lanes.remove()


@pytest.mark.parametrize("start", ["zero", "loftq", "corrected", "balanced", "slow-a", "frozen-a"])
def test_a_variant_begins_at_its_product_and_trains_what_it_says(start: str):
    torch.manual_seed(0)
    fresh, product = (torch.randn(16, 40), torch.zeros(24, 16)), (torch.randn(16, 40), torch.randn(24, 16))
    found = beginning(start, {"l": fresh}, {"corrected": {"l": product}, "loftq": {"l": product}})
    (a, b), (pace_a, pace_b) = found.adapter["l"], found.pace["l"]
    wanted = torch.zeros(24, 40) if start == "zero" else product[1] @ product[0]
    torch.testing.assert_close(b @ a, wanted, rtol=1e-4, atol=1e-4)
    assert not pace_a[16:].any() and not pace_b[16:].any() and bool((pace_b[:16] == 1).all())
    if start in ("zero", "corrected"):
        assert torch.equal(a[:16], fresh[0]) and not b[:, :16].any()
    if start in ("balanced", "slow-a", "frozen-a"):
        torch.testing.assert_close(a[:16] @ a[:16].T, torch.eye(16) / 3, rtol=1e-4, atol=1e-5)
    ratio = {"slow-a": float(a.norm() / b.norm()), "frozen-a": 0.0}.get(start, 1.0)
    assert ratio <= 1 and pace_a[:16].tolist() == pytest.approx([ratio] * 16)


@pytest.mark.slow
def test_the_calibrated_base_of_the_study_is_calibrated_and_leaves_the_matrices(tiny_folder: Any):
    folder = str(tiny_folder("llama"))
    subject = subject_of(load_reference(folder, "cpu"), FormatSpec())
    samples = samples_of("llama")
    task = Task(subject, folder, samples, samples, samples, samples)
    given = prepared(task)
    asked = Asked("llama", "calibrated", "cpu", (0,), 1, 1, 1, 4, 4, 4, 4, 8, Path())
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
