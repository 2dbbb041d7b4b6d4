"""Plain text for the terminal: tables that fit its width, bytes people can read, spark lines."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from textwrap import fill, indent
from typing import Any

import pandas as pd

from qprobe.manifest.records import Manifest
from qprobe.registry.measures import by_tellingness, column
from qprobe.report.names import short_names
from qprobe.selection.verdict import difference_text, mean_text
from qprobe.system.wording import counted, shortened

PIPED_WIDTH = 120  # columns of prose where no terminal says how many it has
LEAST_WIDTH = 40
UNLIMITED = 10_000  # columns of a piped table
_BAR = 24  # columns of the longest bar
_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
_LEVELS = "▁▂▃▄▅▆▇█"
_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))

_LONGEST_METRIC = 16  # columns of the name of a metric above a table

_LEAST_ROOM = 28  # columns for a layer's name; a short name fits


def terminal_width() -> int:
    """What `COLUMNS` says, else the columns of the terminal, else 120 where output is piped; 40 at least."""
    return max(LEAST_WIDTH, shutil.get_terminal_size((PIPED_WIDTH, 24)).columns)


def is_terminal() -> bool:
    """True if somebody looks at stdout; where it is piped, output is plain and nothing is shortened."""
    return sys.stdout is not None and sys.stdout.isatty()  # None: closed by the shell


def table_width() -> int:
    """Columns that a table may take: `terminal_width`; as many as it likes where output is piped.

    Where `COLUMNS` is set it holds for pipes, too.
    """
    return terminal_width() if is_terminal() or os.environ.get("COLUMNS") else UNLIMITED


def readable_bytes(count: int) -> str:
    """`count` in the largest binary unit that leaves at least one whole: 6.69 GiB, 512 B."""
    for size, unit in _UNITS:
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def readable_number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None or value != value:
        return "-"
    if value == 0 or not isfinite(value):
        return f"{value:g}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def readable_share(value: float | None) -> str:
    """A share from 0 to 1 as per cent; a dash where it does not apply."""
    return "-" if value is None or value != value else f"{100 * value:.1f} %"


def spark_line(values: Sequence[float], width: int) -> str:
    """`values` in order as one line of at most `width` block characters, linear from zero.

    Neighbours that share a character show their maximum, so that no spike is lost. A space stands
    where nothing was measured, the lowest block for zero and below.
    """
    cells = min(width, len(values))
    if cells < 1:
        return ""
    tops = []
    for cell in range(cells):
        part = values[cell * len(values) // cells : (cell + 1) * len(values) // cells]
        tops.append(max((v for v in part if isfinite(v)), default=nan))
    highest = max((top for top in tops if top == top), default=0.0)
    return "".join(" " if top != top else _level(top, highest) for top in tops)


def _level(value: float, highest: float) -> str:
    if highest <= 0:
        return _LEVELS[0]
    return _LEVELS[min(len(_LEVELS) - 1, max(0, int(value / highest * len(_LEVELS))))]


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: frozenset[int]) -> str:
    """Columns two spaces apart, right-aligned but for the indices in `left`; a rule under the headings."""
    widths = [max(len(line[i]) for line in (headings, *rows)) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        sized = enumerate(zip(cells, widths, strict=True))
        return "  ".join(c.ljust(size) if i in left else c.rjust(size) for i, (c, size) in sized).rstrip()

    return "\n".join([line(headings), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def rank_text(ranked: pd.DataFrame, by: str, kept: frozenset[str], width: int) -> str:
    """The ranking `ranked` (rows of the layer table, best first) with the score `by` as first number.

    kept: layers that the manifest leaves in 16-bit, marked *. The bytes are what keeping a layer costs.
    Columns rank_low and rank_high of `ranked`, where there, are shown as the interval of the rank.
    """
    telling = [x.name for x in by_tellingness()]
    beside = [c for c in telling if c != by and c in ranked and ranked[c].notna().any()]
    tables = [_rank_cells(ranked, [by, *beside[:count]]) for count in range(len(beside), -1, -1)]
    rooms = [width - len(text_table(*table, frozenset()).splitlines()[1]) + len("layer") for table in tables]
    fitting = next((i for i, room in enumerate(rooms) if room >= _LEAST_ROOM), len(tables) - 1)
    headings, cells = tables[fitting]
    marks = [" *" if name in kept else "" for name in ranked["layer"]]
    labels = _labels(list(ranked["layer"]), marks, max(rooms[fitting], _LEAST_ROOM))
    rows = [[line[0], label, *line[2:]] for line, label in zip(cells, labels, strict=True)]
    return text_table(headings, rows, frozenset({1, 2}))


def _rank_cells(ranked: pd.DataFrame, numbers: list[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the ranking with the columns `numbers`; the layer's name is left empty."""
    has_interval = "rank_low" in ranked
    rows = [
        [
            str(place),
            "",
            str(row["tower"]),
            f"+{readable_bytes(int(row['bytes_16bit']) - int(row['bytes_4bit']))}",
            *([_interval(row["rank_low"], row["rank_high"])] if has_interval else []),
            *(readable_number(row[name]) for name in numbers),
        ]
        for place, row in enumerate(ranked.to_dict("records"), start=1)
    ]
    ranks = ["ranks"] if has_interval else []
    headings = [x.heading for name in numbers if (x := column(name)) is not None]
    return ["#", "layer", "tower", "16-bit costs", *ranks, *headings], rows


