"""Columns rounded one after the other: the loop, compiled and fused, against numbers one at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from errno import ENOSPC
from importlib.util import find_spec
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qprobe.calibration import columns as columns_package
from qprobe.calibration.columns import cpu
from qprobe.calibration.columns.grid import FEW, Grid, nf4_grid
from qprobe.calibration.columns.rounding import (
    LEAF,
    best_scales,
    fused_kernels,
    one_by_one,
    round_columns,
    searched_scales,
    spread,
)
from tests.calibration.reference import rounded_columns

# Widths below, at and above the columns between which errors go one by one, and rows that fill no warp.
SHAPES = [(1, 3), (2, 32), (LEAF, 5), (LEAF + 1, 33), (100, 7)]


def case(columns: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """base, own, scales (one of them 0) and coupling, of which the upper half must not count."""
    generator = torch.Generator().manual_seed(seed)
    base, own, scales = (torch.randn(columns, rows, generator=generator) for _ in range(3))
    scales = scales.abs()
    scales[:, 0] = 0
    return base, own, scales, torch.randn(columns, columns, generator=generator) / columns**0.5


def agree(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    """True if codes are equal and errors too within float32; a target at a threshold may fall either way."""
    same = found[0] == wanted[0]
    return float((~same).float().mean()) < 0.01 and torch.allclose(found[1][same], wanted[1][same], atol=1e-5)


def test_few_numbers_and_many_have_the_same_codes_also_at_and_beside_thresholds():
    grid = nf4_grid(torch.device("cpu"))
    edges = torch.cat([grid.thresholds, grid.values, torch.tensor([-2.0, 2.0, -torch.inf, torch.inf])])
    beside = [edges, *(torch.nextafter(edges, torch.full_like(edges, x)) for x in (-3, 3))]
    many = torch.cat([*beside, torch.linspace(-1.1, 1.1, 2 * FEW)])
    few = torch.cat([grid.nearest(part) for part in many.split(FEW // 2)])
    assert torch.equal(grid.nearest(many), few)
    assert torch.equal(few, torch.bucketize(many, grid.thresholds, out_int32=True))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_columns_make_up_for_the_errors_of_those_before(shape):
    base, own, scales, coupling = case(*shape)
    wanted = rounded_columns(base, own, scales, coupling)
    assert agree(round_columns(base.clone(), own, scales, coupling[None], shape[1:]), wanted)
    assert agree(one_by_one(base.clone(), own, scales, coupling, nf4_grid(base.device)), wanted)


def test_a_target_at_a_threshold_gets_the_smaller_code_and_one_just_above_it_the_larger():
    grid = nf4_grid(torch.device("cpu"))
    above = torch.nextafter(grid.thresholds, torch.ones(15))
    given = torch.stack([grid.thresholds, above])  # two columns that do not know of each other
    asked = (given, torch.ones(1, 15), torch.zeros(1, 2, 2), (15,))
    codes, _ = cpu.round_columns(given, *asked, grid)
    assert codes.tolist() == [list(range(15)), list(range(1, 16))]
    assert torch.equal(round_columns(given.clone(), *asked)[0], codes)


# No folder to write to, a full disk, and a file that such a disk cut.
@pytest.mark.parametrize("error", [RuntimeError(), OSError(ENOSPC, "no space"), UnpicklingError("truncated")])
def test_where_numbas_cache_cannot_be_used_the_loop_is_compiled_all_the_same(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    def njit(*_: str, cache: bool = False, **__: Any) -> Any:
        def compiler(function: Any) -> Any:
            if cache:
                raise error
            return "compiled", function

        return compiler

    monkeypatch.setattr(cpu.numba, "njit", njit)
    assert cpu._compiled("int64")(njit) == ("compiled", njit)


def test_the_compiled_loop_rounds_the_same_by_any_number_of_threads():
    base, own, scales, coupling = case(128, 700)
    rows = (70, 630)
    given = (own, scales[:2], torch.stack([coupling, coupling.T]), rows)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert threads == 1 or len(list(cpu._parts(rows, 128))) > len(rows)
            found.append(cpu.round_columns(base, *given, nf4_grid(base.device)))
    finally:
        torch.set_num_threads(before)
    for codes, errors in found:
        assert torch.equal(codes, found[0][0]) and torch.equal(errors, found[0][1])
    parts = zip(*(x.split(rows, dim=1) for x in (base, own, scales[:2])), given[2], strict=True)
    looped = [one_by_one(b.clone(), o, spread(s, 128), c, nf4_grid(base.device)) for b, o, s, c in parts]
    assert agree(found[0], (torch.cat([c for c, _ in looped], 1), torch.cat([e for _, e in looped], 1)))


def test_a_scale_may_serve_several_columns_and_coupling_be_transposed():
    base, own, scales, coupling = case(LEAF + 8, 6)
    for each in (LEAF + 8, 10):
        few = scales[: (LEAF + 8) // each]
        wanted = rounded_columns(base, own, few.repeat_interleave(each, dim=0), coupling.T)
        assert agree(round_columns(base.clone(), own, few, coupling.T[None], (6,)), wanted)


def layers() -> list[tuple[torch.Tensor, ...]]:
    """Cases of three layers that may stand side by side, with rows that fill no warp."""
    return [case(40, rows, seed) for seed, rows in enumerate((7, 70, 32))]


@pytest.mark.slow
def test_rows_of_each_layer_have_a_coupling_of_their_own():
    cases = layers()
    base, own, scales = (torch.cat([c[i] for c in cases], dim=1) for i in range(3))
    found = round_columns(base.clone(), own, scales, torch.stack([c[3] for c in cases]), (7, 70, 32))
    for part, given in zip(
        zip(*(x.split([7, 70, 32], dim=1) for x in found), strict=True), cases, strict=True
    ):
        assert agree(part, rounded_columns(*given))


def test_scales_are_searched_under_the_costs_of_each_layer():
    cases = layers()
    values, costs = torch.cat([c[0] for c in cases], dim=1), torch.stack([c[3][0].square() for c in cases])
    found = best_scales(values, costs, (7, 70, 32))
    wanted = [searched_scales(c[0], cost[:, None]) for c, cost in zip(cases, costs, strict=True)]
    assert torch.equal(found, torch.cat(wanted))


KERNEL = """
import torch
from qprobe.calibration.columns.grid import FEW, nf4_grid
from qprobe.calibration.columns.rounding import best_scales, round_columns
from qprobe.calibration.columns.cuda import best_scales as fused_search, round_columns as fused
from tests.calibration.reference import rounded_columns
from tests.calibration.test_columns import SHAPES, agree, case, layers
grid = nf4_grid(torch.device("cpu"))
for shape in SHAPES:
    base, own, scales, coupling = case(*shape)
    found = fused(base, own, scales[:1], coupling.T[None], shape[1:], grid)
    assert agree(found, rounded_columns(base, own, scales[:1].expand_as(own), coupling.T)), shape
