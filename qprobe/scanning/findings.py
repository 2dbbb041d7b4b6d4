"""From the units of a scan to its tables, and to the sentences that a reader of them needs; no torch."""

from __future__ import annotations

from qprobe.registry.measures import OUTPUTS
from qprobe.runs.folder import RunFolder
from qprobe.runs.left_out import check_answers, left_out_notes, write_left_out
from qprobe.runs.notes import Ran, Remarks
from qprobe.runs.ranks import write_ranks
from qprobe.runs.table import left_out, write_table
from qprobe.system.wording import counted, named


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
    run.notes.put("non-finite", Remarks(left_out_notes(run, missing)))
    check_answers(run)


def which_ran(run: RunFolder) -> Ran:
    """Which linears never ran on the samples, by the finished units."""
    ran = set(run.units(OUTPUTS.name)["layer"])
    unmeasured = tuple(x.name for x in run.key.inventory.layers if x.name not in ran)
    if not unmeasured:
        return Ran((), ())
    count = counted(len(unmeasured), "linear")
    return Ran(unmeasured, (f"{count} never ran on these samples, so not measured: {named(unmeasured)}.",))