def _interval(low: Any, high: Any) -> str:
    """An interval of ranks: 3-11, a single rank, or a dash where it is not known."""
    if pd.isna(low) or pd.isna(high):
        return "-"
    return f"{low}" if low == high else f"{low}-{high}"


def _labels(names: list[str], marks: list[str], room: int) -> list[str]:
    """Each name with its mark: in full if all fit `room`, else short."""
    marked = [name + mark for name, mark in zip(names, marks, strict=True)]
    if all(len(label) <= room for label in marked):
        return marked
    short = short_names(names).values()
    return [shortened(label, room - len(mark)) + mark for label, mark in zip(short, marks, strict=True)]


def kept_text(manifest: Manifest, bytes_4bit: Mapping[str, int], names: Sequence[str], width: int) -> str:
    """A row for each layer of `names` that `manifest` keeps: what that costs, and why.

    bytes_4bit: what each takes in 4-bit. Reasons that do not fit `width` stand on lines of their own.
    """
    layers = [x for x in manifest.layers if x.name in set(names)]
    rows = [[f"+{readable_bytes(x.bytes - bytes_4bit[x.name])}", readable_bytes(x.bytes)] for x in layers]
    reasons = [x.reason.removeprefix("kept: ") for x in layers]
    headings = ["layer", "16-bit costs", "bytes in 16-bit"]

    def table(room: int, beside: bool) -> list[str]:
        labels = _labels([x.name for x in layers], [""] * len(layers), room)
        cells = [
            [label, *row, *[why] * beside] for label, row, why in zip(labels, rows, reasons, strict=True)
        ]
        return text_table([*headings, *["why"] * beside], cells, frozenset({0, 3})).splitlines()

    longest = max(map(len, reasons), default=0)
    numbers = sum(len(h) + 2 for h in headings[1:])
    if (room := width - numbers - longest - 2) >= _LEAST_ROOM:
        return "\n".join(table(room, beside=True))
    lines = table(max(width - numbers, _LEAST_ROOM), beside=False)
    said = [indent(fill(why, max(width - 4, 20)), "    ") for why in reasons]
    return "\n".join([*lines[:2], *(f"{line}\n{why}" for line, why in zip(lines[2:], said, strict=True))])


def compare_text(comparison: Mapping[str, Any], width: int, shown: int = 3) -> str:
    """The comparison (the object of `compare --json`) as a table, and `shown` answers side by side.

    Metrics stand in the table, or in one of their own where it would be wider than `width`.
    """
    metrics = comparison["metrics"]
    headings = ["model", "parameters", "with state", "KL / token", "top-1", "answers"]
    rows = [
        [
            str(row["name"]),
            readable_bytes(row["parameter_bytes"]),
            readable_bytes(row["total_bytes"]),
            _with_error(row["kl"], row["kl_se"]),
            readable_share(row["top1_agreement"]),
            readable_share(row["answer_agreement"]),
        ]
        for row in comparison["rows"]
    ]
    names = [shortened(str(metric["name"]), _LONGEST_METRIC) for metric in metrics]
    means = [[mean_text(m["means"][row[0]]["value"], m["is_share"]) for m in metrics] for row in rows]
    wide = [[*row, *mine] for row, mine in zip(rows, means, strict=True)]
    tables = [text_table([*headings, *names], wide, frozenset({0}))]
    if max(map(len, tables[0].splitlines())) > width and metrics:
        short = [[row[0], *mine] for row, mine in zip(rows, means, strict=True)]
        tables = [text_table(x, y, frozenset({0})) for x, y in ((headings, rows), (["model", *names], short))]
    blocks = [counted(len(comparison["samples"]), "sample"), *tables]
    blocks += [fill(_differences(metric), width) for metric in metrics]
    blocks += [_answers(sample, width) for sample in _telling(comparison["samples"])[:shown]]
    return "\n\n".join(blocks)


