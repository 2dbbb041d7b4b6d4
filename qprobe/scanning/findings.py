"""From the units of a scan to its tables, and to the sentences that a reader of them needs; no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qprobe.records import Inventory
from qprobe.runs.damaged import note_damaged
from qprobe.runs.left_out import check_answers, left_out_notes, write_left_out
from qprobe.runs.needed import needed_units
from qprobe.runs.ranks import write_ranks
from qprobe.runs.store import read_scan, read_units, update_scan
from qprobe.runs.table import left_out, write_table
from qprobe.system.wording import counted, named


def write_findings(folder: Path) -> None:
    """The layer table and what goes with it, from the units; notes on what a reader must know of them.

    Raises SampleError if the KL is finite on no sample.
    """
    if "outputs" in needed_units(read_scan(folder).spec):
        order_layers(folder)
    write_table(folder)
    write_ranks(folder)
    missing = left_out(folder)
    write_left_out(folder, missing)
    add_notes(folder, left_out_notes(folder, missing))
    note_damaged(folder)
    check_answers(folder)


def order_layers(folder: Path) -> None:
    """Note in the run folder in which order the linears ran, and which never did."""
    record = read_scan(folder)
    ran = list(dict.fromkeys(read_units(folder, "outputs")["layer"]))
    position = {name: i for i, name in enumerate(ran)}
    inventory = record.inventory
    ordered = sorted(inventory.layers, key=lambda x: position.get(x.name, len(ran)))
    unmeasured = tuple(x.name for x in ordered if x.name not in position)
    inventory = Inventory(tuple(ordered), inventory.uncovered, inventory.other_bytes)
    update_scan(folder, replace(record, inventory=inventory, unmeasured=unmeasured))
    if unmeasured:
        count = counted(len(unmeasured), "linear")
        add_notes(folder, (f"{count} never ran on these samples, so not measured: {named(unmeasured)}.",))


def add_notes(folder: Path, notes: tuple[str, ...]) -> None:
    """Put sentences into the run's notes; those that stand there already are not repeated."""
    record = read_scan(folder)
    update_scan(folder, replace(record, notes=tuple(dict.fromkeys((*record.notes, *notes)))))
