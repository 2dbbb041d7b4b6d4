"""Labels above the points of a plot, in rows of free headroom, so that none covers another."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes

_ROWS = 4
_ROW_PX = 11.0  # height of a row at 100 dpi and the font size below
_CHARACTER_PX = 5.2
_FONT_SIZE = 7
_GAP_PX = 8.0
_MARGIN_PX = 3.0


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


def label_points(ax: Axes, xs: list[int], ys: list[float], names: list[str], log: bool) -> None:
    """Write `names` above the points (xs, ys), most important first; what finds no room is left out.

    Raises the upper limit of y to make headroom for the rows that are used.
    """
    box = ax.get_window_extent()
    placed: list[tuple[_Placed, float, str]] = []
    for x, y, name in zip(xs, ys, names, strict=True):
        leader = float(ax.transData.transform((x, 1.0))[0])
        spot = _free_spot(leader, _CHARACTER_PX * len(name), box.x0, box.x1, [p for p, _, _ in placed])
        if spot is not None:
            placed.append((spot, y, name))
    if not placed:
        return
    rows = 1 + max(p.row for p, _, _ in placed)
    share = (rows * _ROW_PX + _MARGIN_PX + 6.0) / box.height
    _add_headroom(ax, min(share, 0.6), log)
    for spot, y, name in placed:
        _write(ax, spot, y, name, box.y1 - _MARGIN_PX - (rows - spot.row) * _ROW_PX)


def _free_spot(leader: float, width: float, low: float, high: float, placed: list[_Placed]) -> _Placed | None:
    for row in range(_ROWS):
        for shift in (0.5, 0.0, 1.0, 0.25, 0.75):
            left = min(max(leader - shift * width, low + 3), high - width - 3)
            spot = _Placed(left, left + width, leader, row)
            if not any(spot.collides(p) for p in placed):
                return spot
    return None


def _add_headroom(ax: Axes, share: float, log: bool) -> None:
    low, high = ax.get_ylim()
    grown = 1.0 / (1.0 - share)
    if log:
        ax.set_ylim(low, low * (high / low) ** grown)
    else:
        ax.set_ylim(low, low + (high - low) * grown)


def _write(ax: Axes, spot: _Placed, y: float, name: str, bottom_px: float) -> None:
    to_data = ax.transData.inverted().transform
    middle, bottom = to_data(((spot.left + spot.right) / 2, bottom_px))
    ax.text(middle, bottom, name, ha="center", va="bottom", fontsize=_FONT_SIZE, zorder=5, gid="spike")
    x = to_data((spot.leader, bottom_px))[0]
    ax.plot([x, x], [y, bottom], color="black", lw=0.5, alpha=0.55, zorder=2.5, gid="leader")
