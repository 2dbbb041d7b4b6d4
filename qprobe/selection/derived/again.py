"""A run folder for reading: what was damaged in it is made again, set aside, or named; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qprobe.errors import RunError
from qprobe.runs import findings
from qprobe.runs.damaged import SUFFIX, set_aside_damaged
from qprobe.runs.derived import Derived
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers import ranks, table
from qprobe.runs.units import DamagedUnitError
from qprobe.selection.derived import ablated, frontier
from qprobe.system.files import remove_left_behind
from qprobe.system.wording import named


@contextmanager
def opened(path: Path, tell: Callable[[str], object]) -> Iterator[RunFolder]:
    """The run in the folder `path`, whose damaged files are made again before; `tell` is told of them.

    Files that killed processes left go as well. Where a unit turns out to be damaged, here or in the block,
    it is set aside, and a RunError names it: only a scan can measure it again.
    """
    run = RunFolder(path)
    if run.is_there:
        with suppress(OSError):  # a folder that can only be read is read all the same
            remove_left_behind(run.path)
    try:
        for sentence in make_again(run):
            tell(sentence)
        yield run
    except DamagedUnitError:
        names = set_aside_damaged(run)
        raise RunError(
            f"Units of {run.path} are damaged, so they were set aside as NAME{SUFFIX}: {named(names)}. Scan "
            "again into the same folder, which measures only them again."
        ) from None


def make_again(run: RunFolder) -> tuple[str, ...]:
    """Write again, from the units, the tables of `run` that are not as they were written; says which.

    One that cannot be made, since units are missing, stays as it is; who reads it is told. Raises
    DamagedUnitError where a unit that it needs is damaged, and RunError if the disk refuses.
    """
    if not run.is_there:
        return ()
    lost, made = run.files.lost(_MAKERS), list[str]()
    if not lost or run.units_left:
        return ()
    for make in dict.fromkeys(_MAKERS[name] for name in lost):
        own = [name for name in lost if _MAKERS[name] is make]
        made += own if make(run, lost[own[0]]) else []
    if not made:
        return ()
    return (f"Not as written, so made again from the units of {run.path}: {', '.join(made)}.",)


def _table(run: RunFolder, _: Derived | None) -> bool:
    table.write_table(run)
    return True


def _ranks(run: RunFolder, _: Derived | None) -> bool:
    ranks.write_ranks(run)
    return True


def _left_out(run: RunFolder, _: Derived | None) -> bool:
    findings.write_left_out(run, table.left_out(run))
    return True


_MAKERS: Mapping[str, Callable[[RunFolder, Derived | None], bool]] = {
    table.FILE: _table,
    table.PEAKS: _table,
    table.EXPERTS_FILE: _table,
    ranks.FILE: _ranks,
    findings.FILE: _left_out,
    ablated.FILE: ablated.ablation_again,
    frontier.FILE: frontier.frontier_again,
}
"""What follows from the units alone, in the order in which one is needed for the next."""
