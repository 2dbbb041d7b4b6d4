"""A scan within a memory limit."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from qprobe.calibration import calibrate as calibration
from qprobe.errors import BudgetError, MachineError
from qprobe.measure import memory
from qprobe.runs.folder import RunFolder
from tests import tiny
from tests.scanning.asked import Scanned, TinyFolder, options, scan, write_lines

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_scan_within_a_memory_limit_gives_the_same_table(
    name: str, scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path
):
    # On a CPU every weight of a block is copied whenever it is used, however large the limit.
    plain = scanned(name)
    limited = scan(**options(tiny_folder(name), tmp_path / "run", max_memory="1TiB"))
    assert plain.streamed_bytes is None
    blocks = [x for x in RunFolder(limited.run).scan.inventory.layers if not x.fixed]
    assert limited.streamed_bytes > 4 * sum(x.bytes_16bit for x in blocks)
    for file in ("layers.csv", "frontier.csv", "ranks.csv"):
        if (plain.run / file).exists():
            assert (limited.run / file).read_text() == (plain.run / file).read_text()
    assert (limited.kl_standard_4bit, limited.kl_dynamic) == (plain.kl_standard_4bit, plain.kl_dynamic)
    assert RunFolder(limited.run).key == RunFolder(plain.run).key
    assert not list(limited.run.glob(".weight-*"))


def test_a_scan_within_a_memory_limit_resumes_one_without(
    scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path
):
    plain = scanned("llama")
    run = Path(copytree(plain.run, tmp_path / "run"))
    for unit in sorted((run / "units").glob("*-00000.parquet")):
        unit.unlink()
    scan(**options(tiny_folder("llama"), run, max_memory="1TiB"))
    assert (run / "layers.csv").read_text() == (plain.run / "layers.csv").read_text()


def test_a_memory_limit_that_is_too_small_is_refused_before_anything_is_measured(
    tiny_folder: TinyFolder, tmp_path: Path
):
    for asked in ({}, {"format": "nf4-calibrated"}):
        with pytest.raises(MachineError, match=r"--max-memory 1,048,576 B is too little: .* or more\."):
            scan(**options(tiny_folder("llama"), tmp_path / "run", max_memory="1MiB", **asked))
    with pytest.raises(BudgetError, match="cannot be read"):
        scan(**options(tiny_folder("llama"), tmp_path / "run", max_memory="22 apples"))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("quick_rounding")
def test_calibration_within_a_memory_limit_chooses_the_same_codes(tiny_folder: TinyFolder, tmp_path: Path):
    asked = options(tiny_folder("llama"), tmp_path / "plain", format="nf4-calibrated")
    plain = scan(**asked)
    limited = scan(**{**asked, "out": tmp_path / "limited", "max_memory": "1TiB"})
    assert RunFolder(limited.run).scan.codes == RunFolder(plain.run).scan.codes is not None
    assert (limited.run / "layers.csv").read_text() == (plain.run / "layers.csv").read_text()


@pytest.mark.usefixtures("quick_rounding")
def test_where_tuning_has_no_room_the_codes_stay_as_they_are(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [{"prompt": f"What comes after {i}?", "answer": f"the number {i + 1}"} for i in range(30)]
    asked = options(tiny_folder("llama"), tmp_path / "plain", format="nf4-calibrated", tune=0, samples=30)
    asked["data"] = write_lines(tmp_path / "rows.jsonl", *rows)
    plain = scan(**asked)
    lacks = (
        ("tuned_together", MemoryError()),  # while batches are put on the device
        ("tune", torch.OutOfMemoryError("CUDA out of memory.")),
        ("tune", MachineError("--max-memory 9 B is too little.")),
    )
    for number, (place, error) in enumerate(lacks):
        with monkeypatch.context() as patch:
            patch.setattr(calibration, place, raising(error))
            found = scan(**{**asked, "out": tmp_path / str(number), "tune": 4})
        (told,) = (
            note for note in found.notes if note.startswith("Scales are not tuned, for want of memory")
        )
        assert str(error) in told and told.endswith("to tune them, scan with another --out.")
        assert RunFolder(found.run).scan.codes == RunFolder(plain.run).scan.codes is not None
    # As the sentence says, the run stays so, also where there is room by now.
    again = scan(**{**asked, "out": tmp_path / "2", "tune": 4})
    assert told in again.notes and RunFolder(again.run).scan.codes == RunFolder(plain.run).scan.codes
    monkeypatch.setattr(calibration, "tune", raising(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        scan(**{**asked, "out": tmp_path / "wrong", "tune": 4})


def raising(error: Exception) -> Callable[..., None]:
    """A function that raises `error`."""

    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.usefixtures("quick_rounding")
def test_scales_are_tuned_within_a_memory_limit_to_the_same_codes(tiny_folder: TinyFolder, tmp_path: Path):
    rows = [{"prompt": f"What comes after {i}?", "answer": f"the number {i + 1}"} for i in range(30)]
    asked = options(tiny_folder("llama"), tmp_path / "plain", format="nf4-calibrated", tune=4, samples=30)
    asked["data"] = write_lines(tmp_path / "rows.jsonl", *rows)
    plain = scan(**asked)
    limited = scan(**{**asked, "out": tmp_path / "limited", "max_memory": "1TiB"})
    told, (same,) = (
        [x for x in one.notes if x.startswith("Scales were tuned for ")] for one in (plain, limited)
    )
    assert told == [same] and limited.streamed_bytes
    assert RunFolder(limited.run).scan.codes == RunFolder(plain.run).scan.codes is not None
    assert (limited.run / "layers.csv").read_text() == (plain.run / "layers.csv").read_text()


@pytest.mark.usefixtures("quick_rounding")
def test_a_scan_within_a_limit_on_a_cpu_goes_on_after_tuning_took_more(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The peak of a process stays, so that all later work seems to take as much.
    peaks, tune = [2**30], calibration.tune

    def too_much(*given: Any) -> Any:
        peaks.append(2**41)
        return tune(*given)

    monkeypatch.setattr(memory, "peak_bytes", lambda *_, **__: peaks[-1])
    monkeypatch.setattr(calibration, "tune", too_much)
    rows = [{"prompt": f"What comes after {i}?", "answer": f"the number {i + 1}"} for i in range(30)]
    asked = options(tiny_folder("llama"), tmp_path / "run", format="nf4-calibrated", tune=4, samples=30)
    found = scan(**asked, data=write_lines(tmp_path / "rows.jsonl", *rows), max_memory="1TiB")
    assert len(peaks) == 2 and found.skiplist is not None
    (told,) = (note for note in found.notes if note.startswith("Scales are not tuned, for want of memory"))
    assert "a batch took 2,199,023,255,552 B" in told
