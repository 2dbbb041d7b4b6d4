"""Education scenes: two crossing lines with a marker for today, or four bars with a target."""

from __future__ import annotations

import torch
from torch import Tensor

from qprobe.demo.draw import Dice, blank, box, capsule, constant, digit, field, paint, pixels, radians
from qprobe.demo.kinds import Part, SceneStyle

COLOURS = ("red", "blue", "green", "orange", "black")
RGB = (
    *(0.85, 0.12, 0.12),
    *(0.12, 0.25, 0.85),
    *(0.10, 0.60, 0.20),
    *(0.95, 0.60, 0.10),
    *(0.08, 0.08, 0.10),
)
STEPS = 5  # readings a unit of the axes, which run from 0 to 10
COORDINATES = tuple(2 + n / STEPS for n in range(31))  # of crossing points
BARS = 4
BAR_VALUES = tuple(1 + n / STEPS for n in range(45))
LEFT, BOTTOM, UNIT = 24.0, 120.0, 10.0  # origin of the axes and pixels a unit

LINE_PARTS = (
    Part(tuple(f"The {c} line rises" for c in COLOURS), "rising"),
    Part(tuple(f" and meets the {c} line" for c in COLOURS), "falling"),
    Part(tuple(f" at x {v}" for v in COORDINATES), "x"),
    Part(tuple(f" and y {v}," for v in COORDINATES), "y"),
    Part((" today is before it,", " today is after it,"), "today"),
    Part(tuple(f" so {c} leads." for c in COLOURS), "leader"),
)
BAR_PARTS = (
    Part(tuple(f"Bar {n} is highest" for n in range(1, BARS + 1)), "highest bar"),
    Part(tuple(f" with {v}" for v in BAR_VALUES), "highest value"),
    Part(tuple(f" and bar {n} is lowest" for n in range(1, BARS + 1)), "lowest bar"),
    Part(tuple(f" at {v}," for v in BAR_VALUES), "lowest value"),
    Part((" so the target is missed.", " so the target is met."), "target"),
)


def _axes(dice: Dice) -> Tensor:
    image = blank(len(dice), (0.98, 0.98, 0.96), dice.device)
    zero = torch.zeros(len(dice), dtype=torch.int64, device=dice.device)
    for n in range(11):
        at_x, at_y = LEFT + n * UNIT, BOTTOM - n * UNIT
        length = 5.0 if n % 5 == 0 else 2.5
        image = paint(image, box(dice, LEFT - length / 2, at_y, (length / 2, 0.5)), (0.1, 0.1, 0.1))
        image = paint(image, box(dice, at_x, BOTTOM + length / 2, (0.5, length / 2)), (0.1, 0.1, 0.1))
    for n in (0, 5):
        image = paint(image, digit(zero + n, LEFT - 12, BOTTOM - n * UNIT, 9.0), (0.1, 0.1, 0.1))
    image = paint(image, box(dice, LEFT, BOTTOM - 52, (0.8, 52.0)), (0.1, 0.1, 0.1))
    return paint(image, box(dice, LEFT + 52, BOTTOM, (52.0, 0.8)), (0.1, 0.1, 0.1))


def _dashed(distance: Tensor, along: Tensor) -> Tensor:
    """The line `distance`, with gaps every 6 pixels along the field `along`."""
    return torch.maximum(distance, (along % 6.0 - 1.5).abs() - 1.5)


def _line(image: Tensor, through: tuple[Tensor, Tensor], angle: Tensor, colour: Tensor) -> Tensor:
    """A line through a point, clipped to the plot; angle: radians, positive rises."""
    px, py = pixels(angle)
    dx, dy = 120 * angle.cos(), 120 * angle.sin()
    x, y = through
    distance = capsule(angle, (x - dx, y + dy), (x + dx, y - dy), 2.4)
    frame = torch.maximum((px - (LEFT + 50)).abs() - 50, (py - (BOTTOM - 50)).abs() - 50)
    return paint(image, torch.maximum(distance, frame), colour)


def draw_lines(dice: Dice) -> tuple[Tensor, Tensor]:
    """A batch of plots with two lines; see SceneStyle."""
    rising = dice.integer(0, len(COLOURS) - 1)
    falling = (rising + dice.integer(1, len(COLOURS) - 1)) % len(COLOURS)
    x_index, y_index = dice.integer(0, len(COORDINATES) - 1), dice.integer(0, len(COORDINATES) - 1)
    x = LEFT + UNIT * (COORDINATES[0] + x_index / STEPS) + dice.rounding(UNIT / STEPS)
    y = BOTTOM - UNIT * (COORDINATES[0] + y_index / STEPS) + dice.rounding(UNIT / STEPS)
    late = dice.integer(0, 1)
    marker = x + dice.uniform(10, 22) * (2 * late - 1)

    image = _axes(dice)
    _, py = pixels(dice)
    today = _dashed(box(dice, marker, BOTTOM - 50, (0.8, 50.0)), py)
    image = paint(image, today, (0.45, 0.45, 0.50))
    colours = constant(RGB, image.device).view(-1, 3)
    image = _line(image, (x, y), -radians(dice.uniform(15, 50)), colours[falling])
    image = _line(image, (x, y), radians(dice.uniform(15, 50)), colours[rising])

    leader = torch.where(late == 1, rising, falling)
    choices = torch.stack((rising, falling, x_index, y_index, late, leader), dim=1)
    return image, choices


def draw_bars(dice: Dice) -> tuple[Tensor, Tensor]:
    """A batch of bar charts; see SceneStyle."""
    least_gap, last = 5, len(BAR_VALUES) - 1  # the highest bar is at least one unit above the lowest
    low = dice.integer(0, last - least_gap)
    high = low + least_gap + (dice.uniform(0, 1) * (last - least_gap - low + 1)).floor().long()
    lowest = dice.integer(0, BARS - 1)
    highest = (lowest + dice.integer(1, BARS - 1)) % BARS
    met = dice.integer(0, 1)
    target = BAR_VALUES[0] + high / STEPS + dice.uniform(0.5, 1.2) * (1 - 2 * met)

    image = _axes(dice)
    zero = torch.zeros(len(dice), dtype=torch.int64, device=dice.device)
    shift, hue = dice.uniform(-2, 2), dice.integer(0, len(COLOURS) - 1)
    colour = 0.25 + 0.7 * constant(RGB, image.device).view(-1, 3)[hue]
    for n in range(BARS):
        between = low + 1.5 + dice.uniform(0, 1) * (high - low - 3)
        value = torch.where(highest == n, high + 0.0, torch.where(lowest == n, low + 0.0, between))
        height = (BAR_VALUES[0] + value / STEPS) * UNIT + dice.rounding(UNIT / STEPS)
        x = LEFT + 17 + 23 * n + shift
        image = paint(image, box(dice, x, BOTTOM - height / 2, (dice.uniform(6, 8), height / 2)), colour)
        image = paint(image, digit(zero + n + 1, x, BOTTOM + 10, 9.0), (0.1, 0.1, 0.1))
    px, _ = pixels(dice)
    dash = _dashed(box(dice, LEFT + 50, BOTTOM - target * UNIT, (50.0, 0.8)), px + field(shift))
    image = paint(image, dash, (0.75, 0.10, 0.55))

    choices = torch.stack((highest, high, lowest, low, met), dim=1)
    return image, choices


QUESTION = "What does the plot show, at which values, and what follows?"
LINES = SceneStyle("education", QUESTION, LINE_PARTS, draw_lines)
BAR_CHART = SceneStyle("education", QUESTION, BAR_PARTS, draw_bars)
