"""Skip-lists on held-out samples: which units are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qprobe.formats.nf4 import Nf4
from qprobe.measure.held_out import Groups, Piece, measure_others, measure_pieces, pieces_of
from qprobe.runs.folder import RunFolder
from qprobe.runs.units import NEAREST_STAGE, candidate_stage, other_stage, stage_of
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


def test_samples_of_another_kind_are_measured_once_and_go_on_after_a_kill(
    case: Callable[[str], Case], tmp_path: Path
) -> None:
    found = case("llama")
    groups = [(sample,) for sample in found.samples[:2]]
    kept = {"none": frozenset[str](), "all": frozenset(found.subject.modules)}
    stops = iter([1])

    def measured(run: RunFolder, groups: Groups, fmt: Nf4 | None = None, stops: Iterator[int] = iter(())):  # noqa: B008
        def stop(_stage: str, done: int, _count: int) -> None:
            if done == next(stops, None):
                raise KeyboardInterrupt

        return measure_others(found.subject, run, groups, kept, fmt, stop)

    whole, run = (RunFolder(make_run(tmp_path / name)) for name in ("whole", "run"))
    wanted = measured(whole, groups)
    with pytest.raises(KeyboardInterrupt):
        measured(run, groups, stops=stops)
    first = {name: (run.path / "units" / name).stat().st_mtime_ns for name in run.unit_files()}
    assert len(first) == 2  # of both lists the first batch
    again = measured(RunFolder(run.path), groups)
    assert all(again[name].equals(wanted[name]) for name in kept) and len(run.unit_files()) == 4
    assert all((run.path / "units" / name).stat().st_mtime_ns == at for name, at in first.items())
    assert (again["none"]["kl_sum"] > 0).all() and (again["all"]["kl_sum"] == 0).all()
    nearest = measured(run, groups, Nf4())[NEAREST_STAGE]  # beside what is there
    assert nearest["kl_sum"].tolist() == pytest.approx(again["none"]["kl_sum"].tolist(), rel=1e-3)
    assert len(run.unit_files()) == 6
    measured(run, groups[:1])  # other samples, so other units
    assert len(run.unit_files()) == 8


def test_units_of_samples_of_another_kind_are_known_by_list_samples_and_batches() -> None:
    of = [
        other_stage(kept, batches)
        for kept in (None, frozenset[str](), frozenset({"a"}))
        for batches in ([["x", "y"]], [["x"], ["y"]], [["y", "x"]], [["x"]])
    ]
    assert len(set(of)) == len(of) and all(stage_of(f"{x}-00000.parquet") == x for x in of)
