"""Block scales tuned on the answers of the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qprobe.calibration import damage, tuning
from qprobe.calibration.codes import unpacked_codes
from qprobe.calibration.columns.grid import nf4_grid
from qprobe.calibration.damage import References, split_samples
from qprobe.calibration.tuned_linear import TunedLinear, nearest_codes, units_of
from qprobe.calibration.tuning import Given, tune
from qprobe.errors import MachineError
from qprobe.formats.nf4 import Nf4, PackedNf4
from qprobe.inputs.batch import Batch
from qprobe.loading.reference import load_reference
from qprobe.measure import memory
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject, limited_subject, subject_of
from qprobe.records import FormatSpec, Sample, asked
from tests import tiny

TinyFolder = Callable[[str], Path]


def subject_for(folder: Path) -> Subject:
    return subject_of(load_reference(str(folder), "cpu"), FormatSpec())


def batches_of(subject: Subject, name: str, count: int, at_once: int = 1) -> list:
    given = tiny.questions(name, count)
    samples = [replace(s, answer="the red bar, by two units" if i % 2 else "no") for i, s in enumerate(given)]
    return [subject.encode(group) for group in subject.groups(tuple(samples), at_once)]


def nearest(subject: Subject) -> dict:
    return {name: Nf4().stored(module.weight) for name, module in subject.quantized_modules.items()}


def by_hand(packed: PackedNf4, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What `codes` (n,) read as under the block scales `scales`, of autograd's own operations."""
    values = packed.state.code.double()[codes.long()]
    return (values * scales.repeat_interleave(64)[: len(codes)]).view(packed.state.shape)


@pytest.mark.parametrize("shape", [(6, 128), (5, 96), (3, 70)])  # the last two have blocks that straddle rows
@pytest.mark.parametrize("with_codes", [False, True])
def test_gradients_of_scales_codes_and_inputs_equal_autograds(shape: tuple[int, int], with_codes: bool):
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(4, 7, shape[1], requires_grad=True)
    bias, towards = torch.randn(shape[0]), torch.randn(4, 7, shape[0])
    packed = Nf4(double_quant=False).stored(weight).packed()
    codes = unpacked_codes(packed.codes, weight.numel())
    scales = packed.state.absmax.clone().requires_grad_()
    units: torch.Tensor | None = None
    if with_codes:
        units = (codes + torch.rand(len(codes)) * 0.9 - 0.45).requires_grad_()
    TunedLinear.apply(x, scales, units, packed, bias).backward(towards)
    assert scales.grad is not None and x.grad is not None
    found, found_x = scales.grad, x.grad
    own, own_x = packed.state.absmax.double().requires_grad_(), x.detach().double().requires_grad_()
    F.linear(own_x, by_hand(packed, codes, own), bias.double()).backward(towards.double())
    torch.testing.assert_close(found.double(), own.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_x.double(), own_x.grad, rtol=1e-4, atol=1e-4)
    if units is not None:
        assert units.grad is not None
        # Straight through: the slope of the line between the two values around a unit, at what is read.
        values, slope = packed.state.code.double(), units.detach().double().requires_grad_()
        below = slope.detach().floor().clamp(0, 14).long()
        line = values[below] + (slope - below) * (values[below + 1] - values[below])
        line = line + (values[codes.long()] - line).detach()
        w_hat = (line * own.detach().repeat_interleave(64)[: len(codes)]).view(shape)
        F.linear(own_x.detach(), w_hat, bias.double()).backward(towards.double())
        torch.testing.assert_close(units.grad.double(), slope.grad, rtol=1e-4, atol=1e-4)


def test_units_lie_where_the_weights_lie_but_near_the_codes_they_have():
    # Values of NF4 around 0: code 7 is 0, code 8 is 0.0796. A weight of 0.5 x 0.0796 is half way.
    value = float(nf4_grid(torch.device("cpu")).values[8])
    weight = 2 * torch.tensor([0.0, 0.25 * value, 0.75 * value, 1.0, -1.0, 1.5])
    codes = torch.tensor([7, 7, 7, 15, 0, 15], dtype=torch.uint8)
    found = units_of(weight, codes, torch.full((6,), 2.0), 0.4)
    torch.testing.assert_close(found, torch.tensor([7.0, 7.25, 7.4, 15.0, 0.0, 15.4]))
    assert nearest_codes(found).tolist() == codes.tolist()
    # A scale of 0 reads as zeros whatever the codes.
    assert nearest_codes(units_of(weight, codes, torch.zeros(6), 0.4)).tolist() == codes.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mllama", "bert"])
def test_tuned_scales_do_less_damage_on_samples_kept_back_and_codes_stay(name: str, tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder(name))
    batches, given = batches_of(subject, name, 8), nearest(subject)
    training, kept_back = batches, batches[-2:]  # also trained on: a tiny model learns nothing of others
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    found = tune(subject, given, Given(training, kept_back), 24, Nf4())
    assert found.is_better and found.after < 0.9 * found.before and found.step > 0
    for layer, one in found.stored.items():
        assert torch.equal(one.codes, given[layer].codes)
        assert one.state.absmax.shape == given[layer].state.absmax.shape and one.state.nested
    after = subject.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.slow
