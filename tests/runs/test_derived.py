"""RUN/files.json: a derived file that was cut or changed is known, and a scan makes it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from qprobe.errors import RunError
from qprobe.runs.derived import Derived, DerivedFiles, csv_bytes
from qprobe.runs.folder import RunFolder
from qprobe.runs.layers.table import write_table
from tests.runs.runs import make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "run")
    write_table(RunFolder(run))
    return run


def test_each_file_is_listed_with_its_rows_and_hash(run: Path):
    listed = json.loads((run / "files.json").read_text())
    assert list(listed) == ["layers.csv", "peaks.csv"]
    for name, one in listed.items():
        data = (run / name).read_bytes()
        assert one == {"rows": 5, "sha256": hashlib.sha256(data).hexdigest()}


def test_a_table_cut_between_two_lines_is_known(run: Path):
    lines = (run / "layers.csv").read_bytes().splitlines(keepends=True)
    (run / "layers.csv").write_bytes(b"".join(lines[:4]))
    with pytest.raises(RunError, match=r"layers\.csv is damaged \(it is cut: 3 of 5 rows are left\)"):
        _ = RunFolder(run).table


def test_a_number_that_was_changed_is_known(run: Path):
    data = (run / "layers.csv").read_bytes()
    (run / "layers.csv").write_bytes(data.replace(b"8192", b"8193", 1))
    with pytest.raises(RunError, match=r"layers\.csv is damaged \(it is not as it was written\)"):
        _ = RunFolder(run).table


def test_what_was_cut_is_made_again_from_the_units(run: Path):
    whole = (run / "layers.csv").read_bytes()
    (run / "layers.csv").write_bytes(whole[:40])
    found = RunFolder(run)
    assert not found.files.is_whole("layers.csv")
    write_table(found)
    assert (run / "layers.csv").read_bytes() == whole and found.files.is_whole("layers.csv")
    assert len(found.table) == 5


def test_a_file_whose_writer_was_killed_before_it_was_listed_is_not_taken_for_whole(run: Path):
    listed = json.loads((run / "files.json").read_text())
    (run / "files.json").write_text(json.dumps({"layers.csv": listed["layers.csv"]}))
    assert [RunFolder(run).files.is_whole(x) for x in ("layers.csv", "peaks.csv")] == [True, False]


def test_a_writer_that_is_killed_between_two_files_leaves_no_false_alarm(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    found, calls, real = RunFolder(run), [], DerivedFiles._write

    def killed_the_second_time(self: DerivedFiles, known: Mapping[str, Derived]) -> None:
        calls.append(known)
        if len(calls) == 2:  # after the file, before files.json
            raise KeyboardInterrupt
        real(self, known)

    with monkeypatch.context() as patch:
        patch.setattr(DerivedFiles, "_write", killed_the_second_time)
        with pytest.raises(KeyboardInterrupt):
            found.files.write({"peaks.csv": (b"other\n1\n", 1)})
    assert (run / "peaks.csv").read_bytes() == b"other\n1\n"
    assert RunFolder(run).files.read("peaks.csv") == b"other\n1\n"


def test_a_file_that_nothing_is_known_of_is_read_as_it_is(run: Path):
    (run / "files.json").unlink()
    assert len(RunFolder(run).table) == 5


@pytest.mark.parametrize("text", ["", "[]", '{"layers.csv": {"rows": 5}}', "{"])
def test_a_damaged_list_is_named_and_written_again(run: Path, text: str):
    (run / "files.json").write_text(text)
    with pytest.raises(RunError, match=r"files\.json is damaged .*Delete it, or run the scan again"):
        _ = RunFolder(run).table
    write_table(RunFolder(run))
    assert len(RunFolder(run).table) == 5


def test_a_file_that_is_removed_is_forgotten(run: Path):
    RunFolder(run).files.remove("peaks.csv")
    assert list(json.loads((run / "files.json").read_text())) == ["layers.csv"]
    assert RunFolder(run).files.read("peaks.csv") is None
    RunFolder(run).files.remove("peaks.csv")


def test_writing_through_the_object_keeps_its_view_right(run: Path):
    found = RunFolder(run)
    before = found.table
    assert found.table is before  # parsed once
    header, *lines = (run / "layers.csv").read_bytes().splitlines(keepends=True)
    found.files.write({"layers.csv": (b"".join([header, *reversed(lines)]), len(lines))})
    assert found.table["layer"].tolist() == before["layer"].tolist()[::-1]
    assert [x.name for x in found.inventory.layers] == found.table["layer"].tolist()


def test_many_writers_at_once_lose_no_entry(run: Path):
    def write(number: int) -> None:
        RunFolder(run).files.write({f"{number}.csv": (b"a\n1\n", 1)})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    assert {f"{n}.csv" for n in range(24)} <= json.loads((run / "files.json").read_text()).keys()


def test_no_cell_is_a_formula_and_numbers_stay_numbers():
    frame = pd.DataFrame(
        {"sample": ["=HYPERLINK(1)", "+1", "-1", "@a", "\ta", "a=1"], "kl": [-1.5, 0, 1, 2, 3, 4]}
    )
    lines = csv_bytes(frame).decode().split("\n")
    assert lines[1:-1] == [
        "'=HYPERLINK(1),-1.5",
        "'+1,0.0",
        "'-1,1.0",
        "'@a,2.0",
        "'\ta,3.0",
        "a=1,4.0",
    ]


@pytest.mark.parametrize("name", ["=a", "a\x1b[2J", "a\nb", "a\u202eb"])
def test_a_scan_whose_layers_have_such_names_is_refused(run: Path, name: str):
    text = (run / "scan.json").read_text()
    (run / "scan.json").write_text(text.replace('"model.a"', json.dumps(name)))
    with pytest.raises(RunError, match=r"is damaged|cannot tell"):
        _ = RunFolder(run).key
