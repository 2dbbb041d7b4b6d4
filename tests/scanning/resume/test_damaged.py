"""Unit files that were cut short, by a disk or a copy: set aside, named, and measured again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from threading import Barrier
from typing import Any

import pytest

from qprobe.calibration import calibrate as calibration
from qprobe.errors import ManifestError, RunError
from qprobe.runs.damaged import set_aside_damaged
from qprobe.runs.folder import RunFolder
from qprobe.scanning.run import ScanResult
from tests.scanning.asked import scan
from tests.scanning.resume.runs import Share, options, table, units

CALIBRATED = "nf4-calibrated"


def cut(run: Path, *names: str) -> dict[str, bytes]:
    """What is left of these unit files, by the names under which they are to be set aside."""
    left = {}
    for name in names:
        path = run / "units" / name
        path.write_bytes(path.read_bytes()[:-9])
        left[f"{name}.damaged"] = path.read_bytes()
    return left


def told(result: ScanResult) -> list[str]:
    """The sentences on damaged files, which are the same in the result and in scan.json."""
    found = [note for note in result.notes if "damaged" in note]
    assert found == [note for note in RunFolder(result.run).scan.notes if "damaged" in note]
    return found


@pytest.mark.slow
def test_every_cut_unit_is_set_aside_named_and_measured_anew(llama: Path, whole: Path, tmp_path: Path):
    run = Path(copytree(whole, tmp_path / "run"))
    choice = min(path.name for path in (run / "units").glob("heldout-*.parquet"))
    names = [choice, "isolated-00000.parquet", "outputs-00001.parquet", "sensitivity-00002.parquet"]
    left = cut(run, *names, "weights-00000.parquet")
    (note,) = told(scan(**options(llama, run)))
    assert note.endswith(f"measured again where needed: {', '.join((*names, 'weights-00000.parquet'))}.")
    assert table(run) == table(whole) and units(run) == units(whole) | left
    again = cut(run, "kl-00000.parquet", "weights-00000.parquet")
    (note,) = told(scan(**options(llama, run)))  # one sentence, of both times
    assert "kl-00000.parquet" in note and note.count("weights-00000.parquet") == 1
    assert table(run) == table(whole) and units(run) == units(whole) | left | again


def test_nothing_is_said_of_a_run_without_damage(whole: Path):
    assert not any("damaged" in note for note in RunFolder(whole).scan.notes)


@pytest.mark.slow
def test_a_cut_unit_of_an_ablation_is_measured_anew(llama: Path, whole: Path, tmp_path: Path):
    asked = options(llama, Path(copytree(whole, tmp_path / "run")), ablate="2")
    run = scan(**asked).run
    before, wanted = units(run), (run / "ablation.csv").read_bytes()
    name = max(path.name for path in (run / "units").glob("ablation-*.parquet"))
    left = cut(run, name)
    (note,) = told(scan(**asked))
    assert name in note and units(run) == before | left and (run / "ablation.csv").read_bytes() == wanted


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_a_cut_unit_of_named_calibrated_weights_is_measured_anew_and_the_weights_stay(
    llama: Path, tmp_path: Path
):
    asked = options(llama, tmp_path / "run", format=CALIBRATED)
    first = scan(**asked)
    before, codes = units(first.run), RunFolder(first.run).scan.codes
    left = cut(first.run, "calibration-00001.parquet", "kl-00000.parquet")
    again = scan(**asked)
    assert units(again.run) == before | left and RunFolder(again.run).scan.codes == codes is not None
    assert [n for n in again.notes if n not in first.notes] == told(again)  # no layer is said to be missing
    assert again.kl_dynamic == first.kl_dynamic


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_cut_units_of_calibrated_experts_are_measured_anew_and_the_weights_stay(
    mixture: Callable[[str], Path], tmp_path: Path
):
    asked = options(mixture("mixtral"), tmp_path / "run", format=CALIBRATED, measures=("activation",))
    first = scan(**asked)
    before, codes = units(first.run), RunFolder(first.run).scan.codes
    assert RunFolder(first.run).units("calibration")["nearest"].notna().sum() >= 2  # fused weights come last
    names = sorted(x for x in before if x.startswith("calibration-") and x.endswith(".parquet"))
    left = cut(first.run, *names[-2:])
    again = scan(**asked)
    assert units(again.run) == before | left and RunFolder(again.run).scan.codes == codes is not None


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_cut_weights_of_a_calibration_that_was_interrupted_are_made_anew(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    undisturbed = scan(**options(llama, tmp_path / "undisturbed", format=CALIBRATED)).run
    asked = options(llama, tmp_path / "run", format=CALIBRATED)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "join_codes", lambda *_: (_ for _ in ()).throw(ManifestError("killed")))
        with pytest.raises(ManifestError, match="killed"):
            scan(**asked)
    weights = "calibration-00000.safetensors"
    left = cut(tmp_path / "run", weights, "calibration-00002.parquet")
    (note,) = told(scan(**asked))
    assert weights in note and "calibration-00002.parquet" in note
    assert units(tmp_path / "run") == units(undisturbed) | left
    assert RunFolder(tmp_path / "run").scan.codes == RunFolder(undisturbed).scan.codes is not None


@pytest.mark.slow
def test_a_scan_of_weights_alone_does_so_too(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    alone: dict[str, Any] = {"measures": ("weight",), "samples": None, "batch_size": 4, "max_new_tokens": 64}
    asked = options(llama, tmp_path / "run", **alone)
    run = scan(**asked).run
    before, wanted = units(run), table(run)
    left = cut(run, "weights-00000.parquet")
    (note,) = told(scan(**asked))
    assert "weights-00000.parquet" in note and units(run) == before | left and table(run) == wanted


@pytest.mark.slow
def test_a_unit_of_other_columns_is_refused_and_nothing_is_set_aside(
    llama: Path, whole: Path, tmp_path: Path
):
    run = Path(copytree(whole, tmp_path / "run"))
    left = cut(run, "isolated-00000.parquet")
    RunFolder(run).units("kl").assign(extra=1).to_parquet(run / "units" / "kl-00001.parquet")
    with pytest.raises(RunError, match=r"kl-00001\.parquet has other columns"):
        scan(**options(llama, run))
    assert not list(run.rglob("*.damaged"))
    assert (run / "units" / "isolated-00000.parquet").read_bytes() == left["isolated-00000.parquet.damaged"]


def test_joining_and_reading_refuse_what_is_damaged_and_leave_it(whole: Path, tmp_path: Path):
    run = Path(copytree(whole, tmp_path / "run"))
    (left,) = cut(run, "kl-00001.parquet").values()
    with pytest.raises(RunError, match=r"kl-00001\.parquet is damaged .*Scan again into the same folder"):
        RunFolder(run).units("kl")
    assert RunFolder(run).table is not None  # which was made before
    assert (run / "units" / "kl-00001.parquet").read_bytes() == left


@pytest.mark.slow
def test_several_processes_set_aside_at_once_what_each_found(whole: Path, tmp_path: Path):
    for attempt in range(5):
        run = Path(copytree(whole, tmp_path / str(attempt)))
        left = cut(run, *(f"sensitivity-0000{i}.parquet" for i in range(3)))
        together = Barrier(4, timeout=300)
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda _, run=run, wait=together: (wait.wait(), set_aside_damaged(RunFolder(run))),
                    range(4),
                )
            )
        there = units(run)
        assert {n: d for n, d in there.items() if n.endswith(".damaged")} == left
        assert not {n.removesuffix(".damaged") for n in left} & there.keys()


def test_a_file_that_another_process_took_meanwhile_is_no_error(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Path(copytree(whole, tmp_path / "run"))
    cut(run, "isolated-00000.parquet", "kl-00000.parquet")

    def vanishing(self: RunFolder, name: str) -> Any:
        path = self.path / "units" / name
        if name == "outputs-00000.parquet":
            path.unlink()  # before it is read
        try:
            return real(self, name)
        finally:
            if name == "kl-00000.parquet":
                path.unlink()  # after it was found to be damaged

    real = RunFolder.unit
    monkeypatch.setattr(RunFolder, "unit", vanishing)
    set_aside_damaged(RunFolder(run))
    assert [path.name for path in run.rglob("*.damaged")] == ["isolated-00000.parquet.damaged"]


@pytest.mark.slow
@pytest.mark.parametrize("is_chosen", [True, False])
def test_ranks_that_resume_measure_what_was_set_aside_and_tell(
    is_chosen: bool, whole: Path, share: Share, tmp_path: Path
):
    run = Path(copytree(whole, tmp_path / "run"))
    if not is_chosen:
        (run / "skiplist.json").unlink()
    left = cut(run, "kl-00000.parquet", "kl-00001.parquet")
    assert share(1, 2, run).skiplist is None  # the first batch is not its own
    last = share(0, 2, run)
    assert (last.skiplist is None) == is_chosen
    (note,) = (note for note in RunFolder(run).scan.notes if "damaged" in note)
    assert "kl-00000.parquet, kl-00001.parquet" in note
    assert table(run) == table(whole) and units(run) == units(whole) | left
