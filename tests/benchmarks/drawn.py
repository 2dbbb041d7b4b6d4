"""Calibrated NF4 step by step: drawn texts, tuned scales, and a skip-list on top, on samples it has not seen.

    python -m tests.benchmarks.drawn --model smollm2 --device cuda [--limit 190] [--out FILE.md]
    python -m tests.benchmarks.drawn --model demo --texts 16 --drawn 8 --steps 4 --held-out 16

Weights are those of the library: `calibrate_model`, alone and with texts that the model draws itself
(`scan --drawn-texts`), and `tune`. Damage is the KL to the 16-bit model in float32 with every linear in
4-bit, as a share of rounding to nearest; the held-out samples are two sets, of which the first may choose
and the second reports. A list gives back a tenth of the bytes that 4-bit saves, by the scan's own choice and
by the gradient at the calibrated model, groups whole. Tuning that would begin after `--limit` seconds is left
out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import fsum
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from qprobe.calibration.calibrate import calibrate_model
from qprobe.calibration.tuning import Given, tune
from qprobe.calibration.work import Work
from qprobe.formats.codes_file import open_codes
from qprobe.formats.nf4 import Nf4
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject
from qprobe.records import FormatSpec
from qprobe.registry.precisions import NF4_CALIBRATED
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import VERSION, Key, Measures, Spec
from qprobe.runs.statistics import ratio_se
from qprobe.scanning.drawn import drawn_texts
from qprobe.scanning.process import Process
from qprobe.system.processes import Shard
from tests.benchmarks.calibration import Case, load
from tests.benchmarks.rankings.additive import default_damage, slope_scores
from tests.benchmarks.rankings.lists import Chooser

SHARE = 0.1  # of the bytes that 4-bit saves, given back to a list
NOTHING: frozenset[str] = frozenset()


@dataclass
class Kind:
    """Held-out samples. wanted: 16-bit outputs; plain: damage of rounding to nearest, by sample."""

    batches: Sequence[Batch]
    wanted: list[list[Tensor]]
    plain: list[float] = field(default_factory=list)


class Table:
    """The rows so far; open `walking` around it. base: damage of the first row, by kind."""

    def __init__(self, case: Case, start: float) -> None:
        self.case, self.start = case, start
        sets = {"first": case.held_out[0::2], "**second**": case.held_out[1::2], **case.others}
        self.kinds = {name: Kind(x, case.outputs(x, None)) for name, x in sets.items() if x}
        for name, found in self.damage(NOTHING).items():
            self.kinds[name].plain = found
        self.base: dict[str, list[float]] | None = None
        self.rows = [
            f"| | {' | '.join(self.kinds)} | seconds so far |",
            f"|---|{'---|' * len(self.kinds)}---|",
        ]
        plain = [f"{fsum(x.plain) / self.tokens(x):.4g}" for x in self.kinds.values()]
        self._row("rounded to nearest, nats per answer token", plain)

    def tokens(self, kind: Kind) -> int:
        return sum(len(rows) for batch in kind.wanted for rows in batch)

    def damage(self, kept: frozenset[str]) -> dict[str, list[float]]:
        """By kind, of each sample, with the weights that are in place but `kept` in 16-bit."""
        case = self.case

        def forward(name: str, module: nn.Linear, x: Tensor) -> Tensor:
            return (
                nn.functional.linear(x, module.weight, module.bias)
                if name in kept
                else case.four_bit(name, module, x)
            )

        return {
            name: case.damage(one.wanted, case.outputs(list(one.batches), forward))[0]
            for name, one in self.kinds.items()
        }

    def add(self, what: str, kept: frozenset[str] = NOTHING) -> None:
        """A row of shares, and from the second on one of differences to the first, paired by sample."""
        found = self.damage(kept)
        shares = [
            f"{fsum(found[n]) / fsum(x.plain):.4f} ± {ratio_se(found[n], x.plain):.2g}"
            for n, x in self.kinds.items()
        ]
        self._row(what, shares)
        if self.base is None:
            self.base = found
            return
        cells = []
        for name, one in self.kinds.items():
            gaps = [a - b for a, b in zip(found[name], self.base[name], strict=True)]
            cells.append(f"{fsum(gaps) / fsum(one.plain):+.4f} ± {ratio_se(gaps, one.plain):.2g}")
        self._row(f"{what}, against the first", cells)

    def _row(self, what: str, cells: Sequence[str]) -> None:
        self.rows.append(f"| {what} | {' | '.join(cells)} | {time.perf_counter() - self.start:.0f} |")
        print(self.rows[-1], flush=True)


def put_nearest(subject: Subject) -> None:
    """Let all weights be rounded to nearest."""
    for name, module in subject.quantized_modules.items():
        subject.dequantized.put(name, Nf4().stored(module.weight).packed())


def calibrated(case: Case, folder: Path, drawn: int) -> Work:
    """Calibrate as a scan does, without tuning; its weights are in place."""
    subject = case.subject
    put_nearest(subject)
    run, spec = RunFolder(folder), Spec("weights", str(subject.reference.device), Measures(False, False))
    fmt = FormatSpec(NF4_CALIBRATED.name)
    run.open(Key(VERSION, subject.reference.identity, fmt, subject.inventory, spec))
    process = Process(run, Shard(), lambda *_: None)
    draw = partial(drawn_texts, subject, drawn, 0, process)
    work = Work(subject, run, [batch.samples for batch in case.calibration], draw=draw)
    calibrate_model(work)
    return work


def tuned(work: Work, steps: int) -> str:
    """Tune the scales of what `work` has left, and put them in place; what came of it."""
    subject, codes = work.subject, work.run.codes
    assert codes is not None
    with open_codes(work.run.path / codes.file) as file:
        stored = {name: file.stored(name, subject.device_of(name)) for name in sorted(file.layers)}
    training, kept_back = ([subject.encode(group) for group in part] for part in work.split)
    drawn = [batch.to(subject.reference.device) for batch in work.drawn]
    found = tune(subject, stored, Given(training, kept_back, drawn), steps, Nf4())
    for name, one in found.stored.items():
        subject.dequantized.put(name, one.packed())
    return (
        f"tuned: {found.step} of {steps} steps, on what is kept back {found.before:.4g} to {found.after:.4g}"
    )


def add_lists(table: Table, what: str) -> None:
    """Rows with a list on top of the weights in place, by the scan's choice and by the gradient."""
    subject = table.case.subject
    batches = [batch.in_dtype(subject.path.dtype) for batch in table.case.calibration]
    chooser = Chooser(subject.inventory)
    ours = chooser.damage_lists(default_damage(subject.path, batches))(SHARE)
    gradient = chooser.lists(slope_scores(subject.path, batches, 1.0))(SHARE)
    for name, kept in (("the scan's", ours), ("the gradient's", gradient)):
        assert kept is not None
        table.add(f"{what}; {name} list of {len(kept)} layers", kept)


