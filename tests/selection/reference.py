"""Slow, obvious oracles for choosing layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import fsum, isfinite, nan

from qprobe.records import Inventory


def best_value(costs: Sequence[int], values: Sequence[float], limit: int) -> float:
    """The greatest sum of values within `limit`, by trying every subset."""
    best = 0.0
    for take in product((False, True), repeat=len(costs)):
        if sum(c for c, t in zip(costs, take, strict=True) if t) <= limit:
            best = max(best, fsum(v for v, t in zip(values, take, strict=True) if t))
    return best


def all_skiplists(inventory: Inventory, scores: Mapping[str, float]) -> list[tuple[int, float]]:
    """(total bytes, score) of every allowed list: whole groups, every layer scored, of positive sum."""
    members: dict[str, list[str]] = {}
    for layer in inventory.layers:
        if layer.fixed is None:
            members.setdefault(layer.group, []).append(layer.name)
    scored = [names for names in members.values() if all(isfinite(scores.get(x, nan)) for x in names)]
    groups = [names for names in scored if fsum(scores[x] for x in names) > 0]
    skiplists = []
    for take in product((False, True), repeat=len(groups)):
        kept = [name for names, t in zip(groups, take, strict=True) if t for name in names]
        skiplists.append((inventory.total_bytes(frozenset(kept)), fsum(scores[name] for name in kept)))
    return skiplists
