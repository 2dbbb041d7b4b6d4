"""The run folder: whole units or none, one specification a folder, damage named."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe.errors import RunError
from qprobe.records import FormatSpec
from qprobe.runs.store import (
    UNIT_SCHEMAS,
    choice_stage,
    missing_units,
    open_run,
    read_scan,
    read_units,
    spec_key,
    update_scan,
    write_unit,
)
from tests.runs.runs import MODEL, four_layers, make_run, output, rows, scan_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def kl_unit(*samples: str) -> pd.DataFrame:
    return rows("kl", *((sample, "standard", 3, 0.5, 2) for sample in samples))


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fsync)


def test_scan_survives_its_file(run: Path):
    scan = scan_of(
        four_layers(),
        status="finished",
        unmeasured=("model.b",),
        notes=("é",),
        seconds={"load": 1.5},
        peak_bytes=7,
    )
    update_scan(run, scan)
    assert read_scan(run) == scan


def test_unit_survives_its_file_with_nulls(run: Path):
    frame = pd.DataFrame([output("a", "model.a", 2.0, 0.1), output("b", "model.a", 1 / 3, 1e-300)])
    write_unit(run, "outputs", 0, frame)
    back = read_units(run, "outputs")
    assert list(back.columns) == list(UNIT_SCHEMAS["outputs"])
    assert back["activation_signal"].tolist() == [2.0, 1 / 3]
    assert back["activation_noise"].tolist() == [0.1, 1e-300]
    assert back["tokens"].tolist() == [2, 2] and back["peak_kind"].tolist() == ["text", "text"]
    assert back["propagated_n"].isna().all() and back["propagated_signal"].isna().all()


def test_units_come_back_in_the_order_of_their_numbers_not_of_their_names(run: Path):
    for unit, sample in ((100_000, "c"), (99_999, "b"), (0, "a")):
        write_unit(run, "kl", unit, kl_unit(sample))
    assert read_units(run, "kl")["sample"].tolist() == ["a", "b", "c"]


def test_missing_units_are_those_without_a_file(run: Path):
    assert missing_units(run, "kl", 3) == [0, 1, 2]
    write_unit(run, "kl", 1, kl_unit("a"))
    assert missing_units(run, "kl", 3) == [0, 2]
    assert missing_units(run, "outputs", 1) == [0]


def test_a_stage_without_units_is_an_empty_frame_with_its_columns(run: Path):
    assert list(read_units(run, "sensitivity").columns) == ["sample", "layer", "answer_tokens", "kl_sum"]
    assert read_units(run, "sensitivity").empty


def test_a_unit_without_rows_is_finished(run: Path):
    write_unit(run, "outputs", 0, pd.DataFrame())
    assert missing_units(run, "outputs", 1) == [] and read_units(run, "outputs").empty


def test_equal_frames_give_equal_bytes(run: Path):
    first, second = (run / "units" / f"kl-0000{i}.parquet" for i in (0, 1))
    write_unit(run, "kl", 0, kl_unit("a", "b"))
    write_unit(run, "kl", 1, kl_unit("a", "b")[["kl_sum", "sample", "top1_agree", "choice", "answer_tokens"]])
    assert first.read_bytes() == second.read_bytes()


def test_wrong_columns_are_a_bug(run: Path):
    with pytest.raises(AssertionError, match="kl_sum"):
        write_unit(run, "kl", 0, kl_unit("a").drop(columns="kl_sum"))


def test_lists_are_kept_apart_by_their_layers_not_their_names(run: Path):
    assert choice_stage(frozenset({"a", "b"})) == choice_stage(frozenset({"b", "a"}))
    stage, other = choice_stage(frozenset({"a", "b"})), choice_stage(frozenset({"ab"}))
    write_unit(run, stage, 0, kl_unit("a"))
    assert len(read_units(run, stage)) == 1 and read_units(run, other).empty and read_units(run, "kl").empty


def test_a_killed_writer_leaves_no_unit_and_hinders_nobody(run: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    write_unit(run, "kl", 0, kl_unit("a"))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_unit(run, "kl", 0, kl_unit("b"))
    assert read_units(run, "kl")["sample"].tolist() == ["a"]
    assert [p.name for p in (run / "units").iterdir()] == ["kl-00000.parquet"]


def test_leftovers_are_ignored_and_those_of_the_dead_removed_on_resuming(run: Path):
    dead = run / "units" / ".kl-00001.parquet.0123456789ab.tmp"
    dead.write_bytes(b"PAR1 half a")
    assert missing_units(run, "kl", 2) == [0, 1] and read_units(run, "kl").empty
    open_run(run, scan_of(four_layers()))
    assert not dead.exists()
    write_unit(run, "kl", 1, kl_unit("a"))
    assert read_units(run, "kl")["sample"].tolist() == ["a"]


def test_a_full_disk_is_explained_and_leaves_what_was_there(run: Path, monkeypatch: pytest.MonkeyPatch):
    before = (run / "scan.json").read_bytes()
    full_disk(monkeypatch)
    with pytest.raises(
        RunError, match=r"kl-00000.parquet cannot be written \(No space left on device\). Make room"
    ):
        write_unit(run, "kl", 0, kl_unit("a"))
    with pytest.raises(RunError, match="No space left"):
        update_scan(run, scan_of(four_layers(), notes=("new",)))
    assert (run / "scan.json").read_bytes() == before
    assert missing_units(run, "kl", 1) == [0] and not list(run.rglob("*.tmp"))


def test_the_same_scan_resumes_and_keeps_its_file(run: Path):
    done = replace(read_scan(run), status="finished", notes=("kept",))
    update_scan(run, done)
    reordered = dict(reversed(scan_of(four_layers()).spec.items()))
    open_run(run, scan_of(four_layers(), spec=reordered, notes=("lost",)))
    assert read_scan(run) == done


def test_another_scan_is_refused_with_every_difference(run: Path):
    spec = {"seed": 1, "samples": [{"id": "a", "digest": "a1"}, {"id": "b", "digest": "b2"}], "nodes": 2}
    with pytest.raises(RunError) as caught:
        open_run(run, scan_of(four_layers(), spec=spec, format=FormatSpec(double_quant=False)))
    message = str(caught.value)
    for difference in (
        "differs in 4 places",
        "format.double_quant: true -> false",
        "spec.nodes: (absent) -> 2",
        "spec.samples[1].digest: b1 -> b2",
        "spec.seed: 0 -> 1",
        "Pass another --out",
    ):
        assert difference in message
    assert "samples[0]" not in message


def test_lists_of_other_lengths_and_other_models_are_told_by_what_differs(run: Path):
    with pytest.raises(RunError, match=r"spec\.samples: 2 entries -> 0 entries"):
        open_run(run, scan_of(four_layers(), spec={"seed": 0, "samples": []}))
    other = replace(MODEL, fingerprint="0" * 64)
    with pytest.raises(RunError, match=r"model\.fingerprint: f{12}\.\.\. -> 0{12}\.\.\."):
        open_run(run, scan_of(four_layers(), model=other))


def test_true_and_one_are_different(run: Path):
    update_scan(run, scan_of(four_layers(), spec={"x": 1}))
    with pytest.raises(RunError, match=r"spec\.x: 1 -> true"):
        open_run(run, scan_of(four_layers(), spec={"x": True}))


def test_units_of_an_unknown_scan_are_not_adopted(run: Path):
    write_unit(run, "kl", 0, kl_unit("a"))
    (run / "scan.json").unlink()
    with pytest.raises(RunError, match=r"finished units but no scan\.json"):
        open_run(run, scan_of(four_layers()))


def test_of_two_scans_that_open_a_folder_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    together, real = Barrier(2, timeout=10), os.fsync

    def fsync(file: int) -> None:
        together.wait()  # both have seen an empty folder by now, and neither has put its file in place
        real(file)

    def refusal(seed: int) -> str:
        try:
            open_run(tmp_path / "run", scan_of(four_layers(), spec={"seed": seed}))
        except RunError as error:
            return str(error)
        return ""

    monkeypatch.setattr("os.fsync", fsync)
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(refusal, (0, 1)))
    winner = read_scan(tmp_path / "run").spec["seed"]
    assert said[winner] == ""
    assert f"differs in 1 place: spec.seed: {winner} -> {1 - winner}. Pass another --out" in said[1 - winner]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"units", "scan.json"}


def test_a_file_where_the_folder_should_be_is_explained(tmp_path: Path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunError, match="cannot be written"):
        open_run(tmp_path / "run", scan_of(four_layers()))
    with pytest.raises(RunError, match="is no run folder"):
        read_scan(tmp_path / "run")


def test_a_folder_without_a_scan_is_explained(tmp_path: Path):
    with pytest.raises(RunError, match=r"is no run folder: it has no scan\.json"):
        read_scan(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"seed": 0', '"seed": NaN', "NaN is no JSON number"),
        ('"bytes_4bit": 2116', '"bytes_4bit": "2116"', r"scan\.inventory\.layers\[0\]\.bytes_4bit is 2116"),
        ('"bytes_4bit": 2116', '"bytes_4bit": true', r"bytes_4bit is true"),
        ('"status": "running"', '"status": "lost"', r"scan\.status is lost"),
        ('"other_bytes": 1000', '"another": 1000', "lacks or has too much of: another, other_bytes"),
        ('"unmeasured": []', '"unmeasured": {}', r"scan\.unmeasured is \{\}"),
        ('"peak_bytes": null', '"peak_bytes": 1.5', r"scan\.peak_bytes is 1\.5"),
    ],
)
def test_a_damaged_scan_is_named_to_the_key(run: Path, old: str, new: str, said: str):
    path = run / "scan.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(RunError, match=f"scan.json is damaged .*{said}.*scan again"):
        read_scan(run)


@pytest.mark.parametrize("keep", [0, 1, 40, -2])
def test_a_truncated_scan_is_explained(run: Path, keep: int):
    path = run / "scan.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match="damaged"):
        read_scan(run)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all", None])
def test_a_damaged_unit_is_named_with_what_to_do(run: Path, data: bytes | None):
    write_unit(run, "kl", 3, kl_unit("a"))
    path = run / "units" / "kl-00003.parquet"
    path.write_bytes(path.read_bytes()[:-20] if data is None else data)
    with pytest.raises(RunError, match=r"kl-00003\.parquet is damaged .*Scan again into the same folder"):
        read_units(run, "kl")


def test_a_unit_of_another_schema_is_refused(run: Path):
    frame = kl_unit("a").assign(extra=1)
    frame.to_parquet(run / "units" / "kl-00000.parquet")
    with pytest.raises(RunError, match=r"other columns than this qprobe writes .*extra"):
        read_units(run, "kl")


def test_a_row_in_two_units_would_count_twice(run: Path):
    write_unit(run, "kl", 0, kl_unit("a", "b"))
    write_unit(run, "kl", 1, kl_unit("b"))
    with pytest.raises(RunError, match=r"kl of sample b, choice standard in two units"):
        read_units(run, "kl")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=3), json_values, max_size=4))
def test_spec_key_ignores_the_order_of_keys_and_nothing_else(spec: dict):
    assert spec_key(dict(reversed(spec.items()))) == spec_key(spec)
    assert spec_key({**spec, "one more": 0}) != spec_key(spec)
