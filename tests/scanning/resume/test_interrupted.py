"""A scan that is killed, runs out of disk, or finds another's folder."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qprobe.errors import QprobeError, RunError
from qprobe.report.write import write_report
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import key_bytes
from qprobe.scanning.join import join
from qprobe.system import files as atomic
from tests.scanning.asked import scan
from tests.scanning.resume.runs import contents, options, table, units

pytestmark = pytest.mark.slow

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
    from qprobe.scanning import answers

    real = answers.answer_group

    def counted(model: Any, processor: Any, group: Any, *rest: Any) -> Any:
        asked.append(len(group))
        return real(model, processor, group, *rest)

    monkeypatch.setattr(answers, "answer_group", counted)
    scan(**options(llama, run))
    assert len(asked) == 2 and table(run) == table(whole)
    assert [p.read_bytes() for p in sorted((run / "answers").iterdir())] == [
        p.read_bytes() for p in sorted((whole / "answers").iterdir())
    ]


# The disk -----------------------------------------------------------------------------------------------


STEPS = ("open", "write", "fsync", "replace")
KEPT = ("units/", "answers/", "samples.json")  # what is never written again
Write = tuple[str, int]
"""A file of the run, and the number of its write in one go, from 0: some are written several times."""
Work = Callable[[Path], object]
"""What leaves a run in a folder."""


class FullDisk:
    """A disk on which the first write that is not among `passed` fails, in one of its `STEPS`.

    All that goes through `qprobe.system.files` is a write. failed: the one that did.
    """

    def __init__(self, run: Path, passed: set[Write], step: str, patch: pytest.MonkeyPatch) -> None:
        self.run, self.passed, self.step = run, passed, step
        self.count: Counter[str] = Counter()
        self.failed: Write | None = None
        self.begun, replace, link, fsync = atomic._begun, os.replace, os.link, os.fsync
        patch.setattr(atomic, "_begun", self.begin)
        patch.setattr("os.replace", lambda *a: (self.refuse("replace"), replace(*a)))
        patch.setattr("os.link", lambda *a: (self.refuse("replace"), link(*a)))
        patch.setattr("os.fsync", lambda *a: (self.refuse("fsync"), fsync(*a)))

    def refuse(self, step: str) -> None:
        if self.failed and step == self.step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def begin(self, path: Path) -> tuple[Path, Any]:
        name = str(path.relative_to(self.run))
        write = name, self.count[name]
        self.count[name] += 1
        if self.failed is None and write not in self.passed:
            self.failed = write
        self.refuse("open")
        temporary, file = self.begun(path)
        return temporary, Refusing(file, self) if self.failed else file


class Refusing:
    """An open file that cannot be written to."""

    def __init__(self, file: Any, disk: FullDisk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes) -> int:
        self.disk.refuse("write")
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Refusing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def fill(work: Work, run: Path, passed: set[Write], step: str) -> tuple[Write | None, str]:
    """(the write that failed, what was said) of work in the folder `run`; (None, "") where it got through."""
    before = contents(run)
    with pytest.MonkeyPatch.context() as patch:
        disk, said = FullDisk(run, passed, step, patch), ""
        try:
            work(run)
        except QprobeError as error:
            said = str(error)
    after = contents(run)
    assert before.keys() <= after.keys() and not [name for name in after if name.endswith(".tmp")]
    assert [name for name in before if name.startswith(KEPT) and after[name] != before[name]] == []
    return disk.failed, said


def fill_again_and_again(work: Work, run: Path, last: str = "") -> set[str]:
    """The files on which the work failed: each write once, until it gets through, or has failed on `last`."""
    failed: set[Write] = set()
    for attempt in range(200):
        write, said = fill(work, run, failed, STEPS[attempt % len(STEPS)])
        if write is not None:
            assert "(No space left on device). Make room" in said and "\n" not in said, write
            assert str(run / write[0]) in said or f"{run / 'report'} cannot" in said, said
            failed.add(write)
        if write is None or write[0] == last:
            return {name for name, _ in failed}
    raise AssertionError("it never ends")


def scanning(llama: Path, **changes: Any) -> Work:
    return lambda run: scan(**options(llama, run, **{"samples": 3, "batch_size": 3, **changes}))


def weighing(llama: Path) -> Work:
    return lambda run: scan(str(llama), device="cpu", measures=("weight",), out=run)


@pytest.mark.parametrize("kind", ["scan", "weights", "join"])
def test_a_disk_that_is_full_at_any_write_is_one_sentence_and_loses_nothing(
    kind: str, llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pictures = {"spikes.png": b"png", "spikes.svg": b"svg"}  # which take long to draw
    monkeypatch.setattr("qprobe.report.write._pictures", lambda *_: pictures)
    monkeypatch.setattr("qprobe.scanning.finish.write_report", write_report)
    work: Work = {
        "scan": scanning(llama, ablate="1"),
        "weights": weighing(llama),
        "join": lambda run: join([whole], run),
    }[kind]
    failed = fill_again_and_again(work, tmp_path / "run")
    work(tmp_path / "undisturbed")
    run, undisturbed = contents(tmp_path / "run"), contents(tmp_path / "undisturbed")
    assert failed == run.keys() == undisturbed.keys()
    differ = {name for name in run if run[name] != undisturbed[name]}
    assert differ <= {
        "notes/end.json",
        "files.json",
        "skiplist.json",
        "report/index.html",
    }  # which name times


@pytest.mark.usefixtures("quick_rounding")
def test_a_disk_that_is_full_while_weights_are_calibrated_loses_nothing(llama: Path, tmp_path: Path):
    work = scanning(llama, format="nf4-calibrated")
    failed = fill_again_and_again(work, tmp_path / "run", last="nf4-calibrated.safetensors")
    assert {"units/calibration-00000.parquet", "units/calibration-00000.safetensors"} < failed
    for name in ("run", "undisturbed"):
        work(tmp_path / name)
    assert units(tmp_path / "run") == units(tmp_path / "undisturbed")
    assert (
        RunFolder(tmp_path / "run").scan.codes == RunFolder(tmp_path / "undisturbed").scan.codes is not None
    )


# Another scan's folder ----------------------------------------------------------------------------------


def test_a_folder_of_another_version_is_refused_with_both_versions(llama: Path, whole: Path, tmp_path: Path):
    run = Path(copytree(whole, tmp_path / "run"))
    key = RunFolder(run).key
    versions = {**(key.spec.versions or {}), "torch": "1.0.0"}
    (run / "scan.json").write_bytes(key_bytes(replace(key, spec=replace(key.spec, versions=versions))))
    before = units(run)
    with pytest.raises(RunError, match=r"1 place: spec\.versions\.torch: 1\.0\.0 -> .*Pass another --out"):
        scan(**options(llama, run))
    assert units(run) == before


def test_a_library_that_is_not_installed_says_its_version_itself(monkeypatch: pytest.MonkeyPatch):
    from importlib.metadata import PackageNotFoundError

    from qprobe import __version__
    from qprobe.system import versions

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
        scan(**options(llama, run, **changes))
    assert units(run) == units(whole)


def test_another_checkpoint_and_another_processor_are_named_first(llama: Path, whole: Path, tmp_path: Path):
    changed = Path(copytree(llama, tmp_path / "llama"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.embed_tokens.weight"][:9] *= 1.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    template = changed / "chat_template.jinja"
    template.write_text("now: " + template.read_text())
    # Other weights and other inputs give other answers, but the cause comes before what follows from it.
    with pytest.raises(
        RunError, match=r"spec\.processor: .*; spec\.weights: .*; and \d+ more in the samples\. Pass"
    ):
        scan(**options(changed, Path(copytree(whole, tmp_path / "run"))))


@pytest.mark.usefixtures("quick_rounding")
def test_a_process_finishes_what_others_left_of_calibration(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alone = scan(**options(llama, tmp_path / "alone", format="nf4-calibrated"))
    asked = options(llama, tmp_path / "run", format="nf4-calibrated")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    first = scan(**asked)
    assert first.skiplist is None
    monkeypatch.setenv("RANK", "0")
    second = scan(**asked)
    assert second.kl_dynamic == alone.kl_dynamic
    assert RunFolder(second.run).codes == RunFolder(alone.run).codes is not None