def _differences(metric: Mapping[str, Any]) -> str:
    """What one metric says: each 4-bit model against 16-bit, and the last one against all."""
    first, *_, last = metric["means"]
    told = [
        f"{x['model']} against {x['against']}: "
        + difference_text(x["value"], x["se"], metric["is_share"], x["is_found"])
        for x in metric["differences"]
        if x["against"] == first or x["model"] == last
    ]
    of = "" if not metric["left_out"] else f" of {metric['samples'] + metric['left_out']}"
    count = f"{metric['samples']}{of} samples" if of else counted(metric["samples"], "sample")
    if not metric["samples"]:
        return f"{metric['name']}: no sample counts, so nothing is measured."
    return f"{metric['name']}, {count}, paired by sample: {'; '.join(told)}."


def kl_bars(comparison: Mapping[str, Any]) -> str:
    """The KL of each compared model as a bar, linear from zero; empty where none was measured."""
    rows = [(str(row["name"]), row["kl"]) for row in comparison["rows"] if row["kl"] is not None]
    highest = max((kl for _, kl in rows), default=0.0)
    if highest <= 0:
        return ""
    margin = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(margin)}  {_bar(max(kl, 0.0) / highest)}" for name, kl in rows)


def _bar(share: float) -> str:
    """A bar of `share` of the longest, in eighths of a character."""
    whole, part = divmod(round(share * _BAR * 8), 8)
    return "█" * whole + ("▏▎▍▌▋▊▉"[part - 1] if part else "")


def _with_error(value: float | None, error: float | None) -> str:
    if not value or error is None or error != error:
        return readable_number(value)
    return f"{readable_number(value)} ± {readable_number(error)}"


def _telling(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Samples on which the models disagree first, otherwise in their order."""
    return sorted(samples, key=lambda s: len(set(s["answers"].values())) == 1)


def _answers(sample: Mapping[str, Any], width: int) -> str:
    margin = max(len(name) for name in sample["answers"]) + 4
    lines = [fill(f"{sample['id']}: {' '.join(str(sample['prompt']).split())}", width)]
    for name, answer in sample["answers"].items():
        text = " ".join(str(answer).split()) or "(nothing)"
        lines.append(
            fill(text, width, initial_indent=f"  {name}".ljust(margin), subsequent_indent=" " * margin)
        )
    return "\n".join(lines)


def paragraphs(sentences: Sequence[str], width: int, mark: str = "- ") -> str:
    """Each sentence wrapped to `width` behind `mark`."""
    inner = max(width - len(mark), 20)
    blocks = (indent(fill(s, inner), " " * len(mark)) for s in sentences)
    return "\n".join(mark + block[len(mark) :] for block in blocks)


def doctor_text(diagnosis: Mapping[str, Any], width: int) -> str:
    """The diagnosis (the object of `doctor --json`) on one screen, what to do about problems last."""
    versions = ", ".join(f"{p['name']} {p['version'] or 'missing'}" for p in diagnosis["packages"])
    head = f"qprobe {diagnosis['qprobe']}, Python {diagnosis['python']}, {diagnosis['system']}"
    headings = ["device", "kind", "free memory", "16-bit", "4-bit round trip", "product"]
    rows = [_device_row(device) for device in diagnosis["devices"]]
    room = width - sum(max(len(r[i]) for r in (headings, *rows)) + 2 for i in (0, 2, 3, 4, 5))
    rows = [[row[0], shortened(row[1], max(room, 8)), *row[2:]] for row in rows]
    hub = diagnosis["hub"]
    login = "logged in" if hub["logged_in"] else "not logged in"
    blocks = [
        f"{head}\n{fill(versions, width)}",
        text_table(headings, rows, frozenset({0, 1})) if rows else "no device",
        fill(f"hub: {hub['status']} ({hub['detail']}), {login}", width),
    ]
    if diagnosis["problems"]:
        sentences = [f"{p['what']} {p['advice']}" for p in diagnosis["problems"]]
        blocks.append("To fix or to know:\n" + paragraphs(sentences, width))
    verdict = (
        "4-bit works on this machine." if diagnosis["ok"] else "4-bit works on no device of this machine."
    )
    return "\n\n".join([*blocks, verdict])


def _device_row(device: Mapping[str, Any]) -> list[str]:
    four_bit = device["four_bit"]
    if four_bit["error"] is not None:
        checks = ["fails", "fails"]
    else:
        error, bound, product = (four_bit[k] for k in ("roundtrip_error", "roundtrip_bound", "matmul_error"))
        checks = [
            f"{'ok' if error <= bound else 'WRONG'}, {error:.3f} of {bound:.3f}",
            f"{'ok' if product <= 1 else 'WRONG'}, {product:.2f} of 1",
        ]
    memory = f"{device['free_bytes'] / 2**30:.1f} of {device['total_bytes'] / 2**30:.1f} GiB"
    return [device["name"], device["title"], memory, _DTYPES.get(device["dtype"], "none"), *checks]
