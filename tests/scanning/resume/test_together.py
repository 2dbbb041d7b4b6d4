"""Processes that share a scan at the same time: all of them measure, until one chooses."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Lock, get_ident
from typing import Any

import pytest

from qprobe.calibration import calibrate as calibration
from qprobe.formats.codes_file import FILE_NAME
from qprobe.measure import held_out
from qprobe.options import ScanOptions, no_progress
from qprobe.runs.folder import RunFolder
from qprobe.runs.shards import is_chosen, measuring, wait_for_units
from qprobe.runs.units import NEAREST_STAGE
from qprobe.scanning import measure as measuring_step
from qprobe.scanning import scan as road
from qprobe.scanning import together
from qprobe.scanning.asked.request import parse_options
from qprobe.scanning.process import Process
from qprobe.scanning.run import ScanResult
from qprobe.system.processes import Shard, even_runs
from tests.scanning.resume.runs import Calibrated, Share, contents, manifest, options, table, units

pytestmark = pytest.mark.slow


@pytest.fixture
def at_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[ScanResult]]:
    """`at_once(world, out)`: the scan by so many threads, each with a model of its own, as processes have."""
    # transformers sets torch's default dtype while it makes a model, and backward passes replace attention.
    one_at_a_time = Lock()

    def alone(real: Any) -> Any:
        def call(*asked: Any) -> Any:
            with one_at_a_time:
                return real(*asked)

        return call

    monkeypatch.setattr(road, "check_model", alone(road.check_model))
    monkeypatch.setattr(road, "open_model", alone(road.open_model))

    def run(world: int, out: Path, **changes: Any) -> list[ScanResult]:
        asked = parse_options(ScanOptions(**options(llama, out, **changes)))
        there = Barrier(world)

        def together(real: Any) -> Any:
            def call(*given: Any) -> Any:
                there.wait(60)  # as processes that torchrun starts together
                return real(*given)

            return call

        monkeypatch.setattr(calibration, "shares", together(calibration.shares))
        monkeypatch.setattr(road, "measure_units", together(alone(measuring_step.measure_units)))

        def one(rank: int) -> ScanResult:
            return road.scan_model(asked, Process(RunFolder(out), Shard(rank, world), no_progress))

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(one, range(world)))

    return run


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_what_is_measured_of_the_candidates_and_leave_the_files_of_one(
    world: int, whole: Path, at_once: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passes: list[tuple[int, int]] = []  # thread, lists
    real = held_out.candidate_kl

    def noted(subject: Any, batch: Any, lists: dict[str, Any]) -> Any:
        passes.append((get_ident(), len(lists)))
        return real(subject, batch, lists)

    monkeypatch.setattr(held_out, "candidate_kl", noted)
    results = at_once(world, tmp_path / "run")
    assert sum(r.skiplist is not None for r in results) == 1
    measured = len([x for x in units(whole) if x.startswith("heldout-")])
    # Each list on each batch once, in all processes but those that came too late for a share.
    assert sum(count for _, count in passes) == measured
    assert len({thread for thread, _ in passes}) > 1
    assert units(tmp_path / "run") == units(whole) and table(tmp_path / "run") == table(whole)
    same = ("frontier.csv", "ranks.csv", "peaks.csv", "samples.json")
    found, expected = contents(tmp_path / "run"), contents(whole)
    assert {x: found[x] for x in same} == {x: expected[x] for x in same}
    assert RunFolder(tmp_path / "run").notes.sentences == RunFolder(whole).notes.sentences


@pytest.mark.usefixtures("quick_rounding")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_calibrate_tune_and_measure_together_leave_the_files_of_one(
    world: int, calibrated: Calibrated, at_once: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rounded, nearest, tuned = (
        calls_of(monkeypatch, place, name)
        for place, name in ((calibration, "_finish"), (held_out, "nearest_kl"), (calibration, "tune"))
    )
    run, whole = tmp_path / "run", calibrated.run
    results = at_once(world, run, **calibrated.asked)
    assert sum(r.skiplist is not None for r in results) == 1
    names = list(units(whole))
    # Each weight and each batch of standard 4-bit beside the lists once; one process tunes.
    assert len(rounded) == sum(x.startswith("calibration-") for x in names)
    assert {work.shard.rank for work, *_ in rounded} == set(range(world))
    assert len(nearest) == sum(x.startswith(f"{NEAREST_STAGE}-") for x in names) > 1
    assert len(tuned) == 1 and any("the damage fell" in x for x in RunFolder(whole).notes.sentences)
    assert_same_files(run, whole)


@pytest.mark.usefixtures("quick_rounding")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_calibrate_one_after_the_other_leave_the_files_of_one(
    world: int, calibrated: Calibrated, share: Share, tmp_path: Path
):
    for rank in reversed(range(world)):
        share(rank, world, tmp_path / "run", **calibrated.asked)
    assert_same_files(tmp_path / "run", calibrated.run)


def calls_of(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[tuple[Any, ...]]:
    """A list of what `place.name` is called with from now on."""
    real, calls = getattr(place, name), []
    monkeypatch.setattr(place, name, lambda *asked: (calls.append(asked), real(*asked))[1])
    return calls


def assert_same_files(run: Path, whole: Path) -> None:
    """Everything that a scan of calibrated weights found is the same to the byte."""
    assert units(run) == units(whole) and table(run) == table(whole)
    same = (FILE_NAME, "frontier.csv", "ranks.csv", "peaks.csv", "samples.json", "files.json")
    found, expected = contents(run), contents(whole)
    assert [x for x in same if found[x] != expected[x]] == []
    assert manifest(run) == manifest(whole)
    assert RunFolder(run).codes == RunFolder(whole).codes is not None
    assert RunFolder(run).notes.sentences == RunFolder(whole).notes.sentences


def test_ablation_is_shared_as_well(at_once: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, shares = together.measure_ablation, []
    monkeypatch.setattr(together, "measure_ablation", lambda *a: (shares.append(a[-1]), real(*a)))
    at_once(2, tmp_path / "run", ablate="2")
    assert {shard.rank for shard in shares} == {0, 1}
    at_once(1, tmp_path / "alone", ablate="2")
    for file in ("ablation.csv", "layers.csv"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_a_process_waits_for_those_that_measure_and_for_no_other(tmp_path: Path):
    with ThreadPoolExecutor(1) as pool:
        with measuring(tmp_path, Shard(1, 3)):
            waiter = pool.submit(wait_for_units, tmp_path, Shard(0, 3))
            with pytest.raises(TimeoutError):
                waiter.result(0.1)
        waiter.result(30)
    wait_for_units(tmp_path, Shard(0, 3))  # nobody is there any more


def test_a_list_is_chosen_once_it_was_written_for_this_request(whole: Path, llama: Path):
    asked = parse_options(ScanOptions(**options(llama, whole)))
    other = parse_options(ScanOptions(**options(llama, whole, budget="+20%")))
    assert is_chosen(whole, asked.after_units) and not is_chosen(whole, other.after_units)


def test_runs_of_work_cost_about_as_much():
    # 20 in all: half, that is 10, is reached behind the third; 6.67 and 13.33 behind the second and fourth.
    assert even_runs([4, 4, 2, 4, 4, 2], 2) == [range(0, 3), range(3, 6)]
    assert even_runs([4, 4, 2, 4, 4, 2], 3) == [range(0, 2), range(2, 4), range(4, 6)]
    assert [i for part in even_runs([1, 1], 5) for i in part] == [0, 1]
    assert even_runs([], 2) == [range(0, 0)] * 2
