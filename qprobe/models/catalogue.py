"""Models known by a short name: the embedded ones, and those that the families list."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache

from qprobe.models.entry import Entry
from qprobe.models.families import families

EMBEDDED: tuple[Entry, ...] = tuple(
    Entry(alias, None, "MllamaForConditionalGeneration", f"embedded; {note}", geometry="demo")
    for alias, note in (
        ("demo", "a small model trained on drawn scenes, needs no network"),
        ("demo-outliers", "demo re-parameterized so that planted layers break in 4-bit"),
    )
)


@cache
def entries() -> tuple[Entry, ...]:
    """Every model that is known by a short name: the embedded ones, then family by family."""
    return (*EMBEDDED, *(entry for family in families() for entry in family.entries))


def find(model: str) -> Entry | None:
    """The entry whose alias or hub id is `model`, upper and lower case alike; None if there is none."""
    wanted = model.lower()
    for entry in entries():
        if wanted in (entry.alias, (entry.hub_id or "").lower()):
            return entry
    return None


def nearest(model: str, count: int = 3) -> tuple[str, ...]:
    """At most `count` aliases that begin with `model`, else those spelt most like it; maybe none."""
    typed = model.lower().rpartition("/")[2]
    aliases = [entry.alias for entry in entries()]
    begun = [alias for alias in aliases if typed and alias.startswith(typed)]
    return tuple(begun[:count] or get_close_matches(typed, aliases, count, cutoff=0.5))
