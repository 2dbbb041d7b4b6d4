"""What a scan gives back: its numbers, and the thin view of its run folder that Python users hold."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest, Quality, moved
from qprobe.runs.folder import RunFolder, run_folder
from qprobe.runs.layers.table import attribution_residual, rank_table
from qprobe.runs.scored import Scored
from qprobe.runs.shards import SKIPLIST
from qprobe.selection.derived.again import make_again
from qprobe.selection.replaced import select_into
from qprobe.selection.scores import default_measure
from qprobe.selection.select import select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 10  # layers that a notebook shows


@dataclass(frozen=True)
class ScanResult:
    """What a scan found, and where it lies.

    seconds: by stage. peak_bytes: of the fullest device (CUDA) or of the process (CPU). kl_*: nats per answer
    token on held-out samples, None where they do not apply. attribution_residual: (sum of the sensitivities
    - measured KL) / measured KL, on the calibration samples. skiplist: None where other processes of this
    scan have not finished their share, so that one of them chooses. verdict: one sentence.
    streamed_bytes: of weights that were copied to the device for a memory limit; None without one.
    metric: the one that was asked for, of 16-bit, the format with nothing kept, and "dynamic", the list.
    """

    run: Path
    layers: int
    samples: int
    seconds: dict[str, float]
    peak_bytes: int | None
    kl_standard_4bit: float | None
    kl_dynamic: float | None
    attribution_residual: float | None
    skiplist: Path | None
    verdict: str
    notes: tuple[str, ...] = ()
    streamed_bytes: int | None = None
    metric: Scored | None = None

    def to_json(self) -> dict[str, Any]:
        """The documented object of `scan --json`."""
        metric = None if self.metric is None else self.metric.to_json()
        skiplist = None if self.skiplist is None else str(self.skiplist)
        return {
            **vars(self),
            "run": str(self.run),
            "skiplist": skiplist,
            "notes": list(self.notes),
            "metric": metric,
        }


def result_of(run: RunFolder) -> ScanResult:
    """What the scan in the folder `run` found, by what lies there; streamed_bytes is not known any more.

    Raises RunError if it is no run folder, or a file of it is damaged.
    """
    spec, end, path = run.key.spec, run.notes.get("end"), run.path / SKIPLIST
    has_list = end is not None and path.is_file()
    quality = read_manifest(path).quality if has_list else Quality()
    return ScanResult(
        run=run.path,
        layers=len(run.key.inventory.layers),
        samples=sum(len(group) for group in (*spec.calibration, *spec.held_out)),
        seconds=end.seconds if end else {},
        peak_bytes=end.peak_bytes if end else None,
        kl_standard_4bit=quality.kl_standard_4bit,
        kl_dynamic=quality.kl_dynamic,
        attribution_residual=attribution_residual(run),
        skiplist=path if has_list else None,
        verdict=end.verdict if end else "This scan has not finished; the same command goes on with it.",
        notes=run.notes.sentences,
        metric=end.metric if end else None,
    )


class Run:
    """A scan and its folder: `qprobe.scan` gives one, `qprobe.open_run` opens one that is there.

    folder: see `qprobe.runs.folder`. result: numbers of the scan, as `scan --json` prints them.
    """

    def __init__(self, run: Path | str | RunFolder, result: ScanResult | None = None) -> None:
        self.folder = run_folder(run)
        self._made_again = make_again(self.folder) if result is None else ()
        self.result = result_of(self.folder) if result is None else result

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def layers(self) -> pd.DataFrame:
        """The layer table, one row per layer in execution order; RunError where the scan has not finished."""
        return self.folder.table.copy()

    @property
    def skiplist(self) -> Path | None:
        """The manifest's path; None where no list is chosen yet."""
        path = self.path / SKIPLIST
        return path if path.is_file() and self.result.skiplist is not None else None

    @property
    def verdict(self) -> str:
        """What the list that the scan chose costs and brings, in a sentence."""
        return self.result.verdict

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences a reader must see."""
        return (*self._made_again, *self.result.notes)

    def plot(self) -> Figure:
        """The spikes: every measured error of each layer, as a figure of matplotlib."""
        from qprobe.report.write import spikes

        _show_figures()
        return spikes(self.folder)

    def select(
        self,
        budget: str | None = None,
        *,
        by: str | None = None,
        max_kl: float | None = None,
        for_tool: str | None = None,
        out: str | Path | None = None,
    ) -> Manifest:
        """The manifest of the best list within another budget or bound; arguments as of `qprobe.select`.

        out: a file to write it to, for instance `skiplist`, whose list is set aside; None writes nothing.
        The file of calibrated weights is named from the folder of `out`, else from the working directory.
        Raises RunError if `out` holds something else than a skip-list, and what `qprobe.select` raises.
        """
        asked: dict[str, Any] = {"by": by, "max_kl": max_kl, "for_tool": for_tool}
        if out is None:
            return moved(select(self.folder, budget, **asked), self.path, Path())
        return select_into(Path(out), self.folder, budget, **asked)[0]

    def report(self, out: str | Path | None = None) -> Path:
        """The path of the page, drawn again with its pictures. out: a folder; None for RUN/report."""
        from qprobe.report.write import PAGE_FILE, write_report

        files = write_report(self.folder, None if out is None else Path(out))
        return next(x for x in files if x.name == PAGE_FILE)

    def to_json(self) -> dict[str, Any]:
        """The documented object of `scan --json`."""
        return self.result.to_json()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self.verdict}"

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, the layers that 4-bit hurts most, and where all of it lies."""
        parts = [f"<p><b>{escape(self.verdict)}</b></p>"]
        if self.skiplist is not None:
            table = self.folder.table
            by = default_measure(table)
            columns = ["layer", "tower", *([] if by == "weight_nmse" else ["weight_nmse"]), by]
            ranked = rank_table(table, by, TOP)[columns]
            parts += [ranked.to_html(float_format="{:.3g}".format), f"<p>by {escape(by)}</p>"]
        parts += [f"<p>{escape(note)}</p>" for note in self.notes]
        return "\n".join([*parts, f"<p><code>{escape(str(self.path))}</code></p>"])


def open_run(run: Path | str) -> Run:
    """The scan in the folder `run`. Raises RunError if there is none, or a file of it is damaged."""
    return Run(run)


def _show_figures() -> None:
    """Let a notebook draw figures that pyplot did not make; it does so by itself once it imports pyplot."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        from IPython.core.pylabtools import select_figure_formats

        select_figure_formats(shell, {"png"})
