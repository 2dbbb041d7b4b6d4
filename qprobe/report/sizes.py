"""Sizes of models as plain text: the plan of one model, and the list of those known by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qprobe.report.terminal import paragraphs, text_table
from qprobe.system.wording import counted, lasting, shortened

_GIB, _MIB = 1 << 30, 1 << 20
_SHOWN_OUTSIDE = 12  # lines; what is left is summed up in one more
_LEAST_HUB_ID = 20  # columns, below which a hub id tells nothing


def plan_text(plan: Mapping[str, Any], width: int) -> str:
    """The plan (the object of `plan --json`): its layouts, its towers, and what lies outside the linears."""
    unit, size = ("GiB", _GIB) if plan["layouts"][0]["total_bytes"] >= _GIB // 10 else ("MiB", _MIB)
    where = ", ".join(x for x in (plan["hub_id"], plan["architecture"]) if x)
    counts = f"{plan['parameters']:,} parameters, {plan['linear_layers']:,} linear layers"
    blocks = [
        f"{plan['model']} ({where})\n{counts}",
        _layouts(plan["layouts"], unit, size),
        _towers(plan, unit, size),
        _outside(plan["outside"], unit, size, width),
    ]
    if plan["notes"]:
        blocks.append(paragraphs(plan["notes"], width))
    return "\n\n".join(blocks)


def _layouts(layouts: Sequence[Mapping[str, Any]], unit: str, size: int) -> str:
    """Parameter bytes beside the published figure, which counts the same, and bytes with all state."""
    has_published = any(x["published_gib"] is not None for x in layouts)
    headings = ["layout", "4-bit layers", f"parameters {unit}", *(["published GiB"] if has_published else [])]
    rows = [
        [
            x["name"],
            f"{x['layers_4bit']:,}",
            f"{x['parameter_bytes'] / size:.4f}",
            *(["-" if x["published_gib"] is None else f"{x['published_gib']:.2f}"] if has_published else []),
            f"{x['total_bytes'] / size:.4f}",
        ]
        for x in layouts
    ]
    return text_table([*headings, f"with state {unit}"], rows, frozenset({0}))


def _towers(plan: Mapping[str, Any], unit: str, size: int) -> str:
    """Each tower with all of its bytes (quantization state included) in the layouts that differ."""
    shown = [x["name"] for x in plan["layouts"] if x["name"] not in ("nf4-single", "fp4")]
    headings = ["tower", "linears", "parameters", *(f"{name} {unit}" for name in shown)]
    rows = [
        [
            tower["name"],
            f"{tower['linear_layers']:,}",
            f"{tower['parameters']:,}",
            *(f"{x['total_bytes'] / size:.4f}" for x in tower["layouts"] if x["name"] in shown),
        ]
        for tower in plan["towers"]
    ]
    return text_table(headings, rows, frozenset({0}))


def _outside(outside: Sequence[Mapping[str, Any]], unit: str, size: int, width: int) -> str:
    """What no layout changes, largest first; layers that differ only in their number share a line."""
    groups: dict[tuple[str, str], list[int]] = {}
    for item in outside:
        key = (re.sub(r"\.\d+(?=\.)", ".*", item["name"]), item["why"])
        groups.setdefault(key, []).append(item["bytes"])
    ordered = sorted(groups.items(), key=lambda pair: -sum(pair[1]))
    rows = [
        [f"{sum(sizes) / size:.4f}", f"{len(sizes):,}", name, re.split(r"[;,(]", why)[0].strip()]
        for (name, why), sizes in ordered[:_SHOWN_OUTSIDE]
    ]
    rest = [sizes for _, sizes in ordered[_SHOWN_OUTSIDE:]]
    if rest:
        count = sum(map(len, rest))
        rows.append([f"{sum(map(sum, rest)) / size:.4f}", f"{count:,}", "others (see --json)", ""])
    headings = [unit, "count", "outside the linears, in every layout", "why"]
    taken = max(len(row[0]) for row in rows) + max(len("count"), *(len(row[1]) for row in rows)) + 6
    room = max(width - taken, 40)
    why_room = min(max(len(row[3]) for row in (headings, *rows)), room // 3)
    name_room = room - why_room
    cut = [
        [row[0], row[1], shortened(row[2], name_room), shortened(row[3], why_room)]
        for row in (headings, *rows)
    ]
    return text_table(cut[0], cut[1:], frozenset({2, 3}))


def scan_text(scan: Mapping[str, Any], width: int) -> str:
    """The object `scan` of `plan --scan --json`: what a scan takes on this machine."""
    measured, held_out = scan["samples"]
    batch = scan["batch"]
    heading = (
        f"A scan here: {counted(measured + held_out, 'sample')} ({held_out} held out) of "
        f"{batch['tokens']:,} tokens and {batch['vision_rows']:,} image patches, "
        f"batch {batch['samples']}, {scan['format']}, on {scan['device']}."
    )
    stages = [[name, lasting(seconds)] for name, seconds in scan["seconds"].items()]
    stages.append(["all", lasting(scan["total_seconds"])])
    needed = "with all weights there" if scan["is_streamed"] else "of which are free"
    beside = scan["needed_bytes"] if scan["is_streamed"] else scan["free_bytes"]
    memory = [["device, at its peak", _gib(scan["device_bytes"])], [f"  {needed}", _gib(beside)]]
    if scan["host_bytes"] is not None:
        memory.append(["host, of the process", _gib(scan["host_bytes"])])
    memory.append(["disk, of the run folder", _gib(scan["disk_bytes"])])
    rate = f"Products of {scan['rates']['products'] / 1e12:.3g} TFLOP/s were measured here."
    return "\n\n".join(
        [
            paragraphs([heading], width, mark=""),
            text_table(["stage", "time"], stages, frozenset({0})),
            text_table(["memory", "GiB"], memory, frozenset({0})),
            paragraphs([rate, *scan["notes"]], width),
        ]
    )


def models_text(models: Sequence[Mapping[str, Any]], width: int) -> str:
    """The known models (of the object of `models --json`), one per line; hub ids where there is room.

    "lists" counts the published ones, which `plan` names.
    """
    headings = ["model", "params", "16-bit GiB", "nf4 GiB", "lists", "weights"]
    rows = [
        [
            str(x["alias"]),
            _billions(x["parameters"]),
            _gib(x["bytes_16bit"]),
            _gib(x["nf4_total_bytes"]),
            str(len(x["published_lists"]) or "-"),
            str(x["access"]),
        ]
        for x in models
    ]
    table = text_table(headings, rows, frozenset({0, 5})).splitlines()
    longest = max(map(len, table))
    room = width - longest - 2
    if room < _LEAST_HUB_ID:
        return "\n".join(table)
    hub = ["hub id", "", *(shortened(x["hub_id"] or "-", room) for x in models)]
    rule = "-" * (longest + 2 + max(map(len, hub)))
    lines = [f"{line.ljust(longest)}  {name}" for line, name in zip(table, hub, strict=True)]
    return "\n".join([lines[0], rule, *lines[2:]])


def _gib(count: int) -> str:
    """GiB with two decimals, four for what is less than a tenth."""
    return f"{count / _GIB:.2f}" if count >= _GIB // 10 else f"{count / _GIB:.4f}"


def _billions(parameters: int) -> str:
    """10.67 B, 256 M, 5.2 M: three or four digits, as model names have them."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.2f} B"
    return f"{parameters / 1e6:.0f} M" if parameters >= 1e8 else f"{parameters / 1e6:.1f} M"
