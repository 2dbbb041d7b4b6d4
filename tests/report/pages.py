"""What the tests of the page ask of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page

from qprobe.report.write import page_of
from qprobe.runs.folder import RunFolder

MINUS = "\N{MINUS SIGN}"
Open = Callable[..., Page]


def page_file(folder: Path) -> Path:
    """The page of the run `folder`, without the pictures, which take longer."""
    file = folder / "index.html"
    file.write_bytes(page_of(RunFolder(folder)))
    return file


def names(page: Page) -> list[str]:
    """The layers of the table from top to bottom, by full name."""
    return page.locator("#rows tbody th button").evaluate_all("all => all.map(b => b.title)")


def marked(page: Page, panel: str, how: str = "kept") -> set[int]:
    """Indices of the layers drawn in one chart as kept, or as in 16-bit `always`."""
    found = page.locator(f"svg[data-panel={panel}] path.{how}").evaluate_all(
        "all => all.map(p => p.dataset.layer)"
    )
    return {int(i) for i in found}


def boxes_of(page: Page, selector: str) -> list[tuple[float, float, float, float]]:
    """(left, right, top, bottom) of everything that `selector` finds, in pixels of the window."""
    found = page.locator(selector).evaluate_all(
        "all => all.map(t => t.getBoundingClientRect()).map(b => [b.left, b.right, b.top, b.bottom])"
    )
    return [tuple(box) for box in found]


def overlapping(boxes: list[tuple[float, float, float, float]]) -> list[tuple[int, int]]:
    """Pairs of boxes that share more than a rounding error of a pixel."""
    return [
        (i, i + 1 + k)
        for i, (left, right, top, bottom) in enumerate(boxes)
        for k, (l2, r2, t2, b2) in enumerate(boxes[i + 1 :])
        if min(right, r2) - max(left, l2) > 0.5 and min(bottom, b2) - max(top, t2) > 0.5
    ]


def downloaded(page: Page, to: Path) -> Path:
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(to)
    return to


def move_slider(page: Page, position: int) -> None:
    page.locator("#slider").fill(str(position))
