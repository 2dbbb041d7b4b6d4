"""Industrial scenes: a pressure gauge in a flange with six numbered bolt holes, one of them damaged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qprobe.demo.draw import Dice, blank, capsule, constant, digit, disc, field, paint, pixels, radians, ring
from qprobe.demo.kinds import Part, SceneStyle

HOLES = 6
STEP_BAR = 2
READINGS_BAR = tuple(range(0, 101, STEP_BAR))
SWEEP_DEGREES = 270  # from lower left over the top to lower right
ADVICE = (" keep it running.", " repair it soon.", " stop it now.")

PARTS = (
    Part(("The gauge",)),
    Part(tuple(f" reads {r} bar," for r in READINGS_BAR), "reading"),
    Part((" below the limit,", " above the limit,"), "limit"),
    Part((" with rust", " with a loose bolt", " with a crack", " with a missing bolt"), "defect"),
    Part(tuple(f" at hole {n}:" for n in range(1, HOLES + 1)), "hole"),
    Part(ADVICE, "advice"),
)


def _point(centre: tuple[Tensor, Tensor], angle: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The point at a clockwise angle (radians, 0 is up) and a distance from the centre."""
    return centre[0] + radius * angle.sin(), centre[1] - radius * angle.cos()


def _dial_angle(reading: Tensor) -> Tensor:
    """Needle angle in radians of a reading in bar."""
    turn = reading / READINGS_BAR[-1] - 0.5
    return turn * (SWEEP_DEGREES * math.pi / 180)


def _gauge(image: Tensor, centre: tuple[Tensor, Tensor], reading: Tensor, limit: Tensor) -> Tensor:
    image = paint(image, disc(centre[0], *centre, 31.0), (0.15, 0.16, 0.18))
    image = paint(image, disc(centre[0], *centre, 28.5), (0.94, 0.94, 0.92))
    for mark in range(0, 101, 10):
        angle = _dial_angle(torch.full_like(reading, mark))
        tick = capsule(reading, _point(centre, angle, 23.0), _point(centre, angle, 27.0), 1.2)
        image = paint(image, tick, (0.25, 0.25, 0.28))
    red = capsule(
        reading, _point(centre, _dial_angle(limit), 22.0), _point(centre, _dial_angle(limit), 30.0), 3.0
    )
    image = paint(image, red, (0.90, 0.10, 0.10))
    needle = capsule(reading, centre, _point(centre, _dial_angle(reading), 21.0), 2.2)
    image = paint(image, needle, (0.10, 0.10, 0.12))
    return paint(image, disc(reading, *centre, 3.5), (0.10, 0.10, 0.12))


def _damage(
    image: Tensor, hole: tuple[Tensor, Tensor], outward: Tensor, defect: Tensor, twist: Tensor
) -> Tensor:
    """The damaged hole, drawn over a sound one; `defect` indexes the words of PARTS."""
    x, y = hole
    px, py = pixels(x)
    spots = 2.0 * torch.sin(0.9 * px + field(3 * twist)) * torch.sin(0.8 * py - field(5 * twist))
    image = paint(image, disc(x, x, y, 9.5) + spots, (0.55, 0.27, 0.10), 0.9 * (defect == 0))
    image = paint(image, disc(x, x, y, 6.0), (0.12, 0.12, 0.13), 1.0 * ((defect == 1) | (defect == 3)))
    loose = _point(hole, twist, 3.5)
    image = paint(image, disc(x, *loose, 4.5), (0.85, 0.80, 0.55), 1.0 * (defect == 1))
    bend = _point(hole, outward + 1.9, 9.0)
    crack = torch.minimum(
        capsule(x, _point(hole, outward - 2.2, 11.0), bend, 1.8),
        capsule(x, bend, _point(hole, outward + 0.9, 13.0), 1.8),
    )
    return paint(image, crack, (0.05, 0.05, 0.06), 1.0 * (defect == 2))


def draw(dice: Dice) -> tuple[Tensor, Tensor]:
    """A batch of industrial scenes; see SceneStyle."""
    reading_index, defect = dice.integer(0, len(READINGS_BAR) - 1), dice.integer(0, 3)
    damaged, turn = dice.integer(0, HOLES - 1), radians(dice.uniform(-25, 25))
    gap = dice.uniform(9, 30) * (2 * dice.integer(0, 1) - 1)
    reading = STEP_BAR * reading_index + dice.rounding(STEP_BAR)
    # A limit outside the scale moves to the other side of the needle.
    limit = torch.where((reading + gap < 0) | (reading + gap > 100), reading - gap, reading + gap)
    centre = (dice.uniform(67, 73), dice.uniform(67, 73))

    steel = dice.uniform(0.55, 0.72)
    image = blank(len(dice), (0.30, 0.33, 0.38), dice.device)
    image = paint(
        image,
        disc(dice, *centre, 66.0),
        steel[:, None] * constant((0.97, 1.0, 1.04), dice.device),
    )
    image = paint(image, ring(dice, *centre, 65.0, 2.0), (0.20, 0.21, 0.23))
    image = _gauge(image, centre, reading, limit)
    for n in range(HOLES):
        angle = turn + n * (2 * math.pi / HOLES)
        hole = _point(centre, angle, 43.0)
        image = paint(image, disc(dice, *hole, 6.0), (0.25, 0.26, 0.28))
        image = paint(image, disc(dice, *hole, 4.5), (0.85, 0.80, 0.55))
        number = torch.full_like(damaged, n + 1)
        image = paint(image, digit(number, *_point(centre, angle, 57.5), 10.0), (0.05, 0.05, 0.10))
    outward = turn + damaged * (2 * math.pi / HOLES)
    image = _damage(image, _point(centre, outward, 43.0), outward, defect, radians(dice.uniform(0, 360)))

    above = (reading > limit).long()
    advice = torch.where(above == 1, 2, (defect >= 2).long())
    fixed = torch.zeros_like(above)
    choices = (fixed, reading_index, above, defect, damaged, advice)
    return image, torch.stack(choices, dim=1)


INDUSTRIAL = SceneStyle("industrial", "What does the gauge read, what is damaged, and what now?", PARTS, draw)
