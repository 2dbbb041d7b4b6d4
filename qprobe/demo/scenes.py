"""Scenes of four kinds, drawn by us, each with a prompt, an answer and the facts the answer states.

Seeds: one seed is one endless series of scenes, and scene `n` of a seed never changes. Calibration has
the seeds from CALIBRATION_SEED up to HELD_OUT_SEED, held-out scenes those up to TRAINING_SEED, and
training all above, one for each step; so no scene is in two of the three sets.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from qprobe.demo.draw import Dice, photograph, scene_keys, uniforms
from qprobe.demo.ecommerce import ECOMMERCE
from qprobe.demo.education import BAR_CHART, LINES
from qprobe.demo.industrial import INDUSTRIAL
from qprobe.demo.kinds import SceneStyle
from qprobe.demo.medical import MEDICAL
from qprobe.records import Fact, Sample, asked

CALIBRATION_SEED = 1_000
HELD_OUT_SEED = 2_000
TRAINING_SEED = 1_000_000

KINDS = ("medical", "industrial", "e-commerce", "education")
# Scene n is drawn in style n % 8: the kinds take turns, and education alternates lines and bars.
CYCLE = (MEDICAL, INDUSTRIAL, ECOMMERCE, LINES, MEDICAL, INDUSTRIAL, ECOMMERCE, BAR_CHART)
STYLES = (MEDICAL, INDUSTRIAL, ECOMMERCE, LINES, BAR_CHART)
# What keeps the model at its limit, in training as on calibration and held-out scenes: a gauge shows any
# pressure and the answer rounds it to the nearest printed value (see `Dice`), and photographs are grainy,
# so that a reading near the middle between two values stays uncertain for a calibrated reader.
SPREAD = 1.0
GRAIN = 0.24
_CHUNK = 64  # scenes of one style drawn at once: 64 images of float32 fields stay below 100 MB


def scenes(count: int, seed: int) -> list[Sample]:
    """The first `count` scenes of a seed, the four kinds in turn.

    Each has an RGB PNG of SIZE x SIZE pixels, a prompt, an answer of one sentence and its facts.
    `scenes(10, s)` are the first ten of `scenes(100, s)`.
    """
    drawn: dict[int, Sample] = {}
    for style in STYLES:
        numbers = [n for n in range(count) if CYCLE[n % len(CYCLE)] is style]
        for start in range(0, len(numbers), _CHUNK):
            part = numbers[start : start + _CHUNK]
            drawn.update(zip(part, _draw(style, seed, part), strict=True))
    return [drawn[n] for n in range(count)]


def _draw(style: SceneStyle, seed: int, numbers: list[int]) -> Iterator[Sample]:
    keys = scene_keys(seed, torch.tensor(numbers))
    image, choices = style.draw(Dice(uniforms(keys), SPREAD))
    rows: list[list[int]] = choices.tolist()
    for number, pixels, chosen in zip(numbers, photograph(image, keys, GRAIN), rows, strict=True):
        yield Sample(
            id=f"{style.kind}-{number // len(KINDS):04d}",
            turns=asked(style.prompt, _png(pixels)),
            answer=style.answer(chosen),
            facts=_facts(style, chosen),
            kind=style.kind,
        )


def _facts(style: SceneStyle, choices: list[int]) -> tuple[Fact, ...]:
    parts = zip(style.parts, choices, strict=True)
    return tuple(Fact(part.fact, part.phrase(choice)) for part, choice in parts if part.fact)


def _png(pixels: Tensor) -> bytes:
    """PNG bytes of a (3, H, W) uint8 image."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG")
    return file.getvalue()
