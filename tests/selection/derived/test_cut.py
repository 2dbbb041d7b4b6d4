"""A file of a run that is cut at any byte is never read as if it were whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qprobe.cli import main
from qprobe.errors import QprobeError, RunError
from qprobe.manifest.read import read_manifest
from qprobe.report.comparison import FILE as COMPARISON
from qprobe.report.comparison import read_comparison
from qprobe.runs.folder import RunFolder
from qprobe.runs.notes import Ended
from qprobe.runs.shown import ShownSample, write_shown
from qprobe.selection.replaced import select_into
from tests.report.full_run import write_comparison
from tests.selection.derived.test_again import whole

__all__ = ["whole"]


@pytest.fixture(scope="module")
def run(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a file of each kind that qprobe writes into one."""
    folder = RunFolder(Path(copytree(whole, tmp_path_factory.mktemp("cut") / "run")))
    folder.files.write({"ranks.csv": (b"layer,rank,rank_low,rank_high\nmodel.a,1,1,2\nmodel.b,2,1,2\n", 2)})
    write_shown(folder, [ShownSample("s", "p", "a", None, None, ("x", None), None)])
    select_into(folder.path / "skiplist.json", folder, "+20%")
    write_comparison(folder.path)
    folder.files.record(COMPARISON, 3)
    folder.notes.put("end", Ended({"load": 1.0}, None, (), "verdict"))
    return folder.path


def reader(name: str) -> Callable[[RunFolder], Any]:
    """What reads the file `name` of a run, whose result is told by its repr."""
    topic = name.removeprefix("notes/").removesuffix(".json")
    others: dict[str, Callable[[RunFolder], Any]] = {
        "scan.json": lambda run: run.key,
        "files.json": lambda run: run.files.lost(["layers.csv"]) or run.files.read("layers.csv"),
        "skiplist.json": lambda run: read_manifest(run.path / "skiplist.json"),
        COMPARISON: read_comparison,
    }
    if name.startswith("notes/"):
        return lambda run: run.notes.get(topic)
    if name.startswith("units/"):
        return lambda run: run.unit(name.removeprefix("units/")).to_pylist()
    return others.get(name, lambda run: run.files.read(name))


def names(run: Path) -> list[str]:
    found = (x for x in run.rglob("*") if x.is_file() and not x.name.startswith(".lock"))
    return sorted(str(x.relative_to(run)) for x in found)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_that_is_cut_at_any_byte_is_refused_in_a_sentence_or_says_the_same(run: Path, data: Any):
    name = data.draw(st.sampled_from(names(run)))
    path, read = run / name, reader(name)
    good = path.read_bytes()
    wanted = repr(read(RunFolder(run)))
    path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    try:
        found = repr(read(RunFolder(run)))
    except QprobeError as error:
        assert "\n" not in str(error) and path.name in str(error)
    else:  # where the list of files is damaged, all of them are made again; a last line end says nothing
        is_known = name == "files.json" and "None" in found
        assert is_known or (found == wanted and path.read_bytes() == good[:-1])
    finally:
        path.write_bytes(good)


def test_each_kind_of_file_is_there(run: Path):
    csv = {"ablation", "frontier", "layers", "left_out", "peaks", "ranks"}
    found = {*names(run)}
    assert {f"{x}.csv" for x in csv} | {"samples.json", COMPARISON, "files.json", "scan.json"} < found
    assert {"notes/end.json", "skiplist.json", "units/outputs-00000.parquet"} < found


def test_a_comparison_that_is_damaged_is_one_sentence_that_says_how_to_make_it_again(run: Path):
    good = (run / COMPARISON).read_bytes()
    (run / COMPARISON).write_bytes(good[:100])
    try:
        done = CliRunner().invoke(main, ["report", str(run)])
        with pytest.raises(RunError):
            read_comparison(RunFolder(run))
    finally:
        (run / COMPARISON).write_bytes(good)
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1
    assert "compare.json is damaged" in done.stderr and "Run `qprobe compare` again" in done.stderr
