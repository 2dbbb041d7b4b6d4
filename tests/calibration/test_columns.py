"""Columns rounded one after the other: the loop and the fused kernel against numbers one at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from qprobe.calibration.columns import LEAF, fused_kernel, nf4_grid, one_by_one, round_columns
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


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_make_up_for_the_errors_of_those_before(shape):
    base, own, scales, coupling = case(*shape)
    assert agree(
        round_columns(base.clone(), own, scales, coupling), rounded_columns(base, own, scales, coupling)
    )


def test_scales_may_be_expanded_and_coupling_transposed():
    base, own, scales, coupling = case(LEAF + 8, 6)
    spread = scales[:1].expand_as(own)
    wanted = rounded_columns(base, own, spread, coupling.T)
    assert agree(round_columns(base.clone(), own, spread, coupling.T), wanted)


KERNEL = """
import torch
from qprobe.calibration.columns import nf4_grid
from qprobe.calibration.columns_cuda import fused
from tests.calibration.reference import rounded_columns
from tests.calibration.test_columns import SHAPES, agree, case
for shape in SHAPES:
    base, own, scales, coupling = case(*shape)
    found = fused(base, own, scales[:1].expand_as(own), coupling.T, nf4_grid(torch.device("cpu")))
    assert agree(found, rounded_columns(base, own, scales[:1].expand_as(own), coupling.T)), shape
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_fused_kernel_rounds_the_same_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported
    found = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_fused_kernel_rounds_as_the_loop_on_a_gpu():
    device = torch.device("cuda", 0)
    kernel = fused_kernel(device)
    assert kernel is not None
    for columns, rows in ((64, 4096), (128, 1000)):
        base, own, scales, coupling = (x.to(device) for x in case(columns, rows))
        given = (own, scales, coupling, nf4_grid(device))
        assert agree(kernel(base, *given), one_by_one(base.clone(), *given))


def test_a_device_that_cannot_run_the_kernel_gets_the_loop_and_a_warning():
    # On "meta" nothing can be compared: it stands for any device where the kernel fails.
    with pytest.warns(UserWarning, match="does not run on meta"):
        assert fused_kernel(torch.device("meta")) is None
