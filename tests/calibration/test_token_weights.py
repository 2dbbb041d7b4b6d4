"""Weights of tokens: squared gradients of the model's own answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch

from qprobe.calibration.gram import UNLIKE, Gram, gathered, shared_inputs, weighted_parts
from qprobe.calibration.layers import rounded_layers
from qprobe.calibration.token_weights import DRAWS, MIX, TokenWeights, _Weighed, draws, token_weights
from qprobe.formats.nf4 import Nf4
from qprobe.inputs.batch import PAD, Batch
from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import fisher_direction, random_signs
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec
from tests import tiny

TinyFolder = Callable[[str], Path]


def subject_for(folder: Path) -> Subject:
    subject = subject_of(load_reference(str(folder), "cpu"), FormatSpec())
    subject.model.float()
    return subject


def samples_of(name: str, count: int = 3) -> tuple:
    given = tiny.questions(name, count)
    return tuple(
        replace(s, answer="the red bar, by two units" if i % 2 else "no") for i, s in enumerate(given)
    )


def keep(
    outputs: dict[str, torch.Tensor], name: str, _module: object, _given: object, y: torch.Tensor
) -> Any:
    outputs[name] = y.requires_grad_().clone()
    return outputs[name]


def squares(gradient: torch.Tensor) -> torch.Tensor:
    """(tokens,) of the gradient (tokens, out_features)."""
    return gradient.square().sum(dim=-1)


def slow_gradients(
    subject: Subject, samples: tuple, of: Callable[[torch.Tensor], torch.Tensor] = squares
) -> dict[str, list[torch.Tensor]]:
    """Squared norms of the gradient at every linear's output, by plain hooks and retained gradients.

    One sample at a time, so that there is no padding; summed over draws: (tokens,) for each sample. of: what
    is summed of a gradient (tokens, out_features), float64.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in subject.quantized}
    for sample in samples:
        batch = subject.encode((sample,)).in_dtype(torch.float32)
        sums: dict[str, torch.Tensor] = {}
        for draw in range(DRAWS):
            outputs: dict[str, torch.Tensor] = {}
            hooks = [
                module.register_forward_hook(partial(keep, outputs, name))
                for name, module in subject.quantized_modules.items()
            ]
            output = subject.model(**batch.inputs)
            if subject.answers:
                start, end = batch.answers[0]
                logits = output.logits[0, start - 1 : end - 1].float()
                direction = fisher_direction(logits.detach(), f"{draw}{sample.digest}")
                loss = (direction * logits).sum()
            else:
                hidden = output[0][0]
                signs = random_signs(hidden, f"{draw}{sample.digest}")
                # of each row's squared error over its square, whose Hessian is 2 / |h|^2
                loss = (signs * hidden * (2 / hidden.detach().square().sum(-1, True)).sqrt()).sum()
            names = list(outputs)
            gradients = torch.autograd.grad(loss, [outputs[n] for n in names], allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    own = of(gradient.double().flatten(0, -2))
                    sums[name] = sums.get(name, torch.zeros_like(own)) + own
            for hook in hooks:
                hook.remove()
        for name, own in sums.items():
            found[name].append(own)
    return found


def test_outputs_are_sums_of_outer_products_of_gradients_but_for_wide_linears(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    subject, samples = subject_for(tiny_folder("llama")), samples_of("llama", 2)
    batches = [subject.encode((sample,)) for sample in samples]
    inputs = shared_inputs(subject, batches)
    heights = {name: layer.out_features for name, layer in subject.quantized_modules.items()}
    widest = max(heights.values())
    monkeypatch.setattr("qprobe.calibration.token_weights.MOST_OUTPUTS", widest - 1)
    found = token_weights(subject, inputs, batches).outputs
    assert found.keys() == {name for name, height in heights.items() if height < widest}
    wanted = slow_gradients(subject, samples, of=lambda g: g.T @ g)
    for name, matrix in found.items():
        total = sum(wanted[name])
        torch.testing.assert_close(matrix.double(), total, rtol=1e-3, atol=1e-4 * float(total.abs().max()))


def by_token(wanted: dict[str, list[torch.Tensor]], names: tuple[str, ...]) -> list[list[torch.Tensor]]:
    """For each sample what each of `names` weighs its tokens."""
    return [list(one) for one in zip(*(wanted[name] for name in names), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mllama"])
def test_weights_are_squared_gradients_of_sampled_answers(name: str, tiny_folder: TinyFolder):
    subject, samples = subject_for(tiny_folder(name)), samples_of(name)
    batch = subject.encode(samples)
    inputs = shared_inputs(subject, [batch])
    found = token_weights(subject, inputs, [batch])
    wanted = slow_gradients(subject, samples)
    for one in inputs:
        layer = subject.layers[one.leader]
        (raw,) = found.raw[one.leader]
        by_sample = raw.double().view(batch.size, -1)
        for row, kinds, alone in zip(by_sample, batch.kinds, by_token(wanted, one.names), strict=True):
            total = sum(alone)
            used = row[kinds != PAD] if layer.reads == "text" and len(row) == len(kinds) else row
            if len(used) != len(total):  # tiles that only the batch holds
                continue
            torch.testing.assert_close(used, total, rtol=1e-3, atol=1e-9)
            assert layer.reads != "text" or float(row.sum()) == pytest.approx(float(used.sum()))


def test_the_matrix_is_a_sum_over_tokens_of_outer_products_times_their_weights(tiny_folder: TinyFolder):
    subject, samples = subject_for(tiny_folder("llama")), samples_of("llama")
    batch = subject.encode(samples)
    inputs = shared_inputs(subject, [batch])
    weights = token_weights(subject, inputs, [batch])
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        subject.modules[one.leader].register_forward_hook(
            lambda _m, given, _y, name=one.leader: seen.__setitem__(name, given[0].detach().double())
        )
        for one in inputs
    ]
    with torch.no_grad():
        subject.model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    found = gathered(subject, inputs, [batch], weights=weights.of)
    counts = (batch.kinds != PAD).reshape(-1)
    for one in inputs:
        raw = weights.raw[one.leader][0].double()
        mean = float(raw.sum()) / int(counts.sum())
        total = torch.zeros(one.in_features, one.in_features, dtype=torch.float64)
        for x, w, is_counted in zip(seen[one.leader].reshape(-1, one.in_features), raw, counts, strict=True):
            if is_counted:
                total += ((1 - MIX) + MIX * float(w) / mean) * torch.outer(x, x)
        gap = (found.grams[one.leader].total - total).abs().max()
        assert float(gap) < 1e-5 * float(total.abs().max())


def test_two_16_bit_parts_hold_weighted_inputs_within_16_bits():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 40, generator=generator).bfloat16()
    weights = torch.rand(50, generator=generator) * 30
    parts = weighted_parts(rows, weights)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    found = sum(part.double() for part in parts)
    torch.testing.assert_close(found, rows.double() * weights.double()[:, None], rtol=2**-16, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_matrices_of_16_bit_inputs_on_a_gpu_are_those_in_float64():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3000, 96, generator=generator).bfloat16()
    weights, mask = torch.rand(3000, generator=generator) * 9, torch.arange(3000) % 3 > 0
    for given in (None, weights):
        gram = Gram(torch.zeros(96, 96, device="cuda"))
        gram.add(rows.cuda(), mask, given)
        used = rows.double() * mask[:, None]
        wanted = used.T @ (used * (1 if given is None else weights.double()[:, None]))
        assert gram.tokens == 2000
        torch.testing.assert_close(gram.total.double().cpu(), wanted, rtol=1e-3, atol=0.05)


def test_a_large_model_gets_one_draw_and_a_small_one_two(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    large = replace(subject)
    vars(large)["path"] = replace(subject.path, dtype=torch.bfloat16)
    assert (draws(subject), draws(large)) == (2, 1)


def test_equal_weights_give_the_plain_matrix(tiny_folder: TinyFolder):
    subject, samples = subject_for(tiny_folder("llama")), samples_of("llama")
    batch = subject.encode(samples)
    inputs = shared_inputs(subject, [batch])
    counts = (batch.kinds != PAD).reshape(-1)
    equal = TokenWeights(
        {one.leader: [torch.full((len(counts),), 7.0)] for one in inputs},
        {one.leader: 7.0 for one in inputs},
        {},
    )
    plain = gathered(subject, inputs, [batch])
    weighted = gathered(subject, inputs, [batch], weights=equal.of)
    for one in inputs:
        torch.testing.assert_close(weighted.grams[one.leader].total, plain.grams[one.leader].total)


def test_without_a_language_head_a_random_direction_of_the_output_serves(tiny_folder: TinyFolder):
    subject, samples = subject_for(tiny_folder("bert")), samples_of("bert")
    batch = subject.encode(samples)
    inputs = shared_inputs(subject, [batch])
    found = token_weights(subject, inputs, [batch])
    wanted = slow_gradients(subject, samples)
    some = 0
    for one in inputs:
        (raw,) = found.raw[one.leader]
        for row, kinds, alone in zip(
            raw.double().view(batch.size, -1), batch.kinds, by_token(wanted, one.names), strict=False
        ):
            used = row[kinds != PAD] if len(row) == len(kinds) else row
            if len(used) == len(alone[0]):
                torch.testing.assert_close(used, sum(alone), rtol=1e-3, atol=1e-9)
                some += 1
    assert some


def test_a_linear_that_runs_twice_in_a_batch_counts_its_tokens_once_each(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    batch = subject.encode(samples_of("llama"))
    inputs = shared_inputs(subject, [batch])
    twice = inputs[0].leader
    first = subject.modules[twice]
    plain = type(first).forward

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (first(x) + first(x)) / 2

    parent, _, leaf = twice.rpartition(".")
    owner = subject.model.get_submodule(parent)
    try:
        owner._modules[leaf] = Twice()
        found = token_weights(subject, inputs, [batch])
    finally:
        owner._modules[leaf] = first
    assert type(first).forward is plain
    assert found.of(twice, 0) is None
    assert all(found.of(one.leader, 0) is not None for one in inputs[1:2])


def test_tokens_of_a_batch_that_no_gradient_comes_back_to_weigh_nothing_and_enter_the_mean(
    tiny_folder: TinyFolder,
):
    subject, samples = subject_for(tiny_folder("llama")), samples_of("llama")
    first, second = subject.encode(samples), subject.encode(samples[:2])
    inputs = shared_inputs(subject, [first])
    early = [one for one in inputs if ".layers.0." in one.leader]
    alone = token_weights(subject, inputs, [first])

    def cut_off_in_the_second() -> Iterator[Batch]:
        yield first
        block = subject.model.model.layers[0]
        handle = block.register_forward_hook(lambda _module, _given, output: output.detach())
        yield second
        handle.remove()

    found = token_weights(subject, inputs, cut_off_in_the_second())
    tokens = [int((batch.kinds != PAD).sum()) for batch in (first, second)]
    for one in early:
        weights = found.of(one.leader, 1)
        assert weights is not None and len(weights) == second.kinds.numel()
        assert torch.equal(weights, torch.full_like(weights, 1 - MIX))
        share = tokens[0] / sum(tokens)
        assert found.means[one.leader] == pytest.approx(share * alone.means[one.leader], rel=1e-6)
    weighed = gathered(subject, early, [first, second], weights=found.of)
    parts = gathered(subject, early, [first], weights=found.of), gathered(subject, early, [second])
    for one in early:
        weighted, plain = (part.grams[one.leader].total for part in parts)
        wanted = weighted + (1 - MIX) * plain
        torch.testing.assert_close(weighed.grams[one.leader].total, wanted, rtol=1e-4, atol=1e-4)


def test_a_linear_that_read_other_tokens_when_they_were_weighed_is_left_to_nearest_for_that(
    tiny_folder: TinyFolder,
):
    subject = subject_for(tiny_folder("llama"))
    batches = [subject.encode(group) for group in subject.groups(samples_of("llama", 4), 2)]
    inputs = shared_inputs(subject, batches)[:2]
    first = inputs[0]

    def counts(leader: str, batch: int) -> torch.Tensor:
        rows = batches[batch].kinds.numel()
        return torch.ones(rows - 1 if leader == first.leader and batch == 1 else rows)

    found = gathered(subject, inputs, batches, weights=counts)
    assert found.apart == dict.fromkeys(first.names, UNLIKE)
    grams = [found.grams[one.leader] for one in inputs]
    groups = zip(inputs, grams, strict=True)
    rounded, other = (rounded_layers(subject, [i], [g], found.apart, Nf4())[0] for i, g in groups)
    assert {name: (x.stored, x.why) for name, x in rounded.items()} == dict.fromkeys(
        first.names, (None, UNLIKE)
    )
    assert all(x.why != UNLIKE for x in other.values())


def test_blocks_that_run_again_weigh_the_same(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    batch = subject.encode(samples_of("llama"))
    inputs = shared_inputs(subject, [batch])
    tight = replace(subject)
    vars(tight)["path"] = replace(subject.path, room_bytes=0)
    kept, again = (token_weights(one, inputs, [batch]) for one in (subject, tight))
    for one in inputs:
        torch.testing.assert_close(again.raw[one.leader][0], kept.raw[one.leader][0])


def test_what_linears_read_does_not_live_until_the_backward_pass(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    # At full size it would be 15 GiB: the blocks run again for it.
    subject = subject_for(tiny_folder("llama"))
    batch = subject.encode(samples_of("llama"))
    inputs = shared_inputs(subject, [batch])
    vars(subject)["path"] = replace(subject.path, room_bytes=0)
    read: dict[str, Any] = {}
    alive: list[str] = []
    weighed, gradients = _Weighed.apply, torch.autograd.grad

    def noting(x: torch.Tensor, *rest: Any) -> Any:
        read[rest[-1]] = ref(x)
        return weighed(x, *rest)

    def looking(*given: Any, **options: Any) -> Any:
        alive.extend(name for name, x in read.items() if x() is not None)
        return gradients(*given, **options)

    monkeypatch.setattr(_Weighed, "apply", noting)
    monkeypatch.setattr(torch.autograd, "grad", looking)
    token_weights(subject, inputs, [batch])
    assert len(read) == len(subject.quantized)
    assert not [name for name in alive if "down_proj" in name or "o_proj" in name]
