"""A scan that is killed, runs out of disk, or finds another's folder."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qprobe.errors import QprobeError, RunError
from qprobe.measure.store import read_scan, update_scan
from qprobe.scanning import scan
from tests.resume.runs import options, table, units

# Resumed ------------------------------------------------------------------------------------------------


def test_answers_are_generated_once(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Path(copytree(whole, tmp_path / "run"))
    batches = sorted((run / "answers").iterdir())
    assert len(batches) == 5  # nine questions, two at a time
    batches[1].unlink()
    batches[2].write_text(batches[2].read_text()[:20])  # damaged from outside
    asked: list[int] = []
    from qprobe.measure import answers

    real = answers.answer_group

    def counted(model: Any, processor: Any, group: Any, *rest: Any) -> Any:
        asked.append(len(group))
        return real(model, processor, group, *rest)

    monkeypatch.setattr(answers, "answer_group", counted)
    scan(options(llama, run))
    assert len(asked) == 2 and table(run) == table(whole)
    assert [p.read_bytes() for p in sorted((run / "answers").iterdir())] == [
        p.read_bytes() for p in sorted((whole / "answers").iterdir())
    ]


# The disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 3, 7, 12, 25])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    after: int, llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, real, written = tmp_path / "run", os.fsync, []

    def fsync(file: int) -> None:
        if len(written) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)
        written.append(file)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        with pytest.raises(QprobeError, match=r"cannot be written \(No space left on device\)\. Make room"):
            scan(options(llama, run))
    finished = units(run) if (run / "units").is_dir() else {}
    assert not list(run.rglob("*.tmp"))
    scan(options(llama, run))
    assert table(run) == table(whole)
    assert {name: data for name, data in units(run).items() if name in finished} == finished


# Another scan's folder ----------------------------------------------------------------------------------


def test_a_folder_of_another_version_is_refused_with_both_versions(llama: Path, whole: Path, tmp_path: Path):
    run = Path(copytree(whole, tmp_path / "run"))
    record = read_scan(run)
    versions = {**record.spec["versions"], "torch": "1.0.0"}
    update_scan(run, replace(record, spec={**record.spec, "versions": versions}))
    before = units(run)
    with pytest.raises(RunError, match=r"1 place: spec\.versions\.torch: 1\.0\.0 -> .*Pass another --out"):
        scan(options(llama, run))
    assert units(run) == before


def test_a_library_that_is_not_installed_says_its_version_itself(monkeypatch: pytest.MonkeyPatch):
    from importlib.metadata import PackageNotFoundError

    from qprobe import __version__, versions

    def version(name: str) -> str:
        if name == "qprobe":
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(versions, "version", version)
    found = versions.library_versions()
    assert found["qprobe"] == __version__ and found["torch"] == "1.2.3" and len(found) >= 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 3}, r"spec\.calibration: 3 entries -> 2 entries"),
        ({"nodes": 1}, r"spec\.measures\.nodes: 2 -> 1"),
        ({"max_new_tokens": 3}, r"spec\.calibration\[0\]\[0\]\.digest: "),
        ({"dtype": "float16"}, r"format\.compute_dtype: bfloat16 -> float16"),
    ],
)
def test_a_changed_setting_is_named(
    changes: dict[str, Any], said: str, llama: Path, whole: Path, tmp_path: Path
):
    run = Path(copytree(whole, tmp_path / "run"))
    with pytest.raises(RunError, match=f"holds another scan, which differs in .*{said}"):
        scan(options(llama, run, **changes))
    assert units(run) == units(whole)


def test_another_checkpoint_and_another_processor_are_named_first(llama: Path, whole: Path, tmp_path: Path):
    changed = Path(copytree(llama, tmp_path / "llama"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.embed_tokens.weight"][:9] *= 1.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    template = changed / "chat_template.jinja"
    template.write_text("now: " + template.read_text())
    # Other weights and other inputs give other answers, but the cause comes before what follows from it.
    with pytest.raises(RunError, match=r"places: spec\.processor: .*; spec\.weights: .*; spec\.calibration"):
        scan(options(changed, Path(copytree(whole, tmp_path / "run"))))


def test_calibration_is_not_shared(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"not calibrated yet.*without RANK and WORLD_SIZE"):
        scan(options(llama, tmp_path / "run", format="nf4-calibrated"))
