"""Medical scenes: a row of eight teeth on an X-ray-like ground, and an arrow at one of them."""

from __future__ import annotations

import torch
from torch import Tensor

from qprobe.demo.draw import Dice, OnDevice, blank, box, capsule, disc, paint, radians
from qprobe.demo.kinds import Part, SceneStyle

TEETH = 8
STEP_DEGREES = 4
ANGLES_DEGREES = tuple(range(10, 67, STEP_DEGREES))
STEEP_INDEX = ANGLES_DEGREES.index(38)
ADVICE = (" so leave it.", " so straighten it.", " so watch it.", " so remove it.")

PARTS = (
    Part(tuple(f"Tooth {n}" for n in range(1, TEETH + 1)), "tooth"),
    Part((" is erupted", " is impacted"), "state"),
    Part((" and leans left", " and leans right"), "side"),
    Part(tuple(f" at {a} degrees," for a in ANGLES_DEGREES), "angle"),
    Part(ADVICE, "advice"),
)


def _tooth(like: OnDevice, x: Tensor, y: Tensor, angle: Tensor) -> Tensor:
    """Signed distance to a tooth: a crown and a thinner root below it, turned about its middle."""
    sin, cos = angle.sin(), angle.cos()
    crown = box(like, x + 8 * sin, y - 8 * cos, (4.5, 5.0), angle) - 1.5
    root = capsule(like, (x, y), (x - 13 * sin, y + 13 * cos), 7.0)
    return torch.minimum(crown, root)


def _arrow(like: OnDevice, x: Tensor, tip_y: Tensor) -> Tensor:
    shaft = capsule(like, (x, tip_y - 26), (x, tip_y), 2.5)
    left = capsule(like, (x, tip_y), (x - 6, tip_y - 8), 2.5)
    right = capsule(like, (x, tip_y), (x + 6, tip_y - 8), 2.5)
    return torch.minimum(shaft, torch.minimum(left, right))


def draw(dice: Dice) -> tuple[Tensor, Tensor]:
    """A batch of medical scenes; see SceneStyle."""
    subject, impacted, right = dice.integer(0, TEETH - 1), dice.integer(0, 1), dice.integer(0, 1)
    angle_index = dice.integer(0, len(ANGLES_DEGREES) - 1)
    left_x, row_y = dice.uniform(10, 16), dice.uniform(66, 72)
    pitch, bend = dice.uniform(15.4, 16.4), dice.uniform(-0.4, 0.6)

    image = blank(len(dice), (0.07, 0.08, 0.10), dice.device)
    image = paint(image, box(dice, 70.0, 118.0, (90.0, 34.0)), (0.24, 0.25, 0.27))  # the jaw
    for n in range(TEETH):
        away = 1000.0 * (subject == n)  # the subject is drawn last, not here
        y = row_y + bend * (n - 3.5) ** 2 + dice.uniform(-1.5, 1.5) + away
        tooth = _tooth(dice, left_x + pitch * n, y, radians(dice.uniform(-5, 5)))
        image = paint(image, tooth, (0.62, 0.64, 0.66))

    x = left_x + pitch * subject + dice.uniform(-1, 1)
    top = row_y + bend * (subject - 3.5) ** 2
    y = top + 36 * impacted + dice.uniform(-2, 2)
    lean = STEP_DEGREES * angle_index + ANGLES_DEGREES[0] + dice.rounding(STEP_DEGREES)
    tooth = _tooth(dice, x, y, radians(lean) * (2 * right - 1))
    image = paint(image, tooth - 2.0, (0.10, 0.11, 0.13))
    image = paint(image, tooth, (0.86, 0.87, 0.88))
    image = paint(image, disc(dice, x, y, 2.0), (0.45, 0.46, 0.48))  # the pulp
    image = paint(image, _arrow(dice, x + dice.uniform(-2, 2), top - 24), (0.95, 0.80, 0.25))

    advice = 2 * impacted + (angle_index >= STEEP_INDEX)
    return image, torch.stack((subject, impacted, right, angle_index, advice), dim=1)


MEDICAL = SceneStyle("medical", "Which tooth is marked, how does it stand, and what now?", PARTS, draw)