def measured(case: Case, asked: argparse.Namespace, start: float, folder: Path) -> list[str]:
    """The rows of the table."""
    with walking(case.subject.path):
        table = Table(case, start)

    def add(what: str, with_lists: bool) -> None:
        with walking(case.subject.path):
            table.add(what)
            if with_lists:
                add_lists(table, what)

    for drawn in dict.fromkeys((0, asked.drawn)):
        what = f"{asked.texts} samples" + (f" and {drawn} drawn texts" if drawn else "")
        work = calibrated(case, folder / str(drawn), drawn)
        add(what, with_lists=not drawn)
        if asked.steps and time.perf_counter() - start < asked.limit:
            add(f"{what}, {tuned(work, asked.steps)}", with_lists=True)
    return table.rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "demo", "demo-outliers"), default="smollm2")
    parser.add_argument("--texts", type=int, default=128, help="calibration samples, a multiple of 8")
    parser.add_argument("--drawn", type=int, default=512, help="texts that the model draws; 0 for none")
    parser.add_argument("--steps", type=int, default=200, help="of tuning; 0 for none")
    parser.add_argument("--held-out", type=int, default=128, help="samples, half of them in each set")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no step begins")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a Markdown file for the same table")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    start = time.perf_counter()
    case = load(asked.model, asked.texts, asked.device, asked.held_out)
    with TemporaryDirectory(prefix="qprobe-drawn-") as folder:
        rows = measured(case, asked, start, Path(folder))
    if asked.out:
        asked.out.write_text("\n".join([*rows, ""]))


if __name__ == "__main__":
    main()
