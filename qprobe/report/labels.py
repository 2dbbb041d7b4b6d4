"""Labels above the points of a plot, in rows of free headroom, so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

_ROWS = 4
_ROW = 11.0 / 7  # height of a row and width of a character, in pixels at 100 dpi for each point of the font
_CHARACTER = 5.2 / 7
_GAP_PX = 8.0
_MARGIN_PX = 3.0
# How much of a label may lie left of its leader, in order of preference: centred looks best, to one
# side leaves more room for the label of a neighbour. The order that places most labels is taken.
_SHIFTS = ((0.5, 0.0, 1.0, 0.25, 0.75), (1.0, 0.0, 0.5), (0.0, 1.0, 0.5))


@dataclass(frozen=True)
class _Placed:
    """A label's horizontal extent and its leader's x, in pixels, and its row (0 is the lowest)."""

    left: float
    right: float
    leader: float
    row: int

    def collides(self, other: _Placed) -> bool:
        """True if the texts overlap, or the leader to the upper one crosses the lower one."""
        if self.row == other.row:
            return self.left < other.right + _GAP_PX and other.left < self.right + _GAP_PX
        upper, lower = (self, other) if self.row > other.row else (other, self)
        return lower.left - 2 < upper.leader < lower.right + 2


def label_points(
    ax: Axes, xs: list[int], ys: list[float], names: list[str], log: bool, font: float = 7
) -> None:
    """Write `names` above the points (xs, ys), most important first; what finds no room is left out.

    Raises the upper limit of y to make headroom for the rows that are used. font: in points.
    """
    row_px = _ROW * font
    box = ax.get_window_extent()
    leaders = [float(ax.transData.transform((x, 1.0))[0]) for x in xs]
    widths = [_CHARACTER * font * len(name) for name in names]
    orders = (range(len(xs)), sorted(range(len(xs)), key=lambda i: -xs[i]))
    attempts = [
        _place(leaders, widths, (box.x0, box.x1), shifts, order) for order in orders for shifts in _SHIFTS
    ]
    spots = max(attempts, key=lambda spots: sum(spot is not None for spot in spots))
    rows = 1 + max((spot.row for spot in spots if spot is not None), default=-1)
    if rows == 0:
        return
    _add_headroom(ax, min((rows * row_px + _MARGIN_PX + 6.0) / box.height, 0.6), log)
    for spot, y, name in zip(spots, ys, names, strict=True):
        if spot is not None:
            _write(ax, spot, y, name, box.y1 - _MARGIN_PX - (rows - spot.row) * row_px, font)


def _place(
    leaders: list[float],
    widths: list[float],
    edges: tuple[float, float],
    shifts: tuple[float, ...],
    order: Sequence[int],
) -> list[_Placed | None]:
    """A spot for each label, taken in `order`, that collides with none before it, or None.

    From right to left, neighbours make a staircase; else each may stand in the way of the next.
    """
    low, high = edges[0] + 3, edges[1] - 3
    spots: list[_Placed | None] = [None] * len(leaders)
    for i in order:
        lefts = [min(max(leaders[i] - shift * widths[i], low), high - widths[i]) for shift in shifts]
        candidates = (
            _Placed(left, left + widths[i], leaders[i], row) for row in range(_ROWS) for left in lefts
        )
        taken = [spot for spot in spots if spot is not None]
        spots[i] = next((c for c in candidates if not any(c.collides(t) for t in taken)), None)
    return spots


def _add_headroom(ax: Axes, share: float, log: bool) -> None:
    low, high = ax.get_ylim()
    grown = 1.0 / (1.0 - share)
    if log:
        ax.set_ylim(low, low * (high / low) ** grown)
    else:
        ax.set_ylim(low, low + (high - low) * grown)


def _write(ax: Axes, spot: _Placed, y: float, name: str, bottom_px: float, font: float) -> None:
    to_data = ax.transData.inverted().transform
    middle, bottom = to_data(((spot.left + spot.right) / 2, bottom_px))
    ax.text(middle, bottom, name, ha="center", va="bottom", fontsize=font, zorder=5, gid="spike")
    x = to_data((spot.leader, bottom_px))[0]
    ax.plot([x, x], [y, bottom], color="black", lw=0.5, alpha=0.55, zorder=2.5, gid="leader")
