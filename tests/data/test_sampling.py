"""Which samples a command uses."""

from __future__ import annotations

import pytest

from qprobe.data.sampling import SCAN_SAMPLES, Wanted, choose_samples, split_held_out
from qprobe.errors import SampleError
from qprobe.records import Sample, asked


@pytest.mark.parametrize("seed", [-1, 1000, 2000])
@pytest.mark.parametrize("purpose", ["scan", "compare"])
def test_a_seed_that_could_draw_the_other_purpose_s_scenes_is_refused(seed: int, purpose):
    with pytest.raises(SampleError, match=f"--seed {seed} is out of range.* 0 to 999"):
        choose_samples("demo", True, Wanted(count=1, seed=seed), purpose)


@pytest.mark.parametrize("purpose", ["scan", "compare"])
def test_a_prompt_for_scenes_that_bring_their_own_is_refused(purpose):
    with pytest.raises(SampleError, match=r"--prompt does not apply to the built-in scenes"):
        choose_samples("demo", True, Wanted(prompt="What is it?", count=1), purpose)


def test_scenes_of_a_scan_are_never_those_of_a_comparison():
    drawn = {
        purpose: {
            s.digest
            for seed in (0, 999)
            for s in choose_samples("demo", True, Wanted(count=8, seed=seed), purpose).samples
        }
        for purpose in ("scan", "compare")
    }
    assert len(drawn["scan"]) == len(drawn["compare"]) == 16 and not drawn["scan"] & drawn["compare"]


def test_seeds_are_of_built_in_scenes_alone():
    first, second = (choose_samples("llama", False, Wanted(seed=seed), "scan") for seed in (0, 5000))
    assert first == second


def test_the_demo_is_scanned_on_more_scenes_than_a_user_has_images():
    assert SCAN_SAMPLES == {"demo": 192, "given": 32}
    assert len(choose_samples("demo-outliers", True, Wanted(), "scan").samples) == 192


@pytest.mark.parametrize("count", [0, -3])
def test_no_samples_are_no_request(count: int):
    with pytest.raises(SampleError, match=rf"--samples {count} asks for no sample"):
        choose_samples("llama", False, Wanted(count=count), "scan")


def test_every_third_sample_is_held_out():
    samples = choose_samples("llama", False, Wanted(count=7), "scan").samples
    calibration, held_out = split_held_out(samples)
    assert held_out == samples[2::3] and len(held_out) == 2
    assert [s for s in samples if s not in held_out] == list(calibration)
    assert split_held_out(samples[:2]) == (samples[:2], ())


def test_a_sample_given_twice_is_never_on_both_sides():
    rows = [Sample(f"{i}", asked(f"question {i % 4}")) for i in range(12)]
    calibration, held_out = split_held_out(tuple(rows))
    assert {x.prompt for x in held_out} == {"question 2"}
    assert not {x.digest for x in calibration} & {x.digest for x in held_out}
    assert len(calibration) + len(held_out) == 12
