"""Batched drawing on torch: seeded dice, signed distances, anti-aliased paint, a 3 x 5 font.

Every function works on a whole batch of scenes, on any device. Coordinates are pixels, x to the
right and y down, the centre of the first pixel at (0.5, 0.5). A number of a scene is a tensor of
shape (N,) or a plain float shared by all scenes; a field is (N, SIZE, SIZE).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

SIZE = 140  # 10 x 10 patches of 14 pixels, the patch size of Llama 3.2 Vision
DRAWS = 64  # random numbers a scene may use; the busiest style takes about half

Number = Tensor | float
Point = tuple[Number, Number]
Colour = Tensor | tuple[float, float, float]

# splitmix64 (Steele, Lea, Flood 2014), its constants as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _mix(x: Tensor) -> Tensor:
    # torch shifts int64 arithmetically; the masks make the shifts logical.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _step(n: int) -> int:
    """n steps of the golden-ratio sequence, wrapped to a signed 64-bit integer."""
    return (n * _GOLDEN + 2**63) % 2**64 - 2**63


def scene_keys(seed: int, numbers: Tensor) -> Tensor:
    """One 64-bit key for each scene: a hash of the seed and of the scene's number.

    numbers: (N,) int64. The key is all that a drawing depends on, so scene 5 of a seed is the same
    whether ten or a thousand scenes are drawn, and on any device up to float rounding.
    """
    return _mix(_mix(numbers * _GOLDEN) + _step(seed))


def uniforms(keys: Tensor) -> Tensor:
    """(N, DRAWS) float32 in [0, 1): all the random draws that a scene may make, from its key."""
    streams = torch.arange(1, DRAWS + 1, device=keys.device) * _GOLDEN
    return ((_mix(keys[:, None] + streams) >> 40) & 0xFFFFFF).float() * 2.0**-24


class Dice:
    """The random draws of a batch of scenes, taken one after the other from `uniforms`.

    spread: how far a drawn quantity may lie from the printed value that names it. 1 reaches the
    middle between two printed values, where only a precise reader rounds right; 0 is exact.
    """

    def __init__(self, draws: Tensor, spread: float) -> None:
        self.device = draws.device
        self._draws = draws
        self._spread = spread
        self._taken = 0

    def __len__(self) -> int:
        return len(self._draws)

    def uniform(self, low: float, high: float) -> Tensor:
        """(N,) float32 in [low, high)."""
        self._taken += 1
        return low + (high - low) * self._draws[:, self._taken - 1]

    def rounding(self, step: float) -> Tensor:
        """(N,) what rounding to a multiple of `step` takes away: within half a step, times the spread."""
        half = self._spread * step / 2
        return self.uniform(-half, half)

    def integer(self, low: int, high: int) -> Tensor:
        """(N,) int64 from low to high, both included."""
        return (low + self.uniform(0, high - low + 1).floor().clamp(max=high - low)).long()


OnDevice = Tensor | Dice  # says on which device to draw


def field(value: Number) -> Tensor | float:
    """A number of each scene, shaped (N, 1, 1) to meet pixel fields."""
    return value[:, None, None] if isinstance(value, Tensor) else value


def pixels(like: OnDevice) -> tuple[Tensor, Tensor]:
    """x and y of every pixel centre, each (1, SIZE, SIZE), on the device of `like`."""
    line = torch.arange(SIZE, device=like.device, dtype=torch.float32) + 0.5
    return line.view(1, 1, SIZE).expand(1, SIZE, SIZE), line.view(1, SIZE, 1).expand(1, SIZE, SIZE)


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A tensor of fixed values, copied to the device once: a copy for every stroke would stall a GPU."""
    return torch.tensor(values, device=device)


def blank(count: int, colour: Colour, device: torch.device) -> Tensor:
    """(N, 3, SIZE, SIZE) image of one colour."""
    rgb = colour if isinstance(colour, Tensor) else constant(colour, device)[None]
    return rgb[:, :, None, None].expand(count, 3, SIZE, SIZE)


def paint(image: Tensor, distance: Tensor, colour: Colour, opacity: Number = 1.0) -> Tensor:
    """The image with `colour` where the signed distance is negative, blended over one pixel of edge."""
    mask = ((0.5 - distance).clamp(0, 1) * field(opacity))[:, None]
    rgb = colour if isinstance(colour, Tensor) else constant(colour, image.device)[None]
    return torch.lerp(image, rgb[:, :, None, None].expand_as(image), mask.expand_as(image))


def disc(like: OnDevice, x: Number, y: Number, radius: Number) -> Tensor:
    """Signed distance to a disc."""
    px, py = pixels(like)
    return torch.hypot(px - field(x), py - field(y)) - field(radius)


