"""The run folder: whole units or none, one specification a folder, damage named."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pandas as pd
import pytest

from qprobe.errors import RunError
from qprobe.records import FormatSpec
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import Measures, SampleKey
from qprobe.runs.notes import Ended, Ran, Remarks
from qprobe.runs.units import candidate_stage, unit_columns
from tests.runs.runs import MODEL, four_layers, key_of, make_run, output, rows, scan_of, spec_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def kl_unit(*samples: str) -> pd.DataFrame:
    return rows("kl", *((sample, "standard", 3, 0.5, 2) for sample in samples))


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fsync)


def test_the_key_survives_its_file_and_notes_survive_theirs(run: Path):
    assert RunFolder(run).key == key_of(four_layers())
    notes, ended = RunFolder(run).notes, Ended({"load": 1.5}, 7, ("late",), "good")
    notes.put("end", ended)
    notes.put("layers", Ran(("model.b",), ()))
    notes.add("start", ("é",))
    found = RunFolder(run)
    assert found.scan == scan_of(
        four_layers(),
        status="finished",
        unmeasured=("model.b",),
        notes=("é", "late"),
        seconds={"load": 1.5},
        peak_bytes=7,
    )
    assert found.notes.get("end") == ended and found.codes is None


def test_sentences_are_noted_once_in_the_order_of_topics(run: Path):
    notes = RunFolder(run).notes
    notes.put("end", Ended({}, None, ("last", "twice"), ""))
    notes.add("start", ("first", "twice"))
    notes.add("start", ("first", "second"))
    assert RunFolder(run).notes.sentences == ("first", "twice", "second", "last")


@pytest.mark.parametrize("text", ["", "{", '{"notes": "one"}', '{"notes": [], "more": 1}', "[]"])
def test_damaged_notes_are_named(run: Path, text: str):
    (run / "notes" / "start.json").write_text(text)
    with pytest.raises(RunError, match=r"start\.json is damaged"):
        _ = RunFolder(run).notes.sentences


def test_unit_survives_its_file_with_nulls(run: Path):
    frame = pd.DataFrame([output("a", "model.a", 2.0, 0.1), output("b", "model.a", 1 / 3, 1e-300)])
    RunFolder(run).write_unit("outputs", 0, frame)
    back = RunFolder(run).units("outputs")
    assert list(back.columns) == unit_columns("outputs")
    assert back["activation_signal"].tolist() == [2.0, 1 / 3]
    assert back["activation_noise"].tolist() == [0.1, 1e-300]
    assert back["tokens"].tolist() == [2, 2] and back["peak_kind"].tolist() == ["text", "text"]
    assert back["propagated_n"].isna().all() and back["propagated_signal"].isna().all()


def test_units_come_back_in_the_order_of_their_numbers_not_of_their_names(run: Path):
    for unit, sample in ((100_000, "c"), (99_999, "b"), (0, "a")):
        RunFolder(run).write_unit("kl", unit, kl_unit(sample))
    assert RunFolder(run).units("kl")["sample"].tolist() == ["a", "b", "c"]


def test_missing_units_are_those_without_a_file(run: Path):
    assert RunFolder(run).missing_units("kl", 3) == [0, 1, 2]
    RunFolder(run).write_unit("kl", 1, kl_unit("a"))
    assert RunFolder(run).missing_units("kl", 3) == [0, 2]
    assert RunFolder(run).missing_units("outputs", 1) == [0]


def test_a_unit_that_is_set_aside_is_missing_and_its_bytes_are_kept(run: Path):
    folder = RunFolder(run)
    folder.write_unit("kl", 1, kl_unit("a"))
    (name,) = folder.unit_files()
    data = (run / "units" / name).read_bytes()
    folder.set_aside(name, "damaged")
    folder.set_aside("gone", "damaged too")  # by another process
    assert name not in RunFolder(run).unit_files() and not (run / "units" / "damaged too").exists()
    assert (run / "units" / "damaged").read_bytes() == data


def test_a_stage_without_units_is_an_empty_frame_with_its_columns(run: Path):
    assert list(RunFolder(run).units("sensitivity").columns) == ["sample", "layer", "answer_tokens", "kl_sum"]
    assert RunFolder(run).units("sensitivity").empty


def test_a_unit_without_rows_is_finished(run: Path):
    RunFolder(run).write_unit("outputs", 0, pd.DataFrame())
    assert RunFolder(run).missing_units("outputs", 1) == [] and RunFolder(run).units("outputs").empty


def test_equal_frames_give_equal_bytes(run: Path):
    first, second = (run / "units" / f"kl-0000{i}.parquet" for i in (0, 1))
    RunFolder(run).write_unit("kl", 0, kl_unit("a", "b"))
    RunFolder(run).write_unit(
        "kl", 1, kl_unit("a", "b")[["kl_sum", "sample", "top1_agree", "candidate", "answer_tokens"]]
    )
    assert first.read_bytes() == second.read_bytes()


def test_wrong_columns_are_a_bug(run: Path):
    with pytest.raises(AssertionError, match="kl_sum"):
        RunFolder(run).write_unit("kl", 0, kl_unit("a").drop(columns="kl_sum"))


def test_lists_are_kept_apart_by_their_layers_not_their_names(run: Path):
    assert candidate_stage(frozenset({"a", "b"})) == candidate_stage(frozenset({"b", "a"}))
    stage, other = candidate_stage(frozenset({"a", "b"})), candidate_stage(frozenset({"ab"}))
    RunFolder(run).write_unit(stage, 0, kl_unit("a"))
    assert (
        len(RunFolder(run).units(stage)) == 1
        and RunFolder(run).units(other).empty
        and RunFolder(run).units("kl").empty
    )


def test_a_killed_writer_leaves_no_unit_and_hinders_nobody(run: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    RunFolder(run).write_unit("kl", 0, kl_unit("a"))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            RunFolder(run).write_unit("kl", 0, kl_unit("b"))
    assert RunFolder(run).units("kl")["sample"].tolist() == ["a"]
    assert [p.name for p in (run / "units").iterdir()] == ["kl-00000.parquet"]


def test_leftovers_are_ignored_and_those_of_the_dead_removed_on_resuming(run: Path):
    dead = run / "units" / ".kl-00001.parquet.0123456789ab.tmp"
    dead.write_bytes(b"PAR1 half a")
    assert RunFolder(run).missing_units("kl", 2) == [0, 1] and RunFolder(run).units("kl").empty
    RunFolder(run).open(key_of(four_layers()))
    assert not dead.exists()
    RunFolder(run).write_unit("kl", 1, kl_unit("a"))
    assert RunFolder(run).units("kl")["sample"].tolist() == ["a"]


def test_a_full_disk_is_explained_and_leaves_what_was_there(run: Path, monkeypatch: pytest.MonkeyPatch):
    before = (run / "scan.json").read_bytes()
    full_disk(monkeypatch)
    with pytest.raises(
        RunError, match=r"kl-00000.parquet cannot be written \(No space left on device\). Make room"
    ):
        RunFolder(run).write_unit("kl", 0, kl_unit("a"))
    with pytest.raises(RunError, match="No space left"):
        RunFolder(run).notes.put("start", Remarks(("new",)))
    assert (run / "scan.json").read_bytes() == before
    assert RunFolder(run).missing_units("kl", 1) == [0] and not list(run.rglob("*.tmp"))


def test_the_same_scan_resumes_and_keeps_its_file(run: Path):
    before = (run / "scan.json").read_bytes()
    RunFolder(run).notes.put("end", Ended({}, None, ("kept",), ""))
    versions = dict(reversed((spec_of().versions or {}).items()))
    RunFolder(run).open(key_of(four_layers(), spec=spec_of(versions=versions)))
    assert (run / "scan.json").read_bytes() == before and RunFolder(run).scan.notes == ("kept",)


def test_another_scan_is_refused_with_every_difference(run: Path):
    batch = (SampleKey("a", "a1", True), SampleKey("b", "b2", True))
    spec = spec_of(seed=1, measures=Measures(False, False, nodes=3), calibration=(batch,))
    with pytest.raises(RunError) as caught:
        RunFolder(run).open(key_of(four_layers(), spec=spec, format=FormatSpec(double_quant=False)))
    message = str(caught.value)
    for difference in (
        "differs in 4 places",
        "format.double_quant: true -> false",
        "spec.measures.nodes: 2 -> 3",
        "and 1 more in the samples",
        "spec.seed: 0 -> 1",
        "Pass another --out",
    ):
        assert difference in message
    assert "[0][0]" not in message


def test_samples_alone_are_named_where_nothing_else_differs(run: Path):
    batch = (SampleKey("a", "a1", True), SampleKey("b", "b2", True))
    with pytest.raises(RunError, match=r"1 place: spec\.calibration\[0\]\[1\]\.digest: b1 -> b2"):
        RunFolder(run).open(key_of(four_layers(), spec=spec_of(calibration=(batch,))))


def test_lists_of_other_lengths_and_other_models_are_told_by_what_differs(run: Path):
    with pytest.raises(RunError, match=r"spec\.calibration: 1 entries -> 0 entries"):
        RunFolder(run).open(key_of(four_layers(), spec=spec_of(calibration=())))
    other = replace(MODEL, fingerprint="0" * 64)
    with pytest.raises(RunError, match=r"model\.fingerprint: f{12}\.\.\. -> 0{12}\.\.\."):
        RunFolder(run).open(key_of(four_layers(), model=other))


def test_a_value_and_none_are_different(run: Path):
    with pytest.raises(RunError, match=r"spec\.seed: 0 -> null"):
        RunFolder(run).open(key_of(four_layers(), spec=spec_of(seed=None)))


def test_units_of_an_unknown_scan_are_not_adopted(run: Path):
    RunFolder(run).write_unit("kl", 0, kl_unit("a"))
    (run / "scan.json").unlink()
    with pytest.raises(RunError, match=r"finished units but no scan\.json"):
        RunFolder(run).open(key_of(four_layers()))


@pytest.mark.parametrize("name", ["layers.csv", "samples.json", "skiplist.json"])
def test_files_that_no_scan_wrote_are_not_replaced(tmp_path: Path, name: str):
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=f"is no run folder: .* would replace {name} there. Pass another"):
        RunFolder(tmp_path).open(key_of(four_layers()))
    assert (tmp_path / name).read_text() == "mine" and len([*tmp_path.iterdir()]) == 1
    (tmp_path / name).rename(tmp_path / "photo.png")
    RunFolder(tmp_path).open(key_of(four_layers()))  # other files are in nobody's way


def test_of_two_scans_that_open_a_folder_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    together, real = Barrier(2, timeout=300), os.fsync

    def fsync(file: int) -> None:
        together.wait()  # both have seen an empty folder by now, and neither has put its file in place
        real(file)

    def refusal(seed: int) -> str:
        try:
            RunFolder(tmp_path / "run").open(key_of(four_layers(), spec=spec_of(seed=seed)))
        except RunError as error:
            return str(error)
        return ""

    monkeypatch.setattr("os.fsync", fsync)
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(refusal, (0, 1)))
    winner = RunFolder(tmp_path / "run").key.spec.seed
    assert said[winner] == ""
    assert f"differs in 1 place: spec.seed: {winner} -> {1 - winner}. Pass another --out" in said[1 - winner]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"units", "notes", "scan.json"}


def test_a_file_where_the_folder_should_be_is_explained(tmp_path: Path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunError, match="cannot be written"):
        RunFolder(tmp_path / "run").open(key_of(four_layers()))
    with pytest.raises(RunError, match="is no run folder"):
        _ = RunFolder(tmp_path / "run").key


def test_a_folder_without_a_scan_is_explained(tmp_path: Path):
    with pytest.raises(RunError, match=r"is no run folder: it has no scan\.json"):
        _ = RunFolder(tmp_path).key


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"seed": 0', '"seed": NaN', "NaN is no JSON number"),
        ('"bytes_4bit": 2116', '"bytes_4bit": "2116"', r"scan\.inventory\.layers\[0\]\.bytes_4bit is 2116"),
        ('"bytes_4bit": 2116', '"bytes_4bit": true', r"bytes_4bit is true"),
        ('"nodes": 2', '"nodes": "2"', r"scan\.spec\.measures\.nodes is 2"),
        ('"other_bytes": 1000', '"another": 1000', r"scan\.inventory lacks other_bytes"),
        ('"other_bytes": 1000', '"other_bytes": 1000, "another": 1', "has the unknown another"),
        ('"ends": true', '"ends": 1', r"scan\.spec\.calibration\[0\]\[0\]\.ends is 1"),
        ('"double_quant": true', '"double_quant": 1', r"scan\.format\.double_quant is 1"),
    ],
)
def test_a_damaged_scan_is_named_to_the_key(run: Path, old: str, new: str, said: str):
    path = run / "scan.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(RunError, match=f"scan.json is damaged .*{said}.*scan again"):
        _ = RunFolder(run).key


@pytest.mark.parametrize("keep", [0, 1, 40, -2])
def test_a_truncated_scan_is_explained(run: Path, keep: int):
    path = run / "scan.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match="damaged"):
        _ = RunFolder(run).key


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all", None])
def test_a_damaged_unit_is_named_with_what_to_do(run: Path, data: bytes | None):
    RunFolder(run).write_unit("kl", 3, kl_unit("a"))
    path = run / "units" / "kl-00003.parquet"
    path.write_bytes(path.read_bytes()[:-20] if data is None else data)
    with pytest.raises(RunError, match=r"kl-00003\.parquet is damaged .*Scan again into the same folder"):
        RunFolder(run).units("kl")


def test_a_unit_of_another_schema_is_refused(run: Path):
    frame = kl_unit("a").assign(extra=1)
    frame.to_parquet(run / "units" / "kl-00000.parquet")
    with pytest.raises(RunError, match=r"other columns than this qprobe writes .*extra"):
        RunFolder(run).units("kl")


def test_a_row_in_two_units_would_count_twice(run: Path):
    RunFolder(run).write_unit("kl", 0, kl_unit("a", "b"))
    RunFolder(run).write_unit("kl", 1, kl_unit("b"))
    with pytest.raises(RunError, match=r"kl of sample b, candidate standard in two units"):
        RunFolder(run).units("kl")


def test_the_version_of_the_format_is_written_and_another_is_refused(run: Path):
    path = run / "scan.json"
    assert json.loads(path.read_text())["version"] == 1  # a change of it makes all run folders unreadable
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(RunError, match="its format is version 2, not 1"):
        _ = RunFolder(run).key
