"""Sensitivity against full weight gradients, and KL against a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import Path as WalkedPath
from qprobe.measure.attribution import (
    _fisher_root,
    attribute,
    gauss_radau,
    random_signs,
    walking,
)
from qprobe.measure.experts.routing import owned
from qprobe.measure.kl import ANSWERS, KlSums, in_four_bit, read_out
from qprobe.measure.subject import subject_of
from qprobe.records import FormatSpec
from tests import reference
from tests.measure.conftest import WITH_HEAD, Case

CaseOf = Callable[[str], Case]


def test_an_output_that_is_no_view_may_be_changed_in_place() -> None:
    # As LED divides its queries; plain outputs of an autograd function are views that refuse it.
    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return owned(torch.nn.functional.linear(x, torch.eye(3), bias))

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            return grad, None

    x = torch.ones(1, 2, 3, requires_grad=True)
    y = Layer.apply(x, torch.zeros(3))
    y /= 2
    y.sum().backward()
    assert x.grad is not None and bool((x.grad == 0.5).all())


def logits_of(case: Case, names: frozenset[str], count: int = 1) -> tuple[list, list]:
    subject = case.subject
    batch = subject.encode(case.samples[:count])
    with torch.no_grad():
        plain = read_out(subject.model, batch)
        with in_four_bit(subject.modules, subject.dequantized, names):
            return plain, read_out(subject.model, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_HEAD)
def test_kl_equals_a_plain_loop_over_a_hand_swapped_model(case: CaseOf, name: str) -> None:
    found = case(name)
    subject = found.subject
    batch = subject.encode(found.samples[:1])
    start, end = batch.answers[0]
    assert end > start
    twin = reference.quantized_copy(subject.model, subject.quantized)
    with torch.no_grad():
        wanted = subject.model(**batch.inputs).logits[0, start - 1 : end - 1]
        got = twin(**batch.inputs).logits[0, start - 1 : end - 1]
    (sums,) = ANSWERS.sums(*logits_of(found, subject.quantized))
    assert sums.tokens == end - start
    assert sums.kl == pytest.approx(reference.kl_nats(wanted, got), rel=1e-3)
    assert sums.top1_agree == int((wanted.argmax(-1) == got.argmax(-1)).sum())


@pytest.mark.parametrize("name", WITH_HEAD)
def test_one_layer_in_four_bit_equals_a_hand_made_swap_exactly(case: CaseOf, name: str) -> None:
    found = case(name)
    subject = found.subject
    layer = next(n for n in subject.quantized_modules if n.endswith("down_proj"))
    batch = subject.encode(found.samples[:1])
    twin = reference.quantized_copy(subject.model, [layer])
    with torch.no_grad():
        expected = read_out(twin, batch)
    _, got = logits_of(found, frozenset([layer]))
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("name", WITH_HEAD)
@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_slopes_equal_full_weight_gradients(case: CaseOf, name: str, alpha: float) -> None:
    found = case(name)
    subject = found.subject
    batch = subject.encode(found.samples[:1])
    plain, _ = logits_of(found, frozenset())
    with walking(subject.path):
        slopes = subject.path.slopes(batch, plain, alpha)
    expected = reference.weight_gradient_slopes(
        subject.model, subject.quantized, batch.inputs, batch.answers[0], alpha
    )
    scale = max(abs(v) for v in expected.values())
    assert set(slopes) == set(expected)
    for layer, value in expected.items():
        assert slopes[layer].item() == pytest.approx(value, rel=1e-4, abs=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_HEAD)
def test_isolated_kl_is_half_the_squared_slope_along_its_random_direction(case: CaseOf, name: str) -> None:
    found = case(name)
    subject = found.subject
    group = max(subject.groups(found.samples, 4), key=len)
    batch, larger = subject.encode(group[:1]), subject.encode(group)
    with torch.no_grad(), walking(subject.path):
        plain = read_out(subject.model, batch)
        got = subject.path.isolated_kl(batch)
        among_others = subject.path.isolated_kl(larger)
    signs = random_signs(plain[0], group[0].digest)
    scale = max(v.item() for v in got.values())
    for layer in list(got)[:: max(1, len(got) // 5)]:
        p, j = reference.logit_slopes(subject.model, layer, batch.inputs, batch.answers[0])
        spread = p.sqrt() * signs
        slope = ((spread - p * spread.sum(-1, keepdim=True)) * j).sum()
        assert got[layer].item() == pytest.approx(float(slope**2) / 2, rel=1e-3, abs=1e-6 * scale)
        assert among_others[layer][0].item() == pytest.approx(got[layer].item(), rel=1e-2, abs=1e-4 * scale)


def test_random_directions_have_the_covariance_of_the_fisher_information() -> None:
    # Over all 2^4 sign patterns the mean of c c^T is diag(p) - p p^T exactly.
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]], dtype=torch.float64)
    p = logits.softmax(-1)[0]
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    roots = torch.cat([_fisher_root(logits, e[None]) for e in patterns])
    torch.testing.assert_close(roots.T @ roots / 16, torch.diag(p) - torch.outer(p, p))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllama", "llama"])
def test_attributions_sum_to_the_measured_kl(case: CaseOf, name: str) -> None:
    # Random tiny models break completely in 4-bit (KL of several nats), where two nodes are too few.
    found = case(name)
    batch = found.subject.encode(found.samples[:3])
    result = attribute(found.subject.path, batch, nodes=16)
    plain, four_bit = logits_of(found, found.subject.quantized, 3)
    measured = dict(zip((s.id for s in batch.samples), ANSWERS.sums(plain, four_bit), strict=True))
    for sample, value in result.rows.groupby("sample").kl_sum.sum().items():
        assert value == pytest.approx(measured[str(sample)].kl, rel=0.03)
    assert [k.kl for k in result.kl] == pytest.approx([k.kl for k in measured.values()], rel=1e-4)


def test_nodes_are_added_until_the_sum_meets_the_kl(case: CaseOf) -> None:
    found = case("llama")
    batch = found.subject.encode(found.samples[:3])
    rough = attribute(found.subject.path, batch, nodes=1, tolerance=float("inf"))
    fine = attribute(found.subject.path, batch, nodes=1, tolerance=0.02)
    total = sum(k.kl for k in fine.kl)
    assert rough.nodes == 1 and fine.nodes > 1
    assert abs(rough.rows.kl_sum.sum() - total) > 0.02 * total
    assert abs(fine.rows.kl_sum.sum() - total) <= 0.02 * total


def test_of_several_walks_the_one_that_misses_least_is_kept(
    case: CaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = case("llama")
    batch = found.subject.encode(found.samples[:1])
    total = attribute(found.subject.path, batch, nodes=1, tolerance=float("inf")).kl[0].kl
    sums = {1: 1.05, 4: 1.30, 8: 1.20}  # of the KL: refining makes it worse, and then less bad
    monkeypatch.setattr(
        type(found.subject.path),
        "integrals",
        lambda self, batch, reference, nodes: {"layer": torch.tensor([sums[nodes] * total])},
    )
    result = attribute(found.subject.path, batch, nodes=1, tolerance=0.02)
    assert result.nodes == 1
    assert result.rows.kl_sum.sum() == pytest.approx(1.05 * total)


@pytest.mark.parametrize(
    ("dtype", "missed", "walks"),
    [
        (torch.bfloat16, 0.10, [1]),
        (torch.bfloat16, 0.15, [1, 4, 8]),
        (torch.float32, 0.10, [1, 4, 8]),  # where nothing is rounded to 16-bit, what is missed is no rounding
        (torch.float32, 0.01, [1]),
    ],
)
def test_what_16_bit_rounding_adds_to_the_kl_calls_for_no_more_nodes(
    case: CaseOf, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, missed: float, walks: list[int]
) -> None:
    # A path whose KL is 10 % rounding, of which sums over layers see nothing.
    found = case("llama")
    path = replace(found.subject.path, dtype=dtype)
    batch = found.subject.encode(found.samples[:1])

    def sums(reference: list[torch.Tensor], logits: list[torch.Tensor]) -> list[KlSums]:
        alpha = float(logits[0])
        return [KlSums(0.9 * alpha**2 + (0.1 if alpha else 0.0), 10, 10)]

    vars(path)["readout"] = SimpleNamespace(sums=sums, by_distance=False, counts=lambda batch: [10])
    monkeypatch.setattr(WalkedPath, "logits", lambda self, batch, alpha: [torch.tensor(alpha)])
    asked: list[int] = []

    def integrals(_: object, batch: object, reference: object, nodes: int) -> dict[str, torch.Tensor]:
        asked.append(nodes)
        return {"layer": torch.tensor([1 - missed], dtype=torch.float64)}

    monkeypatch.setattr(WalkedPath, "integrals", integrals)
    attribute(path, batch, nodes=1, tolerance=0.02)
    assert asked == walks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllama", "qwen2_vl", "llava_pixtral", "llama_tied"])
def test_a_16bit_model_is_walked_in_float32_and_comes_back_unchanged(
    name: str, tiny_folder: Callable[[str], Path], case: CaseOf
) -> None:
    loaded = load_reference(str(tiny_folder(name)), "cpu")
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    subject = subject_of(loaded, FormatSpec())
    samples = case(name).samples[:1]
    batch = subject.encode(samples)
    result = attribute(subject.path, batch, nodes=1, tolerance=float("inf"))
    twins = copy.deepcopy(loaded.model), reference.quantized_copy(loaded.model, subject.quantized)
    start, end = batch.answers[0]
    with torch.no_grad():
        inputs = batch.in_dtype(torch.float32).inputs
        wanted, got = (twin.float()(**inputs).logits[0, start - 1 : end - 1] for twin in twins)
    assert subject.path.dtype == torch.float32 and subject.model.dtype == torch.bfloat16
    assert result.kl[0].kl == pytest.approx(reference.kl_nats(wanted, got), rel=1e-4)
    after = loaded.model.state_dict()
    assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())


def test_frozen_parameters_stay_frozen_and_hooks_go(case: CaseOf) -> None:
    found = case("mllama")
    subject = found.subject
    attribute(subject.path, subject.encode(found.samples[:1]), nodes=1)
    assert all(not p.requires_grad and p.grad is None for p in subject.model.parameters())
    assert all("forward" not in m.__dict__ for m in subject.model.modules())


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_quadrature_is_exact_for_polynomials_without_a_constant(nodes: int) -> None:
    # With the slope known to be 0 at 0, n nodes integrate degree 2n exactly: int_0^1 x^d dx = 1 / (d + 1).
    rule = gauss_radau(nodes)
    for degree in range(1, 2 * nodes + 1):
        assert sum(w * a**degree for a, w in rule) == pytest.approx(1 / (degree + 1))
    # and no more: the error at degree 2n + 1 is that of the squared node polynomial, never 0
    assert sum(w * a ** (2 * nodes + 1) for a, w in rule) != pytest.approx(1 / (2 * nodes + 2))


def test_two_nodes_are_the_textbook_radau_points() -> None:
    # The nonzero points of the 3-point rule with 0 fixed: (6 -+ sqrt 6) / 10, weights (16 +- sqrt 6) / 36.
    root = 6**0.5
    wanted = [((6 - root) / 10, (16 + root) / 36), ((6 + root) / 10, (16 - root) / 36)]
    assert [pair for pair in gauss_radau(2)] == [pytest.approx(pair) for pair in wanted]


@pytest.mark.parametrize("name", WITH_HEAD)
def test_the_slope_at_the_16bit_model_is_zero(case: CaseOf, name: str) -> None:
    # What the quadrature takes for granted: KL has its minimum at alpha = 0.
    found = case(name)
    batch = found.subject.encode(found.samples[:1])
    plain, _ = logits_of(found, frozenset())
    with walking(found.subject.path):
        start, end = (found.subject.path.slopes(batch, plain, alpha) for alpha in (0.0, 1.0))
    scale = max(abs(v.item()) for v in end.values())
    assert max(abs(v.item()) for v in start.values()) < 1e-4 * scale
