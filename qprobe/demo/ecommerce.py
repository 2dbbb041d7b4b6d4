"""E-commerce scenes: a product card with a dimension line and a status badge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qprobe.demo.draw import (
    Dice,
    OnDevice,
    blank,
    box,
    capsule,
    constant,
    disc,
    field,
    hsv,
    paint,
    pixels,
    ring,
)
from qprobe.demo.kinds import Part, SceneStyle

PRODUCTS = ("mug", "bottle", "bag", "lamp", "shirt", "chair")
HUES = (
    *("red", "vermilion", "orange", "amber", "yellow", "lemon", "lime", "grass"),
    *("green", "emerald", "jade", "mint", "cyan", "sky", "azure", "cobalt"),
    *("blue", "indigo", "violet", "purple", "magenta", "pink", "rose", "crimson"),
)
MATERIALS = ("plastic", "wood", "steel", "cotton", "leather")
SIZES_CM = tuple(10 + n / 2 for n in range(31))
PIXELS_PER_CM = 4.0
BADGE_RGB = (0.90, 0.15, 0.15, 0.10, 0.65, 0.25, 0.35, 0.35, 0.38)  # a colour for each status
STATUS = (" and on sale.", " and new.", " and sold out.")

PARTS = (
    Part(tuple(f"This {p}" for p in PRODUCTS), "product"),
    Part(tuple(f" in {h}" for h in HUES), "colour"),
    Part(tuple(f" is made of {m}," for m in MATERIALS), "material"),
    Part(tuple(f" {s} cm tall" for s in SIZES_CM), "size"),
    Part(STATUS, "status"),
)


def _union(*distances: Tensor) -> Tensor:
    result = distances[0]
    for distance in distances[1:]:
        result = torch.minimum(result, distance)
    return result


def _shapes(like: OnDevice, x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Signed distances to each product, in the order of PRODUCTS; h: half of its height in pixels."""
    mug = _union(box(like, x - 0.15 * h, y, (0.6 * h, h)), ring(like, x + 0.5 * h, y, 0.4 * h, 6.0))
    bottle = _union(
        box(like, x, y + 0.35 * h, (0.42 * h, 0.65 * h)),
        box(like, x, y - 0.5 * h, (0.17 * h, 0.5 * h)),
    )
    bag = _union(
        box(like, x, y + 0.3 * h, (0.75 * h, 0.7 * h)), ring(like, x, y - 0.4 * h, 0.6 * h - 2.5, 5.0)
    )
    lamp = _union(
        box(like, x, y - 0.6 * h, (0.62 * h, 0.4 * h)),
        box(like, x, y + 0.3 * h, (0.10 * h, 0.65 * h)),
        box(like, x, y + 0.9 * h, (0.5 * h, 0.1 * h)),
    )
    shirt = _union(
        box(like, x, y, (0.5 * h, h)),
        box(like, x - 0.55 * h, y - 0.6 * h, (0.35 * h, 0.24 * h), -0.5),
        box(like, x + 0.55 * h, y - 0.6 * h, (0.35 * h, 0.24 * h), 0.5),
    )
    chair = _union(
        box(like, x - 0.45 * h, y, (0.13 * h, h)),
        box(like, x + 0.1 * h, y + 0.1 * h, (0.6 * h, 0.14 * h)),
        box(like, x + 0.55 * h, y + 0.5 * h, (0.13 * h, 0.5 * h)),
    )
    return mug, bottle, bag, lamp, shirt, chair


def _shade(like: OnDevice, material: Tensor, x: Tensor, phase: Tensor) -> Tensor:
    """(N, SIZE, SIZE) brightness factor of each material's texture, which repeats every 7 pixels."""
    px, py = pixels(like)
    wave_x = torch.sin((px + field(phase)) * (2 * math.pi / 7))
    wave_y = torch.sin((py + field(phase)) * (2 * math.pi / 7))
    textures = (
        torch.ones_like(wave_x + wave_y),  # plastic is plain
        0.85 + 0.15 * wave_x + 0.0 * wave_y,  # wood has a grain
        1.15 - 0.5 * ((px - field(x)) / 18).abs().clamp(max=1) + 0.0 * wave_y,  # steel shines
        0.85 + 0.15 * wave_y + 0.0 * wave_x,  # cotton is ribbed
        1 - 0.4 * (wave_x * wave_y > 0.4),  # leather has pores
    )
    return torch.stack(textures, dim=1)[torch.arange(len(material), device=like.device), material]


def _badge(image: Tensor, status: Tensor, x: Tensor, y: Tensor) -> Tensor:
    colours = constant(BADGE_RGB, image.device).view(-1, 3)
    image = paint(image, disc(x, x, y, 9.0), colours[status])
    bar = capsule(x, (x - 4, y - 4), (x + 4, y + 4), 2.2)
    cross = torch.minimum(bar, capsule(x, (x - 4, y + 4), (x + 4, y - 4), 2.2))
    image = paint(image, bar, (1.0, 1.0, 1.0), 1.0 * (status == 0))
    image = paint(image, disc(x, x, y, 3.5), (1.0, 1.0, 1.0), 1.0 * (status == 1))
    return paint(image, cross, (1.0, 1.0, 1.0), 1.0 * (status == 2))


def draw(dice: Dice) -> tuple[Tensor, Tensor]:
    """A batch of e-commerce scenes; see SceneStyle."""
    product, hue = dice.integer(0, len(PRODUCTS) - 1), dice.integer(0, len(HUES) - 1)
    material, size = dice.integer(0, len(MATERIALS) - 1), dice.integer(0, len(SIZES_CM) - 1)
    status = dice.integer(0, len(STATUS) - 1)
    half = PIXELS_PER_CM / 2 * (size / 2 + SIZES_CM[0] + dice.rounding(0.5))
    x, y = dice.uniform(52, 60), dice.uniform(68, 76)
    colour = hsv(
        360 / len(HUES) * hue + dice.uniform(-4, 4), dice.uniform(0.6, 0.95), dice.uniform(0.65, 0.95)
    )

    image = blank(len(dice), (0.80, 0.80, 0.82), dice.device)
    image = paint(image, box(dice, 70.0, 70.0, (61.0, 61.0)) - 4.0, (0.97, 0.97, 0.96))
    shapes = torch.stack(_shapes(dice, x, y, half), dim=1)
    shape = shapes[torch.arange(len(dice), device=dice.device), product]
    shaded = colour[:, :, None, None] * _shade(dice, material, x, dice.uniform(-1, 1))[:, None]
    image = torch.lerp(image, shaded, (0.5 - shape).clamp(0, 1)[:, None].expand_as(image))
    image = paint(image, (shape + 0.7).abs() - 0.7, (0.15, 0.15, 0.17), 0.8)

    ruler = x + 52
    for end in (y - half, y + half):
        image = paint(image, capsule(dice, (ruler - 4, end), (ruler + 4, end), 1.5), (0.2, 0.2, 0.25))
    image = paint(image, capsule(dice, (ruler, y - half), (ruler, y + half), 1.5), (0.2, 0.2, 0.25))
    image = _badge(image, status, dice.uniform(119, 123), dice.uniform(17, 21))
    return image, torch.stack((product, hue, material, size, status), dim=1)


ECOMMERCE = SceneStyle("e-commerce", "Which product is this, of what size, and is it sold?", PARTS, draw)
