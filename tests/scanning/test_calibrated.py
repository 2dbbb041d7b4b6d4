"""A scan of calibrated weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from qprobe.errors import QprobeError, RunError
from qprobe.manifest.read import read_manifest
from qprobe.runs.folder import RunFolder
from tests.scanning.asked import TinyFolder, options, scan, write_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_rounding")]


def test_a_calibrated_scan_resumes_as_it_was_and_refuses_to_mix_with_a_plain_one(
    tiny_folder: TinyFolder, tmp_path: Path
):
    asked = options(tiny_folder("llama"), tmp_path / "run", format="nf4-calibrated")
    first = scan(**asked)
    codes = RunFolder(first.run).scan.codes
    again = scan(**asked)
    assert (again.kl_standard_4bit, again.kl_dynamic) == (first.kl_standard_4bit, first.kl_dynamic)
    assert RunFolder(again.run).scan.codes == codes is not None
    manifest = read_manifest(first.skiplist)
    plain = scan(**options(tiny_folder("llama"), tmp_path / "plain"))
    # On the same samples standard 4-bit costs what a scan without calibration says it does.
    assert first.kl_standard_4bit == pytest.approx(plain.kl_standard_4bit, rel=1e-6)
    listed = {c.name: c.kl for c in manifest.compared}
    assert listed["standard 4-bit: rounded to nearest, nothing kept"] == first.kl_standard_4bit
    assert listed["nothing kept"] != first.kl_standard_4bit and "(standard 4-bit " in first.verdict
    # At equal bytes, whatever the list then makes of it.
    assert ("does not pay" in first.verdict) == (listed["nothing kept"] >= first.kl_standard_4bit)
    assert "calibrate" in first.seconds and first.verdict.startswith("Calibrated 4-bit costs a KL of ")
    with pytest.raises(QprobeError, match=r"format\.name: nf4-calibrated -> nf4"):
        scan(**{**asked, "format": "nf4"})


def test_scales_are_tuned_and_the_run_says_so(tiny_folder: TinyFolder, tmp_path: Path):
    asked = {**options(tiny_folder("llama"), tmp_path / "run"), "format": "nf4-calibrated"}
    lines = [{"prompt": f"What comes after {i}?", "answer": f"the number {i + 1}"} for i in range(30)]
    asked |= {"data": write_lines(tmp_path / "rows.jsonl", *lines), "samples": 30, "tune": 6}
    first = scan(**asked)
    run = RunFolder(tmp_path / "run")
    assert run.key.spec.rounding is not None and run.key.spec.rounding.tune_steps == 6
    assert any("Scales were tuned" in n or "Tuned scales were no better" in n for n in first.notes)
    assert "--tune 6" in read_manifest(tmp_path / "run" / "skiplist.json").made_by.command
    with pytest.raises(QprobeError, match=r"rounding\.tune_steps: 6 -> 0"):
        scan(**{**asked, "tune": 0})


def test_codes_are_fitted_to_more_samples_than_are_measured(tiny_folder: TinyFolder, tmp_path: Path):
    # 6 samples are measured or held out; the answer of the 9th row is that of the 3rd, which is held out.
    rows = [{"prompt": f"What comes after {i}?", "answer": f"the number {i + 1}"} for i in range(12)]
    rows[8] = rows[2]
    data = write_lines(tmp_path / "rows.jsonl", *rows)
    folder, calibrated = tiny_folder("llama"), "nf4-calibrated"
    few = scan(**options(folder, tmp_path / "few", format=calibrated, data=data))
    more = options(folder, tmp_path / "more", format=calibrated, data=data, calibration_samples=9)
    found = scan(**more)
    own, other = (RunFolder(tmp_path / name).key.spec for name in ("few", "more"))
    assert (own.calibration, own.held_out, own.codes) == (other.calibration, other.held_out, ())
    assert [s.id for group in other.codes for s in group] == [f"rows-{i}" for i in (7, 8, 10, 11)]
    assert found.samples == few.samples == 6 and found.kl_standard_4bit == few.kl_standard_4bit
    assert RunFolder(found.run).scan.codes != RunFolder(few.run).scan.codes
    assert any("which are 4 of the 8 samples that the codes were fitted to" in n for n in found.notes)
    assert any("Of the 9 samples asked for, codes were fitted to 8." in n for n in found.notes)
    assert "--calibration-samples 9" in read_manifest(found.run / "skiplist.json").made_by.command


def test_what_calibration_leaves_is_kept_where_that_is_asked_for(tiny_folder: TinyFolder, tmp_path: Path):
    asked = options(tiny_folder("llama"), tmp_path / "run", format="nf4-calibrated", keep_correction=4)
    found = scan(**asked)
    run = RunFolder(found.run)
    noted, path = run.notes.get("correction"), found.run / "correction.safetensors"
    assert (noted.rank, noted.codes) == (4, run.codes.sha256 if run.codes else "")
    assert any(
        x.endswith("Whether it helps was not tried: that takes 16 calibration samples.") for x in found.notes
    )
    written = path.stat().st_mtime_ns
    scan(**asked)
    assert path.stat().st_mtime_ns == written  # it is there for these codes
    with pytest.raises(RunError, match=r"correction of rank 4, .* --keep-correction 2 would replace it"):
        scan(**{**asked, "keep_correction": 2})
    assert path.stat().st_mtime_ns == written and run.notes.get("correction") == noted
    path.rename(tmp_path / "before")
    scan(**{**asked, "keep_correction": 2})
    ranks = {len(x) for name, x in load_file(path).items() if name.endswith(".right")}
    assert (ranks, RunFolder(found.run).notes.get("correction").rank) == ({2}, 2)
    for wrong, format in ((65, "nf4-calibrated"), (4, "nf4")):
        with pytest.raises(QprobeError, match="--keep-correction"):
            scan(**{**asked, "keep_correction": wrong, "format": format})


def test_samples_for_the_codes_of_plain_nf4_are_refused(tiny_folder: TinyFolder, tmp_path: Path):
    with pytest.raises(QprobeError, match="--calibration-samples says what nf4-calibrated fits codes to"):
        scan(**options(tiny_folder("llama"), tmp_path / "run"), calibration_samples=6)


def test_too_few_samples_to_keep_any_back_leave_the_scales(tiny_folder: TinyFolder, tmp_path: Path):
    asked = {**options(tiny_folder("llama"), tmp_path / "run"), "format": "nf4-calibrated", "tune": 6}
    found = scan(**asked)
    assert "Scales are not tuned: that takes 16 calibration samples." in found.notes


def test_tuning_of_plain_nf4_is_refused(tiny_folder: TinyFolder, tmp_path: Path):
    with pytest.raises(QprobeError, match="--tune moves the scales that nf4-calibrated chose"):
        scan(**options(tiny_folder("llama"), tmp_path / "run"), tune=6)


def test_a_bound_on_the_kl_takes_the_fewest_bytes_of_calibrated_weights(
    tiny_folder: TinyFolder, tmp_path: Path
):
    asked = options(tiny_folder("llama"), tmp_path / "run", format="nf4-calibrated")
    roomy = scan(**asked, max_kl=100.0)
    found = read_manifest(roomy.skiplist)
    (alone,) = [c for c in found.compared if c.name == "nothing kept"]
    assert roomy.kl_dynamic == alone.kl is not None and "nothing is kept" in roomy.verdict
    assert found.budget.total_bytes == found.budget.standard_4bit_bytes == alone.total_bytes
    tight = scan(**asked, max_kl=0.8 * roomy.kl_dynamic)
    kept = read_manifest(tight.skiplist)
    assert tight.kl_dynamic is not None and tight.kl_dynamic <= 0.8 * roomy.kl_dynamic
    assert kept.budget.total_bytes > alone.total_bytes and kept.codes == found.codes
