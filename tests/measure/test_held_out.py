"""Skip-lists on held-out samples: which units are measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qprobe.measure.held_out import Piece, measure_pieces, pieces_of
from qprobe.runs.folder import RunFolder
from qprobe.runs.units import candidate_stage
from tests.measure.conftest import Case
from tests.runs.runs import make_run


def test_the_pieces_that_are_asked_for_are_measured_once_each(
    case: Callable[[str], Case], tmp_path: Path
) -> None:
    found = case("llama")
    groups = [(sample,) for sample in found.samples[:2]]
    everything = frozenset(found.subject.modules)
    none, all_of_them = candidate_stage(frozenset()), candidate_stage(everything)
    lists = {none: frozenset[str](), all_of_them: everything}
    run = RunFolder(make_run(tmp_path / "run"))
    steps: list[tuple[int, int]] = []

    def measure(*pieces: Piece) -> None:
        measure_pieces(found.subject, run, groups, lists, pieces, lambda _, *step: steps.append(step))

    measure(Piece(1, none))
    assert (run.missing_units(none, 2), run.missing_units(all_of_them, 2)) == ([0], [0, 1])
    written = {name: (run.path / "units" / name).stat().st_mtime_ns for name in run.unit_files()}
    measure(*pieces_of(groups, lists))
    assert (run.missing_units(none, 2), run.missing_units(all_of_them, 2)) == ([], [])
    assert steps == [(1, 1), (1, 2), (2, 2)]
    assert all((run.path / "units" / name).stat().st_mtime_ns == at for name, at in written.items())
    assert run.units(none)["sample"].tolist() == [sample.id for (sample,) in groups]
    assert (run.units(none)["kl_sum"] > 0).all() and (run.units(all_of_them)["kl_sum"] == 0).all()