cases = layers()
base, own, scales = (torch.cat([c[i] for c in cases], dim=1) for i in range(3))
given = (own, scales[::10], torch.stack([c[3] for c in cases]), (7, 70, 32))
assert agree(fused(base, *given, grid), round_columns(base.clone(), *given))
base[:, 3] = 0
costs = torch.stack([c[3][0].square() for c in cases])
found, wanted = fused_search(base, costs, (7, 70, 32), grid), best_scales(base, costs, (7, 70, 32))
assert found[3] == wanted[3] == 0
assert float((~torch.isclose(found, wanted, rtol=1e-5)).float().mean()) < 0.02
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_fused_kernel_rounds_the_same_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported
    found = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_fused_kernel_rounds_as_the_loop_on_a_gpu():
    device = torch.device("cuda", 0)
    kernels = fused_kernels(device)
    assert kernels is not None and kernels.best_scales is not None
    grid = nf4_grid(device)
    for columns, rows in ((64, 4096), (128, 1000)):
        base, own, scales, coupling = (x.to(device) for x in case(columns, rows))
        found = kernels.round_columns(base, own, scales, coupling[None], (rows,), grid)
        assert agree(found, one_by_one(base.clone(), own, scales, coupling, grid))
        costs = coupling[:1].square()
        searched = kernels.best_scales(base, costs, (rows,), grid)
        same = torch.isclose(searched, searched_scales(base, costs.T), rtol=1e-4)
        assert float((~same).float().mean()) < 0.01


def test_a_device_that_cannot_run_the_kernel_gets_the_loop_and_a_warning():
    # On "meta" nothing can be compared: it stands for any device where the kernel fails.
    with pytest.warns(UserWarning, match="do not run on meta"):
        assert fused_kernels(torch.device("meta")) is None


@pytest.mark.parametrize("wrong", ["", "codes", "scales"])
def test_kernels_are_taken_where_they_round_and_search_as_the_loops(
    wrong: str, monkeypatch: pytest.MonkeyPatch
):
    def rounded(base: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        codes, errors = round_columns(base, *given[:-1])
        return codes + (wrong == "codes"), errors

    def searched(values: torch.Tensor, costs: torch.Tensor, widths: tuple[int, ...], _: Grid) -> torch.Tensor:
        return best_scales(values, costs, widths) * (1.01 if wrong == "scales" else 1)

    kernels = SimpleNamespace(round_columns=rounded, best_scales=searched)
    monkeypatch.setattr(columns_package, "cpu", kernels)
    found_for = fused_kernels.__wrapped__  # without what is remembered of the device
    if not wrong:
        assert found_for(torch.device("cpu")) is kernels
        return
    with pytest.warns(UserWarning, match=rf"do not run on cpu \({wrong} differ\)"):
        assert found_for(torch.device("cpu")) is None
