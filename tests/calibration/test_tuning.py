"""Block scales tuned on the answers of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qprobe.calibration import tuning
from qprobe.calibration.tuning import _ScaledLinear, split_batches, tune
from qprobe.formats.nf4 import Nf4
from qprobe.loading.reference import load_reference
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec
from tests import tiny

TinyFolder = Callable[[str], Path]


def subject_for(folder: Path) -> Subject:
    return subject_of(load_reference(str(folder), "cpu"), FormatSpec())


def batches_of(subject: Subject, name: str, count: int) -> list:
    given = tiny.questions(name, count)
    samples = [replace(s, answer="the red bar, by two units" if i % 2 else "no") for i, s in enumerate(given)]
    return [subject.encode(group) for group in subject.groups(tuple(samples), 1)]


def nearest(subject: Subject) -> dict:
    return {name: Nf4().stored(module.weight) for name, module in subject.quantized_modules.items()}


@pytest.mark.parametrize("shape", [(6, 128), (5, 96), (3, 70)])  # the last two have blocks that straddle rows
def test_gradients_of_scales_and_inputs_equal_autograds(shape: tuple[int, int]):
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(4, 7, shape[1], requires_grad=True)
    bias, towards = torch.randn(shape[0]), torch.randn(4, 7, shape[0])
    packed = Nf4(double_quant=False).stored(weight).packed()
    scales = packed.state.absmax.clone().requires_grad_()
    _ScaledLinear.apply(x, scales, packed, bias).backward(towards)
    found, found_x, x.grad = scales.grad, x.grad.clone(), None
    # The oracle reads codes by hand and lets autograd do the rest.
    codes = torch.stack([packed.codes.reshape(-1) >> 4, packed.codes.reshape(-1) & 15], dim=1).reshape(-1)
    values = packed.state.code[codes[: weight.numel()].long()]
    own = packed.state.absmax.clone().requires_grad_()
    w_hat = (values * own.repeat_interleave(64)[: weight.numel()]).view(shape)
    F.linear(x, w_hat, bias).backward(towards)
    torch.testing.assert_close(found, own.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_x, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mllama", "bert"])
def test_tuned_scales_do_less_damage_on_samples_kept_back_and_codes_stay(name: str, tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder(name))
    batches, given = batches_of(subject, name, 8), nearest(subject)
    training, kept_back = batches, batches[-2:]  # also trained on: a tiny model learns nothing of others
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    found = tune(subject, given, training, kept_back, 24, Nf4())
    assert found.is_better and found.after < 0.9 * found.before and found.step > 0
    for layer, one in found.stored.items():
        assert torch.equal(one.codes, given[layer].codes)
        assert one.state.absmax.shape == given[layer].state.absmax.shape and one.state.nested
    after = subject.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_tuning_that_does_not_help_the_samples_kept_back_gives_back_what_it_was_given(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tuning, "RATE", 3.0)  # wild steps
    subject = subject_for(tiny_folder("llama"))
    batches, given = batches_of(subject, "llama", 4), nearest(subject)
    found = tune(subject, given, batches[:2], batches[2:], 8, Nf4())
    assert not found.is_better and found.after == found.before and found.step == 0
    assert found.stored is given


def test_a_loss_that_is_not_finite_ends_tuning(tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch):
    subject = subject_for(tiny_folder("llama"))
    batches, given = batches_of(subject, "llama", 4), nearest(subject)
    losses = iter([inf])
    monkeypatch.setattr(tuning._Tuning, "descend", lambda *_: next(losses))
    found = tune(subject, given, batches[:2], batches[2:], 8, Nf4())
    assert found.after <= found.before


def test_blocks_that_run_again_give_the_same_scales(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    tight = replace(subject)
    vars(tight)["path"] = replace(subject.path, room_bytes=0)
    batches, given = batches_of(subject, "llama", 4), nearest(subject)
    kept, again = (tune(one, given, batches[:3], batches[:1], 6, Nf4()) for one in (subject, tight))
    assert kept.step == again.step > 0
    for layer, one in kept.stored.items():
        assert torch.equal(one.state.absmax, again.stored[layer].state.absmax)


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (7, [6]), (8, [7]), (20, [7, 15])])
def test_one_batch_of_eight_is_kept_back_and_one_at_least(count: int, kept: list[int]):
    batches = [object() for _ in range(count)]
    training, held = split_batches(batches)
    assert held == [batches[i] for i in kept]
    assert training == [b for i, b in enumerate(batches) if i not in kept]
