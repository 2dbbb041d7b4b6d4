from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from qprobe.demo.draw import DRAWS, SIZE, Dice, constant, disc, paint, scene_keys, uniforms
from qprobe.demo.scenes import (
    CALIBRATION_SEED,
    CYCLE,
    HELD_OUT_SEED,
    KINDS,
    STYLES,
    TRAINING_SEED,
    scenes,
)
from qprobe.records import Fact


@pytest.mark.slow
def test_every_answer_states_its_facts_and_no_fact_twice():
    for sample in scenes(64, 7):
        assert sample.answer is not None
        assert sample.facts, sample.id
        for fact in sample.facts:
            assert fact.stated_in(sample.answer), (sample.id, fact)
            assert sample.answer.count(fact.phrase) == 1, (sample.id, fact)
        assert len({fact.name for fact in sample.facts}) == len(sample.facts)


@pytest.mark.parametrize("style", STYLES, ids=lambda s: f"{s.kind}-{s.parts[0].texts[0].split()[0]}")
def test_another_choice_of_a_part_never_states_the_fact(style):
    # If "at 4 degrees" were found in "at 44 degrees", a wrong reading would count as right.
    right = [0] * len(style.parts)
    for n, part in enumerate(style.parts):
        for choice in range(len(part.texts)):
            fact = Fact(part.fact or "", part.phrase(choice))
            for other in range(len(part.texts)):
                answer = style.answer([*right[:n], other, *right[n + 1 :]])
                assert fact.stated_in(answer) == (other == choice), (fact, answer)


def test_images_are_rgb_png_of_the_models_size_and_kinds_take_turns():
    samples = scenes(9, 3)
    for sample in samples:
        image = Image.open(io.BytesIO(sample.images[0]))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (SIZE, SIZE))
    assert [s.kind for s in samples] == [KINDS[n % 4] for n in range(9)]
    assert samples[4].id == "medical-0001"
    assert len(CYCLE) % len(KINDS) == 0


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_and_a_shorter_series_is_a_prefix():
    assert [s.digest for s in scenes(8, 11)] == [s.digest for s in scenes(16, 11)][:8]


@pytest.mark.slow
def test_calibration_held_out_and_training_scenes_are_disjoint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qprobe.demo.scenes._png", lambda pixels: pixels.numpy().tobytes())  # not compressed
    calibration = {s.digest for s in scenes(200, CALIBRATION_SEED)}
    held_out = {s.digest for s in scenes(200, HELD_OUT_SEED)}
    assert len(calibration) == len(held_out) == 200
    assert not calibration & held_out
    numbers = torch.arange(2000)
    seeds = [CALIBRATION_SEED, HELD_OUT_SEED, *range(TRAINING_SEED, TRAINING_SEED + 50)]
    keys = torch.cat([scene_keys(seed, numbers) for seed in seeds])
    assert len(keys.unique()) == len(keys)


def test_dice_are_uniform_and_independent_of_the_batch():
    draws = uniforms(scene_keys(5, torch.arange(4000)))
    assert draws.shape == (4000, DRAWS)
    # mean of 4,000 uniform numbers: 0.5 with standard error 0.0046
    assert float((draws.mean(0) - 0.5).abs().max()) < 5 * 0.0046
    faces = Dice(draws, 1.0).integer(1, 6)
    assert sorted(set(faces.tolist())) == [1, 2, 3, 4, 5, 6]
    assert torch.equal(uniforms(scene_keys(5, torch.tensor([17]))), draws[17:18])


def test_rounding_stays_within_the_spread_of_half_a_step():
    draws = uniforms(scene_keys(5, torch.arange(4000)))
    assert 0.9 < float(Dice(draws, 1.0).rounding(2.0).abs().max()) <= 1.0
    assert 0.36 < float(Dice(draws, 0.4).rounding(2.0).abs().max()) <= 0.4


def test_a_disc_covers_its_area():
    # pi * 20 ** 2 = 1256.6 pixels; anti-aliasing keeps the sum of the coverage
    black = torch.zeros(1, 3, SIZE, SIZE)
    image = paint(black, disc(black, 70.3, 69.8, 20.0), constant((1.0, 1.0, 1.0), black.device)[None])
    assert abs(float(image[0, 0].sum()) - 1256.6) < 5
