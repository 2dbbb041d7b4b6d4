"""The rounding itself: against bitsandbytes, against rounding to nearest, against every code there is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, get_4bit_type, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from qprobe.calibration import codes
from qprobe.calibration.codes import Readers, calibrate, calibrate_together, packed_codes, workspace_bytes
from qprobe.calibration.columns.grid import nf4_grid
from qprobe.calibration.columns.rounding import searched_scales
from qprobe.calibration.gptq import Metrics, choose_codes, metric_of, output_error, shrunk
from qprobe.formats.nf4 import Nf4
from tests.calibration.reference import bitsandbytes_thresholds, brute_force, unpacked
from tests.training.peak import LiveBytes

CPU = torch.device("cpu")
SHAPES = [(8, 128), (5, 13), (64, 96), (7, 60), (3, 65)]


def inputs(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a few features far larger than the others, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    sizes = torch.exp(torch.randn(features, generator=generator))
    return torch.randn(tokens, features, generator=generator) @ mixing * sizes


def weight_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def own_error(weight: torch.Tensor, codes: torch.Tensor, state, x: torch.Tensor) -> float:
    """Sum of squared output errors, scales taken by the flat index of each weight."""
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    flat = get_4bit_type("nf4", device="cpu")[unpacked(codes, weight.numel())]
    read = (flat * absmax.repeat_interleave(64)[: weight.numel()]).view(weight.shape)
    return float((x.double() @ (read.double() - weight.double()).T).square().sum())


def test_codes_change_at_the_thresholds_of_bitsandbytes():
    # One value just below and one just above each threshold in the C source, and the thresholds themselves.
    exact = torch.tensor(bitsandbytes_thresholds(), dtype=torch.float32)
    below, above = (torch.nextafter(exact, torch.tensor(x)) for x in (-math.inf, math.inf))
    grid = nf4_grid(CPU)
    assert grid.nearest(below).tolist() == grid.nearest(exact).tolist() == list(range(15))
    assert grid.nearest(above).tolist() == list(range(1, 16))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200))
def test_the_table_on_the_cpu_finds_what_a_search_finds(values):
    x = torch.tensor(values)
    grid = nf4_grid(CPU)
    assert torch.equal(grid.nearest(x), torch.bucketize(x, grid.thresholds, out_int32=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_without_correlation_and_search_it_is_bitsandbytes_rounding(shape):
    weight = weight_of(shape)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    metric = metric_of(torch.eye(shape[1]))
    assert metric is not None
    scales = state.absmax.repeat_interleave(64)[: weight.numel()].view(shape).T.contiguous()
    chosen = choose_codes(weight.float().T.contiguous(), scales, Metrics((metric,), (shape[0],)))
    assert torch.equal(packed_codes(chosen.T), codes)


def reads_right(weight: torch.Tensor, fmt: Nf4) -> bool:
    """True if bitsandbytes reads `weight` back as its codes and scales say, within bf16 rounding."""
    stored = fmt.stored(weight)
    read, row = stored.packed().unpack().double(), torch.eye(weight.shape[1])
    said = own_error(torch.zeros_like(weight), stored.codes, stored.state, row)
    return math.isclose(float(read.square().sum()), said, rel_tol=1e-2)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_error_on_fresh_inputs_is_below_that_of_rounding_to_nearest(shape, double_quant):
    weight, fmt = weight_of(shape), Nf4(double_quant=double_quant)
    if not reads_right(weight, fmt):
        pytest.skip("bitsandbytes on this CPU reads blocks that straddle rows wrong, so nothing is gained")
    every = inputs(4000, shape[1])
    x, fresh = every[:400], every[400:]
    found, nearest = calibrate(Readers([weight], x.T @ x, len(x)), fmt)[0], fmt.stored(weight)
    assert found.stored is not None, found.why
    assert own_error(weight, found.stored.codes, found.stored.state, fresh) < 0.8 * own_error(
        weight, nearest.codes, nearest.state, fresh
    )


def isotropic(tokens: int, features: int) -> torch.Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(1))


def decaying(tokens: int, features: int) -> torch.Tensor:
    """Inputs with a few directions that hold nearly everything, and a mean: variance falls as 1 / i^2."""
    directions = torch.linalg.qr(isotropic(features, features))[0]
    along = torch.randn(tokens, features, generator=torch.Generator().manual_seed(2))
    return (along / torch.arange(1, features + 1)) @ directions + 0.1


# The most that calibration may leave on fresh inputs. Without correlation there is little to gain (better
# scales), with it more tokens must bring more.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "tokens", "most"),
    [
        *((isotropic, tokens, 1.0) for tokens in (16, 64, 256, 1024)),
        *((inputs, tokens, 0.65) for tokens in (16, 32, 64, 128)),
        *((inputs, tokens, most) for tokens, most in ((256, 0.5), (1024, 0.35))),
        *((decaying, tokens, most) for tokens, most in ((16, 0.3), (256, 0.1), (1024, 0.05))),
    ],
)
def test_few_tokens_are_not_overfitted(draw, tokens, most):
    # 256 features. Codes that trust the Gram matrix of 32 tokens leave 1.3 of the error of nearest.
    weight, fmt = weight_of((64, 256)), Nf4()
    every = draw(tokens + 3000, 256)
    x, fresh = every[:tokens], every[tokens:]
    found, nearest = calibrate(Readers([weight], x.T @ x, tokens), fmt)[0], fmt.stored(weight)
    assert found.stored is not None, found.why
    share = own_error(weight, found.stored.codes, found.stored.state, fresh) / own_error(
        weight, nearest.codes, nearest.state, fresh
    )
    assert share < most


def test_shrinking_halves_what_as_many_tokens_as_features_say_of_correlation():
    # n = tokens = 2: rho = 1/2; the diagonal is kept, also where one feature is far larger.
    gram = torch.tensor([[4.0, 6.0], [6.0, 900.0]])
    assert torch.equal(shrunk(gram, 2), torch.tensor([[4.0, 3.0], [3.0, 900.0]]))
    assert float(shrunk(gram, 10**9)[0, 1]) == pytest.approx(6.0, rel=1e-6)


@pytest.mark.slow
def test_within_a_third_of_the_best_of_all_codes():
    # 16^4 codes of each of 16 rows of 4 weights, which make one block, at the scale that was chosen. Inputs
    # with correlations of about 0.5: GPTQ alone is up to 1.5 times the best here.
    for seed in range(5):
        weight, mixing = weight_of((16, 4), seed), torch.eye(4) + 0.3 * weight_of((4, 4), seed + 100).float()
        x = torch.randn(50, 4, generator=torch.Generator().manual_seed(seed)) @ mixing
        gram = x.T @ x
        found = calibrate(Readers([weight], gram, 10**6), Nf4(double_quant=False))[0]
        assert found.stored is not None
        scale = float(found.stored.state.absmax[0])
        codes = unpacked(found.stored.codes, 64).view(16, 4)
        ours = best = 0.0
        for row in range(16):
            values = nf4_grid(CPU).values[codes[row]] * scale
            error = (values - weight[row].float())[:, None]
            ours += float(output_error(error, gram))
            best += brute_force(weight[row].float(), gram, scale)
        assert best <= ours * (1 + 1e-6) and ours <= 1.3 * best


def test_a_scale_is_no_worse_than_the_largest_value():
    values = torch.randn(64, 50, generator=torch.Generator().manual_seed(1)) * 3
    costs = torch.rand(64, 1, generator=torch.Generator().manual_seed(2))
    grid = nf4_grid(CPU)

    def error(scales: torch.Tensor) -> torch.Tensor:
        return (((grid.read(grid.nearest(values / scales)) * scales - values) ** 2) * costs).sum(dim=0)

    largest, found = values.abs().amax(dim=0), searched_scales(values, costs)
    assert bool((error(found) <= error(largest) * (1 + 1e-5)).all())
    assert float(error(found).sum()) < 0.9 * float(error(largest).sum())


def test_a_block_of_zeros_stays_zero():
    weight, x = weight_of((4, 64)), inputs(100, 64)
    weight[1] = 0
    found = calibrate(Readers([weight], x.T @ x, len(x)), Nf4(double_quant=False))[0]
    assert found.stored is not None
    assert found.stored.packed().unpack()[1].abs().max() == 0


def test_layers_that_share_inputs_are_rounded_as_each_alone():
    x = inputs(300, 128)
    weights = [weight_of((n, 128), seed=n) for n in (4, 12, 6)]
    together = calibrate(Readers(weights, x.T @ x, len(x)), Nf4())
    for weight, one in zip(weights, together, strict=True):
        alone = calibrate(Readers([weight], x.T @ x, len(x)), Nf4())[0]
        assert one.stored is not None and alone.stored is not None
        assert torch.equal(one.stored.codes, alone.stored.codes)
        assert torch.equal(one.stored.state.absmax, alone.stored.state.absmax)


@pytest.mark.slow
@pytest.mark.parametrize("features", [192, 96])  # blocks of 96 features straddle rows
def test_layers_with_different_inputs_are_rounded_together_as_each_alone(features):
    # The third has no metric and the fourth a weight that is not finite: both are left to nearest.
    readers = []
    for seed, rows in enumerate(((4, 12), (5,), (3,), (40, 6))):
        x = inputs(300, features, seed)
        weights = [weight_of((n, features), seed=seed + n) for n in rows]
        readers.append(Readers(weights, torch.zeros(()) * x.T @ x if seed == 2 else x.T @ x, len(x)))
    readers[3].weights[1][0, 0] = float("nan")
    for one, together in zip(readers, calibrate_together(readers, Nf4()), strict=True):
        for found, alone in zip(together, calibrate(one, Nf4()), strict=True):
            assert (found.why, found.damping) == (alone.why, alone.damping)
            assert found.error == alone.error and (found.stored is None) == (alone.stored is None)
            if found.stored is not None and alone.stored is not None:
                assert torch.equal(found.stored.codes, alone.stored.codes)
                assert torch.equal(found.stored.state.absmax, alone.stored.state.absmax)


@pytest.mark.parametrize(
    ("gram", "why"),
    [
        (torch.zeros(64, 64), "its inputs are all zero"),
        (torch.full((64, 64), float("nan")), "its inputs are not finite"),
        (torch.eye(64) - 4 * torch.ones(64, 64) / 64, "singular"),
    ],
)
def test_without_a_metric_rounding_to_nearest_remains_and_says_why(gram, why):
    (found,) = calibrate(Readers([weight_of((4, 64))], gram, 10**6), Nf4())
    assert found.stored is None and why in found.why


def test_a_singular_gram_matrix_is_damped_until_it_serves():
    # Two tokens for 64 inputs: rank 2.
    x = inputs(2, 64)
    found = calibrate(Readers([weight_of((4, 64))], x.T @ x, len(x)), Nf4())[0]
    assert found.stored is not None and found.damping == 0.01 and found.error < 0.5


def test_weights_that_are_not_finite_are_left_alone():
    weight, x = weight_of((4, 64)), inputs(100, 64)
    weight[2, 3] = float("inf")
    assert calibrate(Readers([weight], x.T @ x, len(x)), Nf4())[0].why == "its weights are not finite"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_the_feedback_factorises_the_damped_gram_matrix(seed, blocks):
    # G + 0.01 mean(diag G) I = U diag(d) U^T with ones on the diagonal of the upper triangular U
    n = 16 * blocks
    x = inputs(4 * n, n, seed)
    gram = x.T @ x
    metric = metric_of(gram)
    assert metric is not None
    product = metric.feedback @ metric.costs.diag() @ metric.feedback.T
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(n)
    assert torch.allclose(product, damped, rtol=1e-3, atol=1e-4 * float(damped.abs().max()))
    assert torch.equal(metric.feedback.tril(-1), torch.zeros(n, n))
    assert list(itertools.chain(metric.feedback.diagonal().tolist())) == [1.0] * n


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "features"),
    # The Gram matrix decides, the weights do, several of them, and blocks that straddle rows.
    [((64,), 1024), ((4096,), 512), ((512, 128, 128), 512), ((2000,), 500)],
)
def test_memory_while_rounding_is_what_is_said_of_it(rows, features):
    # Bytes of every tensor alive, counted at each operation. At least 0.85 of it is really needed.
    x = inputs(600, features)
    gram, weights = x.T @ x, [weight_of((n, features), seed=n) for n in rows]
    calibrate(Readers(weights[:1], gram, len(x)), Nf4())  # tables that stay
    with torch.no_grad(), LiveBytes() as live:
        calibrate(Readers(weights, gram, len(x)), Nf4())
    assert 0.85 < live.peak / workspace_bytes(sum(rows), features) <= 1.001


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(64, 64, 64), (2048, 1024)])
def test_memory_while_layers_with_different_inputs_are_rounded_is_what_is_said_of_it(rows):
    x, features = inputs(600, 512), 512
    gram, weights = x.T @ x, [weight_of((n, features), seed=n) for n in rows]
    readers = [Readers([weight], gram, len(x)) for weight in weights]
    calibrate(readers[0], Nf4())
    with torch.no_grad(), LiveBytes() as live:
        calibrate_together(readers, Nf4())
    assert 0.85 < live.peak / workspace_bytes(sum(rows), features, len(rows)) <= 1.001


def test_codes_follow_the_scales_as_they_are_read_back():
    # Every other row is far smaller, so that double quantization misses its scales.
    # Codes for the scales before that are worse there than rounding to nearest with the scales as read.
    x, weight = inputs(500, 64), weight_of((64, 64))
    weight[::2] *= 0.05
    found = calibrate(Readers([weight], x.T @ x, len(x)), Nf4())[0]
    assert found.stored is not None
    scales = found.stored.packed().state.absmax[:, None]
    codes = unpacked(found.stored.codes, weight.numel()).view(64, 64)
    grid = nf4_grid(CPU)
    nearest = grid.nearest(weight.float() / scales)
    ours, plain = (
        output_error((grid.read(c.int()) * scales - weight.float()).T.contiguous(), x.T @ x)[::2]
        for c in (codes, nearest)
    )
    assert float(ours.sum()) < 0.8 * float(plain.sum())


def test_bytes_of_rounding_by_hand():
    # Two matrices of 96 x 96 in float32, of which three are held for a moment: 3 x 2 x 36,864 = 73,728 and
    # 36,864 more at first. Later, beside the two and their factors (4 x 36,864 = 147,456): the weights, their
    # errors and codes, (2 x 4 + 1) x 40 x 96, and scales, 4 x 40 x 96, since 96 is no multiple of 64: 49,920;
    # what 16 columns need on the way; and the codes of one weight, 20 x 96 = 1,920.
    on_the_way = 7 * 4 * max(codes.WIDTH * 40, codes.BLOCKS * 64)
    assert workspace_bytes(40, 96, 2) == 147_456 + 49_920 + on_the_way + 1_920
    assert workspace_bytes(40, 96) == 73_728 + 49_920 + on_the_way  # nothing lies side by side
    assert workspace_bytes(1, 4096) == 3 * 4 * 4096**2  # factors of one matrix, while they are made
