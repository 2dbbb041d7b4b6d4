"""What processes that share a scan do together once all units are there: whatever needs the model.

Each proposes the same lists, since they follow from the units, and measures its share of them; what another
one that ended has left is taken over. One of them then chooses, by what lies in the run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from qprobe.measure.ablation import ablated_layers, measure_ablation
from qprobe.measure.held_out import Piece, measure_pieces, pieces_of
from qprobe.measure.subject import Subject
from qprobe.runs.findings import check_answers, which_ran
from qprobe.runs.layers.table import derived_table
from qprobe.runs.shards import is_chosen, wait_for_units, waiting
from qprobe.runs.units import candidate_stage
from qprobe.scanning.asked.request import ScanRequest
from qprobe.scanning.choose import HeldOut, proposed
from qprobe.scanning.process import Process
from qprobe.scanning.samples import ScanSamples
from qprobe.selection.select import scored_run
from qprobe.system.processes import Shard, even_runs

Part = Callable[[], None]


def measure_together(subject: Subject, work: ScanSamples, asked: ScanRequest, process: Process) -> None:
    """Measure what choosing needs, together with the other processes of this scan that are in the run folder.

    Waits for their units. Does nothing where units are left, as where the others have folders of their own.
    Raises what choosing does for what no list fits.
    """
    run, shard, clock = process.run, process.shard, process.clock
    if shard.is_alone:
        return
    with clock.stage("wait"):
        wait_for_units(run.path, shard)
    if run.units_left or is_chosen(run.path, asked.after_units):
        return
    check_answers(run)
    if asked.ablate is not None:
        with clock.stage("ablate"):
            _in_turn(process, "ablation", _ablations(subject, work, asked, process))
    held_out = HeldOut(subject, run, work.held_out, process.progress)
    if held_out.has_kl:
        with clock.stage("choose"):
            _in_turn(process, "candidates", _candidates(held_out, asked, shard.world))


def _in_turn(process: Process, work: str, parts: Sequence[Part]) -> None:
    """Do this process's own of `parts`, one for each process, then what the others have left of theirs."""
    for number in process.shard.rotated(range(len(parts))):
        with waiting(process.run.path, f"{work}-{number}"):
            parts[number]()


def _ablations(subject: Subject, work: ScanSamples, asked: ScanRequest, process: Process) -> list[Part]:
    """Shares of the batches on which single layers are measured."""
    run, world = process.run, process.shard.world
    assert asked.ablate is not None
    scan = replace(run.scan, unmeasured=which_ran(run).unmeasured)
    layers = ablated_layers(asked.ablate, scan, derived_table(run))
    measure = partial(measure_ablation, subject, run, work.calibration, layers, process.progress)
    return [partial(measure, Shard(number, world)) for number in range(world)]


def _candidates(held_out: HeldOut, asked: ScanRequest, world: int) -> list[Part]:
    """Shares of the held-out passes: each list on each batch, and standard 4-bit beside calibrated weights.

    They cost about as much: a pass for each sample and list, and one more for the reference of each batch.
    """
    groups = held_out.groups
    scored = scored_run(held_out.run, asked.skiplist, derived_table(held_out.run))
    skiplists, lines = proposed(scored, asked.skiplist)
    kept = (frozenset(x.kept) for x in (*skiplists.values(), *lines.values()))
    lists = {candidate_stage(x): x for x in kept}
    pieces = pieces_of(groups, lists)
    nearest = range(len(groups)) if scored.scan.format.is_calibrated else range(0)
    costs = [len(groups[unit]) * (2 if i % len(lists) == 0 else 1) for i, (unit, _) in enumerate(pieces)]
    costs += [2 * len(groups[unit]) for unit in nearest]
    return [
        partial(
            _measure,
            held_out,
            lists,
            [pieces[i] for i in part if i < len(pieces)],
            [i - len(pieces) for i in part if i >= len(pieces)],
        )
        for part in even_runs(costs, world)
    ]


def _measure(
    held_out: HeldOut, lists: Mapping[str, frozenset[str]], pieces: Sequence[Piece], nearest: Sequence[int]
) -> None:
    measure_pieces(held_out.subject, held_out.run, held_out.groups, lists, pieces, held_out.progress)
    held_out.measure_nearest(nearest)
