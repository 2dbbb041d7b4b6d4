"""Where a list may be written, and what becomes of the one that stood there."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from qprobe.errors import RunError
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Compared, Manifest
from qprobe.manifest.write import write_manifest
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import write_table
from qprobe.selection.replaced import check_target, select_into, set_aside
from tests.runs.runs import make_run, output

NOISE = {"model.a": 0.031, "model.q": 0.5, "model.k": 0.001}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    outputs = pd.DataFrame([output("s", name, 1.0, noise) for name, noise in NOISE.items()])
    folder = RunFolder(make_run(tmp_path / "run", outputs=[outputs]))
    write_table(folder)
    return folder


def measured(run: RunFolder, path: Path, budget: str = "+7000B") -> Manifest:
    """The list for `budget` in `path`, as if its KL had been measured."""
    made, _ = select_into(path, run, budget)
    quality = replace(made.quality, samples=3, kl_standard_4bit=0.5, kl_dynamic=0.125)
    one = Compared("x", made.budget.total_bytes, 0.125, None, True)
    manifest = replace(made, quality=quality, compared=(one,))
    write_manifest(path, manifest)
    return manifest


def test_a_list_that_select_made_is_replaced_and_the_command_that_makes_it_again_is_named(
    run: RunFolder, tmp_path: Path
):
    for target, out in (
        (run.path / "skiplist.json", ""),
        (tmp_path / "l.json", f" --out {tmp_path / 'l.json'}"),
    ):
        assert select_into(target, run, "+7000B")[1] is None
        manifest, replaced = select_into(target, run, "+20000B", by="activation_nmse")
        assert replaced is not None and replaced.kept_as is None and read_manifest(target) == manifest
        assert replaced.sentence == (
            "Replaces the list of `qprobe select run --budget +7000B`; "
            f"`qprobe select {run.path} --budget +7000B{out}` makes it again."
        )
        _, replaced = select_into(target, run, "+7000B")
        assert replaced is not None and replaced.again is not None
        assert "--budget +20000B --by activation_nmse" in replaced.again
    assert sorted(x.name for x in run.path.glob("*.json") if "skiplist" in x.name) == ["skiplist.json"]


def test_a_measured_list_is_kept_beside_and_never_replaced(run: RunFolder):
    target, copy = run.path / "skiplist.json", run.path / "skiplist-measured.json"
    before = measured(run, target)
    _, replaced = select_into(target, run, "+20000B")
    assert replaced is not None and replaced.kept_as == copy and read_manifest(copy) == before
    assert replaced.sentence == (
        "Replaces the list of `qprobe select run --budget +7000B` (measured KL 0.125), which is kept as "
        f"{copy}."
    )
    with pytest.raises(RunError, match="the list that the scan measured, and select would replace it"):
        select_into(copy, run, "+20000B")
    assert read_manifest(copy) == before


def test_another_list_is_kept_beside(run: RunFolder, tmp_path: Path):
    target = tmp_path / "list.json"
    made, _ = select_into(target, run, "+7000B")
    for command in (
        "qprobe import x.json",
        "qprobe select run --budget +20000B",
        "qprobe select run --top 3",
    ):
        other = replace(made, made_by=replace(made.made_by, command=command))
        write_manifest(target, other)
        replaced = set_aside(run, target)
        assert replaced is not None and replaced.kept_as == tmp_path / "list-before.json"
        assert read_manifest(tmp_path / "list-before.json") == other
    target.write_text("{")
    assert set_aside(run, target) is None


def test_a_target_is_a_new_file_or_a_list_and_nothing_of_the_run(run: RunFolder, tmp_path: Path):
    with pytest.raises(RunError, match="is a folder"):
        check_target(run, tmp_path)
    with pytest.raises(RunError, match="run's own files"):
        check_target(run, run.path / "layers.csv")
    with pytest.raises(RunError, match=r"run's own files"):
        check_target(run, run.path / "new.txt")
    with pytest.raises(RunError, match="something else than a skip-list"):
        check_target(run, run.path / "scan.json")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="something else than a skip-list"):
        select_into(tmp_path / "notes.txt", run, "+7000B")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "skiplist.json").write_text("{")  # by that name a broken one
    for free in (tmp_path / "skiplist.json", tmp_path / "new.txt", run.path / "small.json"):
        check_target(run, free)
    select_into(tmp_path / "notes.json", run, "+7000B")
    check_target(run, tmp_path / "notes.json")


def test_files_json_knows_the_list_of_the_run_and_no_other(run: RunFolder, tmp_path: Path):
    select_into(tmp_path / "list.json", run, "+7000B")
    assert "skiplist.json" not in (run.path / "files.json").read_text()
    select_into(run.path / "skiplist.json", run, "+7000B")
    assert json.loads((run.path / "files.json").read_text())["skiplist.json"]["rows"] == 5
