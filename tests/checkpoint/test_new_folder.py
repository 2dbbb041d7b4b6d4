"""The folder of a checkpoint is new, and what stands in the way is told before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from qprobe.checkpoint.new_folder import alone_at, new_folder, refuse_to_overwrite, scratch_folder
from qprobe.checkpoint.quantize import quantize
from qprobe.errors import ManifestError, ModelError, RunError
from tests.checkpoint.manifests import manifest_for


def test_nothing_is_overwritten(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, said in (("taken", "already and not empty"), ("file", "file is a file")):
        with pytest.raises(ModelError, match=said):
            quantize(manifest_for(folder), tmp_path / name, str(folder), "cpu")
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["file", "notes.txt", "taken"]


def test_a_folder_that_no_new_one_can_take_the_place_of_is_refused(tmp_path: Path, monkeypatch):
    (tmp_path / "there").mkdir()
    for name, leads_to in (("link", "there"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / leads_to)
        with pytest.raises(ModelError, match=f"{name} is a symbolic link"):
            refuse_to_overwrite(tmp_path / name)
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(ModelError, match=r"^\. names no folder that can be made"):
        refuse_to_overwrite(Path("."))
    refuse_to_overwrite(tmp_path / "there")


def test_what_stands_where_the_folder_belongs_is_told_before_anything_is_read(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match=r"file/out cannot be written \(.*file is no folder\)"):
        quantize(tmp_path / "none.json", tmp_path / "file" / "out")


def test_only_what_the_disk_says_is_told_as_a_folder_that_cannot_be_written(tmp_path: Path):
    def fail(kind: type[Exception], cause: OSError | None) -> None:
        with scratch_folder(tmp_path / "out"):
            raise kind("as it was raised") from cause

    full = OSError(28, "No space left on device")
    for kind in (ManifestError, RunError):
        with pytest.raises(ModelError, match=r"out cannot be written \(No space left on device\)"):
            fail(kind, full)
        with pytest.raises(kind, match="as it was raised"):
            fail(kind, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_a_killed_run_left_is_removed_and_what_another_one_writes_is_not(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    mine = [tmp_path / x for x in (".out.notes.tmp", ".outer.0123456789ab.tmp", ".other.0123456789ab.tmp")]
    for place in (tmp_path / ".out.0123456789ab.tmp", *mine):
        place.mkdir()
        (place / "model.safetensors").write_text("half")
    with new_folder(tmp_path / "out") as living:
        quantize(manifest_for(folder), tmp_path / "out", str(folder), "cpu")
        assert {*mine, living} == {x for x in tmp_path.iterdir() if x.name.startswith(".")}
        with pytest.raises(ModelError), new_folder(tmp_path / "out"):
            pass  # which is there by now
        (tmp_path / "out").rename(tmp_path / "first")
    assert (tmp_path / "out").is_dir()


def test_a_second_process_does_not_write_the_same_folder_and_is_told_before_anything_is_read(tmp_path):
    with (
        alone_at(tmp_path / "out"),
        pytest.raises(ModelError, match=r"Another process is writing .*out\. Wait for it to end"),
    ):
        quantize(tmp_path / "none.json", tmp_path / "out")
    (tmp_path / ".out.lock").write_bytes(b"")  # of a process that was killed
    with pytest.raises(ManifestError, match=r"none\.json"):
        quantize(tmp_path / "none.json", tmp_path / "out")
    assert not list(tmp_path.iterdir())
