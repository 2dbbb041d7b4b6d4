"""Codes under two Gram matrices: against the damage itself, and against the sweep under one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qprobe.calibration.codes import Readers, calibrate
from qprobe.calibration.columns.grid import nf4_grid
from qprobe.calibration.columns.rounding import spread
from qprobe.calibration.gptq import Metrics, choose_codes, improve_codes, metric_of, shrunk
from qprobe.calibration.two_sided import GROUPS, Sides, mixed, move_codes, moving_bytes
from qprobe.formats.nf4 import Nf4
from tests.calibration.test_gptq import inputs, weight_of
from tests.training.peak import LiveBytes

TOKENS = 400
SHAPES = [(40, 64), (7, 60), (33, 128)]


def sides_of(*heights: int) -> Sides:
    """Gradients that few directions explain, so that rows can make up for one another."""
    found = [inputs(TOKENS, height, seed=9 + height) for height in heights]
    return Sides(heights, [mixed(g.T @ g) for g in found])


def start_of(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Metrics]:
    """(weight, scales, codes, metrics) as `move_codes` takes them, codes from GPTQ."""
    weight = weight_of(shape, seed).float().T.contiguous()
    x = inputs(TOKENS, shape[1], seed)
    metric = metric_of(shrunk(x.T @ x, TOKENS))
    assert metric is not None
    metrics = Metrics((metric,), (shape[0],))
    scales = weight.abs().amax(dim=0, keepdim=True).clone()
    return weight, scales, choose_codes(weight, scales, metrics), metrics


def damage(weight: Tensor, scales: Tensor, codes: Tensor, metrics: Metrics, side: Tensor) -> float:
    """tr(E G E^T H), both matrices as they are given to the sweep, in float64."""
    read = nf4_grid(weight.device).read(codes.int()) * spread(scales, len(weight))
    errors = (weight - read).double()
    gram = metrics.each[0].gram.double() + float(metrics.each[0].ridge) * torch.eye(len(weight)).double()
    return float(((errors.T @ gram @ errors) * side.double()).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_sweep_costs_less_than_the_one_before(shape: tuple[int, int]):
    weight, scales, codes, metrics = start_of(shape)
    improve_codes(weight, scales, codes, metrics)
    sides = sides_of(shape[0])
    side = sides.outputs[0]
    assert side is not None
    costs = [damage(weight, scales, codes, metrics, side)]
    for _ in range(2):
        move_codes(weight, scales, codes, metrics, sides)
        costs.append(damage(weight, scales, codes, metrics, side))
    assert costs[1] < 0.99 * costs[0]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(costs))


@pytest.mark.parametrize("shape", SHAPES)
def test_where_gradients_are_unrelated_it_is_the_sweep_under_one_matrix(shape: tuple[int, int]):
    weight, scales, codes, metrics = start_of(shape)
    wanted = codes.clone()
    improve_codes(weight, scales, wanted, metrics)
    move_codes(weight, scales, codes, metrics, Sides([shape[0]], [torch.eye(shape[0])]))
    assert torch.equal(codes, wanted)


def test_weights_side_by_side_move_as_each_alone_and_one_without_gradients_stays():
    shapes = [(40, 64), (GROUPS - 3, 64), (20, 64)]
    starts = [start_of(shape, seed) for seed, shape in enumerate(shapes)]
    parts = zip(*(one[:3] for one in starts), strict=True)
    weight, scales, codes = (torch.cat(list(part), dim=1) for part in parts)
    metrics = Metrics(tuple(one[3].each[0] for one in starts), tuple(rows for rows, _ in shapes))
    sides = sides_of(*(rows for rows, _ in shapes))
    sides = replace(sides, outputs=[*sides.outputs[:2], None])
    before = codes.clone()
    move_codes(weight, scales, codes, metrics, sides)
    moved = codes.split([rows for rows, _ in shapes], dim=1)
    for (w, s, c, m), after, side in zip(starts, moved, sides.outputs, strict=True):
        move_codes(w, s, c, m, Sides([w.shape[1]], [side]))
        assert torch.equal(after, c)
    assert torch.equal(codes[:, 53:], before[:, 53:]) and not torch.equal(codes[:, :40], before[:, :40])


def test_a_matrix_that_no_gradient_reached_or_that_overflowed_says_nothing():
    given = torch.tensor([[4.0, 2.0], [2.0, 0.0]])
    # Mean diagonal 2: [[2, 1], [1, 0]], half of it and half of the identity.
    found = mixed(given)
    assert found is not None and torch.equal(found, torch.tensor([[1.5, 0.5], [0.5, 0.5]]))
    assert mixed(torch.zeros(2, 2)) is None
    assert mixed(torch.full((2, 2), float("inf"))) is None


def test_calibrated_weights_cost_less_where_gradients_are_known():
    weight, x = weight_of((48, 128)), inputs(TOKENS, 128)
    g = inputs(TOKENS, 48, seed=5)
    gram, outputs = x.T @ x, g.T @ g
    plain = Readers([weight], gram, TOKENS)
    costs = []
    for readers in (plain, replace(plain, outputs=[outputs])):
        (found,) = calibrate(readers, Nf4())
        assert found.stored is not None
        errors = (found.stored.packed().unpack().float() - weight.float()).double()
        costs.append(float(((errors @ gram.double() @ errors.T) * outputs.double()).sum()))
    assert costs[1] < 0.97 * costs[0]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(600, 128), (256, 500)])
def test_memory_while_codes_move_is_what_is_said_of_it(shape: tuple[int, int]):
    weight, scales, codes, metrics = start_of(shape)
    g = inputs(TOKENS, shape[0], seed=5)
    outputs = g.T @ g
    with torch.no_grad(), LiveBytes() as live:
        move_codes(weight, scales, codes, metrics, Sides([shape[0]], [mixed(outputs)]))
    errors = 4 * weight.numel()
    assert 0.5 < live.peak / (errors + moving_bytes([shape[0]], shape[1])) <= 1.001
