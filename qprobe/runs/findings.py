"""From the units of a scan to its tables, and to the sentences that a reader of them needs; no torch."""

from __future__ import annotations

from math import prod

import numpy as np
import pandas as pd

from qprobe.errors import SampleError
from qprobe.registry.measures import OUTPUTS
from qprobe.runs.derived import csv_bytes
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.ranks import write_ranks
from qprobe.runs.layers.table import EXPERTS_FILE, STANDARD, finite_answers, left_out, write_table
from qprobe.runs.notes import Ran, Remarks
from qprobe.system.wording import counted, named

FILE = "left_out.csv"


def write_findings(run: RunFolder) -> None:
    """The layer table and what goes with it, from the units; notes on what a reader must know of them.

    Raises SampleError if the KL is finite on no sample.
    """
    if OUTPUTS.name in run.key.spec.needed_units:
        run.notes.put("layers", which_ran(run))
    write_table(run)
    write_ranks(run)
    missing = left_out(run)
    write_left_out(run, missing)
    rerouted = rerouted_note(run)
    told = (*left_out_notes(run, missing), *([rerouted] if rerouted else []))
    run.notes.put("left-out", Remarks(told))
    check_answers(run)


def which_ran(run: RunFolder) -> Ran:
    """Which linears never ran on the samples, by the finished units, and which read rows of no sample."""
    rows = run.units(OUTPUTS.name)
    ran, apart = set(rows["layer"]), set(rows.loc[rows["tokens"].isna(), "layer"])
    unmeasured = tuple(x.name for x in run.key.inventory.layers if x.name not in ran)
    notes = []
    if unmeasured:
        count = counted(len(unmeasured), "linear")
        notes.append(f"{count} never ran on these samples, so not measured: {named(unmeasured)}.")
    if apart:
        names = [x.name for x in run.key.inventory.layers if x.name in apart]
        samples = counted(rows.loc[rows["tokens"].isna(), "sample"].nunique(), "sample")
        notes.append(
            f"{counted(len(names), 'linear')} read rows that belong to no sample, so on {samples} activation "
            f"and propagated error are not measured: {named(names)}."
        )
    return Ran(unmeasured, tuple(notes))


def rerouted_note(run: RunFolder) -> str | None:
    """How many tokens the propagated error of experts leaves out, in a sentence; None if none."""
    rows = run.units(OUTPUTS.name)
    rows = rows.loc[rows["expert"].notna() & rows["propagated_rerouted"].notna()]
    some = rows.loc[rows["propagated_rerouted"] > 0]
    if some.empty:
        return None
    read = rows.loc[rows["layer"].isin(some["layer"]), "tokens"]
    gone, all_of_them = int(some["propagated_rerouted"].sum()), int(read.sum())
    return (
        f"Propagated error of {counted(some['layer'].nunique(), 'layer')} of experts leaves out {gone:,} of "
        f"{all_of_them:,} tokens ({gone / all_of_them:.1%}), which go to other experts with every layer in "
        f"4-bit; {EXPERTS_FILE} counts them."
    )


def write_left_out(run: RunFolder, frame: pd.DataFrame) -> None:
    """Write `frame`, what `left_out` gave, to RUN/left_out.csv; no file where nothing is left out."""
    if len(frame):
        run.files.write({FILE: (csv_bytes(frame), len(frame))})
    else:
        run.files.remove(FILE)


def left_out_notes(run: RunFolder, frame: pd.DataFrame) -> tuple[str, ...]:
    """A sentence each on weights, outputs and samples that are left out; none where all is finite.

    frame: what `left_out` gave of `run`.
    """
    return (*_weight_notes(run, frame), *_output_notes(frame), *_answer_notes(run))


def check_answers(run: RunFolder) -> None:
    """Raises SampleError where KL was measured and is finite on no sample."""
    rows = _standard(run)
    if rows.empty or len(finite_answers(rows)):
        return
    raise SampleError(
        f"None of the {len(rows)} samples has a finite KL, so nothing can be chosen: "
        f"{' '.join(left_out_notes(run, left_out(run)))} Check the checkpoint, or pass another --dtype."
    )


def _weight_notes(run: RunFolder, frame: pd.DataFrame) -> tuple[str, ...]:
    hurt = frame.loc[frame["weight"] > 0]
    if hurt.empty:
        return ()
    sizes = {x.name: prod(x.shape) for x in run.key.inventory.layers}
    shown = [
        f"{name} ({count:,} of {sizes[name]:,})"
        for name, count in zip(hurt["layer"].tolist(), hurt["weight"].tolist(), strict=True)
    ]
    return (
        f"{counted(len(shown), 'layer')} with weights that are not finite in 16-bit or in 4-bit (where one "
        f"such value spoils the whole layer); they are left out: {named(shown)}.",
    )


def _output_notes(frame: pd.DataFrame) -> tuple[str, ...]:
    notes = []
    for where, hurt in (
        ("in 16-bit", frame.loc[frame["activation"] > 0]),
        ("in 4-bit alone", frame.loc[frame["propagated"] > frame["activation"]]),
    ):
        if len(hurt):
            first = str(hurt["layer"].iloc[0])
            samples = str(hurt["samples"].iloc[0]).split("; ")
            notes.append(
                f"{counted(len(hurt), 'layer')} with outputs that are not finite {where}, first {first} "
                f"on {named(samples)}; these values are left out, and counted in {FILE}."
            )
    return tuple(notes)


def _answer_notes(run: RunFolder) -> tuple[str, ...]:
    rows = _standard(run)
    finite = set(finite_answers(rows)["sample"])
    missing = [name for name in rows["sample"].tolist() if name not in finite]
    if not missing:
        return ()
    outputs = run.units("outputs")
    hurt = outputs.loc[outputs["activation_nonfinite"].fillna(0) > 0, "sample"]
    broken = set(hurt)
    notes = []
    for where, names in (
        ("in 16-bit", [x for x in missing if x in broken]),
        ("in 4-bit", [x for x in missing if x not in broken]),
    ):
        if names:
            notes.append(
                f"{counted(len(names), 'sample')} left out of KL and sensitivity, since the answer is not "
                f"finite {where}: {named(names)}."
            )
    return tuple(notes)


def _standard(run: RunFolder) -> pd.DataFrame:
    """KL rows of the calibration samples under standard 4-bit."""
    rows = run.units("kl")
    return rows.loc[np.asarray(rows["candidate"] == STANDARD, dtype=bool)]