def test_codes_move_with_the_scales_where_that_is_asked_for(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tuning, "UNIT_RATE", 0.05)  # so that few steps reach a boundary
    subject = subject_for(tiny_folder("llama"))
    batches, given = batches_of(subject, "llama", 8), nearest(subject)
    found = tune(subject, given, Given(batches, batches[-2:]), 24, Nf4(), codes_from=0.25)
    assert found.is_better and found.after < 0.9 * found.before
    counts = [module.weight.numel() for module in subject.quantized_modules.values()]
    moved = [
        unpacked_codes(found.stored[layer].codes, n).int() - unpacked_codes(one.codes, n).int()
        for (layer, one), n in zip(given.items(), counts, strict=True)
    ]
    assert 0 < sum(int((m != 0).sum()) for m in moved) < 0.2 * sum(counts)
    assert max(int(m.abs().max()) for m in moved) <= 2


def test_codes_go_back_with_a_snapshot_also_to_before_they_moved(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    under_way = tuning._Tuning(subject, nearest(subject), Nf4())
    before = under_way.snapshot()
    under_way.free_codes()
    at_first = under_way.snapshot()
    name = next(iter(under_way.units))
    for kept in (before, at_first):
        with torch.no_grad():
            under_way.units[name] += 3
            under_way.logarithms[name] += 1
        under_way.restore(kept)
        found = under_way.finished()[name]
        assert torch.equal(found.codes, under_way.stored[name].codes)
        assert not under_way.logarithms[name].any()


def test_codes_of_large_or_streamed_models_stay(tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch):
    subject = subject_for(tiny_folder("llama"))
    codes = sum(module.weight.numel() for module in subject.quantized_modules.values())
    assert tuning.can_move_codes(subject)
    monkeypatch.setattr(tuning, "free_memory", lambda _: tuning.CODE_BYTES * codes)
    assert not tuning.can_move_codes(subject)
    monkeypatch.undo()
    large = replace(subject)
    vars(large)["path"] = replace(subject.path, dtype=torch.bfloat16)
    assert not tuning.can_move_codes(large)


def test_a_step_of_a_large_model_runs_two_samples_and_one_of_a_small_model_whole_batches(
    tiny_folder: TinyFolder,
):
    subject = subject_for(tiny_folder("llama"))
    samples = tuple(Sample(f"s{i}", asked("hello"), answer="a cat") for i in range(7))
    groups = [samples[:4], samples[4:]]
    assert tuning.tuned_together(subject, groups) == groups
    large = replace(subject)
    vars(large)["path"] = replace(subject.path, dtype=torch.bfloat16)
    found = tuning.tuned_together(large, groups)
    assert [len(group) for group in found] == [2, 2, 2, 1]
    assert [s.id for group in found for s in group] == [s.id for s in samples]


@pytest.mark.slow
def test_tuning_that_does_not_help_the_samples_kept_back_gives_back_what_it_was_given(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tuning, "RATE", 3.0)  # wild steps
    subject = subject_for(tiny_folder("llama"))
    batches, given = batches_of(subject, "llama", 4), nearest(subject)
    found = tune(subject, given, Given(batches[:2], batches[2:]), 8, Nf4())
    assert not found.is_better and found.after == found.before and found.step == 0
    assert found.tried > found.before
    assert found.stored is given


def test_samples_kept_back_are_looked_at_eight_times_on_the_way(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    looks: list[int] = []
    steps: list[int] = []
    monkeypatch.setattr(tuning._Tuning, "damage", lambda *_: (looks.append(len(steps)), 1.0 / len(looks))[1])
    monkeypatch.setattr(tuning._Tuning, "descend", lambda *_: (steps.append(1), 1.0)[1])
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    subject = subject_for(tiny_folder("llama"))
    found = tune(subject, nearest(subject), Given(batches_of(subject, "llama", 2), []), 19, Nf4())
    # Before, after every second of 19 steps and the last one, and once more as it is read back.
    assert looks == [0, *range(2, 19, 2), 19, 19]
    assert found.step == 19


def test_a_loss_that_is_not_finite_ends_tuning(tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch):
    subject = subject_for(tiny_folder("llama"))
    batches, given = batches_of(subject, "llama", 4), nearest(subject)
    losses = iter([inf])
    monkeypatch.setattr(tuning._Tuning, "descend", lambda *_: next(losses))
    found = tune(subject, given, Given(batches[:2], batches[2:]), 8, Nf4())
    assert found.after <= found.before and found.tried == inf


@pytest.mark.slow
def test_the_16bit_model_answers_a_batch_once_where_there_is_room_and_scales_are_the_same(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    subject = subject_for(tiny_folder("llama"))
    batches, answered = batches_of(subject, "llama", 4), []
    original = damage.reference_outputs

    def counting(subject: Subject, batch: Batch) -> list[torch.Tensor]:
        answered.append(batch)
        return original(subject, batch)

    monkeypatch.setattr(damage, "reference_outputs", counting)
    found, runs = [], []
    for room in (2**30, 0):
        monkeypatch.setattr(tuning, "REFERENCE_BYTES", room)
        answered.clear()
        found.append(tune(subject, nearest(subject), Given(batches[:4], batches[:2]), 8, Nf4()))
        runs.append(len(answered))
    # Four batches to step on, of which two epochs take each twice, and two that are looked at ten times.
    assert runs == [4 + 2, 8 + 10 * 2]
    assert found[0].after == found[1].after < found[0].before
    for name, one in found[0].stored.items():
        assert torch.equal(one.packed().state.absmax, found[1].stored[name].packed().state.absmax)


def test_answers_that_are_kept_hold_no_more_than_they_are_counted_as(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    (batch,) = batches_of(subject, "llama", 2, at_once=2)
    assert len({end for _, end in batch.answers}) == 2  # so that logits are held which are no answer's
    references = References(subject, 2**20)
    with walking(subject.path):
        first = references.of(batch)
        kept = references.of(batch)
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True))
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert sum(held.values()) == 2**20 - references.room_bytes == sum(x.nbytes for x in kept) > 0


def test_answers_that_are_kept_leave_most_of_the_free_memory_to_the_steps(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    subject, rooms = subject_for(tiny_folder("llama")), []

    def noted(subject: Subject, room_bytes: int) -> References:
        rooms.append(room_bytes)
        return References(subject, room_bytes)

    monkeypatch.setattr(tuning, "References", noted)
    for free in (2**32, 2**40):
        monkeypatch.setattr(tuning, "free_memory", lambda _, free=free: free)
        tune(subject, nearest(subject), Given(*[batches_of(subject, "llama", 1)] * 2), 1, Nf4())
    assert rooms == [2**29, tuning.REFERENCE_BYTES]


@pytest.mark.slow
def test_blocks_that_run_again_give_the_same_scales(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    tight = replace(subject)
    vars(tight)["path"] = replace(subject.path, room_bytes=0)
    batches, given = batches_of(subject, "llama", 4), nearest(subject)
    kept, again = (tune(one, given, Given(batches[:3], batches[:1]), 6, Nf4()) for one in (subject, tight))
    assert kept.step == again.step > 0
    for layer, one in kept.stored.items():
        assert torch.equal(one.state.absmax, again.stored[layer].state.absmax)


@pytest.mark.parametrize("fitting", [0, 1])  # first comes a look at what is kept back, then a step
def test_tuning_that_a_memory_limit_has_no_room_for_is_refused_with_the_least_that_would_do(
    fitting: int, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reference = load_reference(str(tiny_folder("llama")), "cpu", on_host=True)
    subject = limited_subject(reference, FormatSpec(), 2**40, tmp_path)
    given = {n: Nf4().stored(subject.dequantized.own(n)) for n in subject.quantized_modules}
    batches, peaks = batches_of(subject, "llama", 2), iter([2**30] * fitting + [2**41])
    monkeypatch.setattr(memory, "peak_bytes", lambda *_, **__: next(peaks))
    with subject.streaming(), pytest.raises(MachineError, match=r"a batch took .* Pass --max-memory \d+MiB"):
        tune(subject, given, Given(batches, batches), 2, Nf4())
    assert not any(peaks)


def test_work_beside_what_the_optimizer_holds_is_no_kind_of_work_from_before(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    # By what a kind took at first a memory limit lets weights stay; averages and gradients came on top.
    made, held, adam = [], defaultdict(set), torch.optim.Adam

    def optimizer(*given: Any, **options: Any) -> torch.optim.Adam:
        made.append(adam(*given, **options))
        return made[-1]

    def running(_: Subject, kind: str, *__: Any, **___: Any) -> AbstractContextManager[None]:
        held[kind].add(any(one.state for one in made))
        return nullcontext()

    monkeypatch.setattr(torch.optim, "Adam", optimizer)
    monkeypatch.setattr(Subject, "running", running)
    subject = subject_for(tiny_folder("llama"))
    batches = batches_of(subject, "llama", 2)
    tune(subject, nearest(subject), Given(batches, batches), 8, Nf4())
    assert sorted(map(sorted, held.values())) == [[False], [False], [True], [True]]


@pytest.mark.parametrize(("count", "kept"), [(15, []), (16, [7, 15]), (30, [7, 15, 23])])
def test_every_eighth_sample_is_kept_back_and_none_of_too_few_to_decide(count: int, kept: list[int]):
    samples = [Sample(str(i), asked("a red bag")) for i in range(count)]
    training, held = split_samples(samples)
    assert [int(s.id) for s in held] == kept
    assert [int(s.id) for s in training] == [i for i in range(count) if i not in kept]
