"""The memory of a training step as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qprobe.report.terminal import paragraphs, text_table

_GIB, _MIB = 1 << 30, 1 << 20


def training_text(training: Mapping[str, Any], width: int) -> str:
    """The object `training` of `plan --training --json`: what a step occupies, and which cards it fits."""
    layouts = training["layouts"]
    unit, size = ("GiB", _GIB) if layouts[0]["total_bytes"] >= _GIB else ("MiB", _MIB)
    shared = training["processes"] > 1
    exchange = ("exchange",) if shared else ()
    parts = ("weight", "adapter", "gradient", *exchange, "optimizer", "activation", "total")
    rows = [[x["name"], *(f"{x[f'{part}_bytes'] / size:.2f}" for part in parts)] for x in layouts]
    each = f" on each of {training['processes']} cards" if shared else ""
    heading = (
        f"One training step{each}: batch {training['batch_size']}, {training['tokens']:,} tokens, "
        f"{training['tiles']} tiles, rank {training['rank']}, {training['optimizer']}; "
        f"{training['adapter_parameters']:,} adapter parameters on {training['adapted_layers']} layers."
    )
    names = [x["gb"] for x in layouts[0]["cards"]]
    cards = [[x["name"], *(_margin(card) for card in x["cards"])] for x in layouts]
    note = (
        "Cards: GiB that are left, or that are missing (-), after what driver and CUDA take. Blocks are "
        "recomputed in the backward pass."
    )
    return "\n\n".join(
        [
            paragraphs([heading], width),
            text_table(["layout", *(f"{part} {unit}" for part in parts)], rows, frozenset({0})),
            text_table(["layout", *(f"{gb} GB" for gb in names)], cards, frozenset({0})),
            paragraphs([note], width),
        ]
    )


def _margin(card: Mapping[str, Any]) -> str:
    """The words of one cell: `fits, 3.2` or `no, -1.4`."""
    left = card["margin_bytes"] / _GIB
    return f"fits, {left:.1f}" if card["fits"] else f"no, {left:.1f}"