def ring(like: OnDevice, x: Number, y: Number, radius: Number, width: float) -> Tensor:
    """Signed distance to a ring of the given line width."""
    return disc(like, x, y, radius).abs() - width / 2


def box(like: OnDevice, x: Number, y: Number, half: tuple[Number, Number], angle: Number = 0.0) -> Tensor:
    """Signed distance to a box with half sizes (width, height), turned clockwise by `angle` radians."""
    px, py = pixels(like)
    dx, dy = px - field(x), py - field(y)
    turn = angle if isinstance(angle, Tensor) else torch.full((1,), angle, device=like.device)
    cos, sin = field(turn.cos()), field(turn.sin())
    outside_x = (dx * cos + dy * sin).abs() - field(half[0])
    outside_y = (dy * cos - dx * sin).abs() - field(half[1])
    corner = torch.hypot(outside_x.clamp(min=0), outside_y.clamp(min=0))
    return corner + torch.maximum(outside_x, outside_y).clamp(max=0)


def capsule(like: OnDevice, start: Point, end: Point, width: Number) -> Tensor:
    """Signed distance to a line with round ends."""
    px, py = pixels(like)
    ax, ay = px - field(start[0]), py - field(start[1])
    bx, by = field(end[0]) - field(start[0]), field(end[1]) - field(start[1])
    along = ((ax * bx + ay * by) / (bx * bx + by * by + 1e-6)).clamp(0, 1)
    return torch.hypot(ax - bx * along, ay - by * along) - field(width) / 2


# 3 x 5 bitmaps, rows from the top.
_GLYPHS = (
    ("111", "101", "101", "101", "111"),
    ("010", "110", "010", "010", "111"),
    ("111", "001", "111", "100", "111"),
    ("111", "001", "111", "001", "111"),
    ("101", "101", "111", "001", "001"),
    ("111", "100", "111", "001", "111"),
    ("111", "100", "111", "101", "111"),
    ("111", "001", "001", "010", "010"),
    ("111", "101", "111", "101", "111"),
    ("111", "101", "111", "001", "111"),
)


@cache
def _font(device: torch.device) -> Tensor:
    rows = [[[float(bit) for bit in row] for row in glyph] for glyph in _GLYPHS]
    return torch.tensor(rows, device=device)[:, None]


def digit(value: Tensor, x: Number, y: Number, height: float) -> Tensor:
    """Distance field of one digit a scene, centred at (x, y); value: (N,) int64 from 0 to 9."""
    px, py = pixels(value)
    u = (px - field(x)) / (height * 0.3)
    v = (py - field(y)) / (height * 0.5)
    count = value.shape[0]
    grid = torch.stack((u.expand(count, SIZE, SIZE), v.expand(count, SIZE, SIZE)), dim=-1)
    ink = functional.grid_sample(_font(value.device)[value], grid, mode="bilinear", align_corners=False)
    return 0.5 - (3 * ink[:, 0] - 1).clamp(0, 1)


def hsv(hue_degrees: Tensor, saturation: Number, value: Number) -> Tensor:
    """(N, 3) RGB of a hue in degrees; saturation and value in 0 to 1, floats or (N,)."""
    offsets = constant((5.0, 3.0, 1.0), hue_degrees.device)
    k = (offsets + hue_degrees[:, None] / 60) % 6
    wave = torch.minimum(k, 4 - k).clamp(0, 1)
    s = saturation[:, None] if isinstance(saturation, Tensor) else saturation
    v = value[:, None] if isinstance(value, Tensor) else value
    return v * (1 - s * wave)


def photograph(image: Tensor, keys: Tensor, grain: float) -> Tensor:
    """uint8 pixels of drawn scenes: contrast and brightness vary a little, then comes pixel noise.

    image: (N, 3, SIZE, SIZE) in 0 to 1. grain: amplitude of the uniform noise, on the same scale.
    The draws come after those of the scene itself.
    """
    stream = torch.arange(DRAWS + 1, DRAWS + 3 + SIZE * SIZE, device=keys.device) * _GOLDEN
    bits = (_mix(keys[:, None] + stream) >> 40) & 0xFFFFFF
    draws = bits.float() * 2.0**-23 - 1
    contrast, brightness = 1 + 0.1 * draws[:, 0], 0.04 * draws[:, 1]
    noise = grain * draws[:, 2:].view(-1, 1, SIZE, SIZE)
    lit = (image - 0.5) * contrast[:, None, None, None] + 0.5 + brightness[:, None, None, None]
    return ((lit + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def radians(degrees: Tensor) -> Tensor:
    """Degrees as radians."""
    return degrees * (math.pi / 180)
