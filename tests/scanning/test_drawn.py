"""A scan whose codes are fitted to texts that the model draws itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qprobe.errors import ModelError, QprobeError
from qprobe.inputs import drawing
from qprobe.inputs.drawing import Texts
from qprobe.loading.reference import load_reference
from qprobe.manifest.read import read_manifest
from qprobe.measure.subject import Subject, limited_subject, subject_of
from qprobe.records import FormatSpec
from qprobe.runs.folder import RunFolder
from qprobe.scanning import drawn
from qprobe.scanning.drawn import drawn_texts
from qprobe.scanning.process import Process
from qprobe.system.processes import Shard
from tests.scanning.asked import TinyFolder, options, scan


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "TOKENS", 6)
    monkeypatch.setattr(drawn, "AT_ONCE", 3)


def process_in(folder: Path, shard: Shard = Shard()) -> Process:  # noqa: B008  # frozen
    return Process(RunFolder(folder), shard, lambda *_: None)


def subject_for(folder: Path) -> Subject:
    return subject_of(load_reference(str(folder), "cpu"), FormatSpec())


def test_what_is_there_is_not_drawn_again_and_what_is_damaged_is(
    tiny_folder: TinyFolder, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
):
    subject = subject_for(tiny_folder("llama"))
    texts = drawn_texts(subject, 7, 0, process_in(tmp_path))
    files = sorted((tmp_path / "drawn").iterdir())
    assert [len(json.loads(x.read_text())) for x in files] == [3, 3, 1] and len(set(texts)) == 7
    files[0].write_text("[[1,2],[3")
    files[2].write_text(json.dumps([[10**6] * 6]))  # no token of the model
    seeds: list[int] = []
    real = drawing.draw_texts

    def noting(*given: Any) -> Texts:
        seeds.append(given[3])
        return real(*given)

    monkeypatch.setattr(drawn, "draw_texts", noting)
    assert drawn_texts(subject, 7, 0, process_in(tmp_path)) == texts and len(seeds) == 2
    assert drawn_texts(subject, 7, 1, process_in(tmp_path / "other")) != texts


def test_processes_that_share_a_folder_draw_each_part_once(
    tiny_folder: TinyFolder, tmp_path: Path, short: None
):
    # The second begins with another part, as if the first had been killed behind its first one.
    subject = subject_for(tiny_folder("llama"))
    alone = drawn_texts(subject, 7, 0, process_in(tmp_path / "alone"))
    second = process_in(tmp_path / "shared", Shard(1, 2))
    (tmp_path / "shared" / "drawn").mkdir(parents=True)
    first_part = tmp_path / "alone" / "drawn" / "00000.json"
    (tmp_path / "shared" / "drawn" / "00000.json").write_bytes(first_part.read_bytes())
    assert drawn_texts(subject, 7, 0, second) == alone


@pytest.mark.slow
def test_texts_are_the_same_where_weights_wait_on_the_host(
    tiny_folder: TinyFolder, tmp_path: Path, short: None
):
    folder = tiny_folder("llama")
    wanted = drawn_texts(subject_for(folder), 3, 0, process_in(tmp_path / "all"))
    subject = limited_subject(load_reference(str(folder), "cpu", on_host=True), FormatSpec(), 2**40, tmp_path)
    with subject.streaming():
        assert drawn_texts(subject, 3, 0, process_in(tmp_path / "limited")) == wanted


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_a_scan_resumes_with_its_texts_and_refuses_another_number_of_them(
    tiny_folder: TinyFolder, tmp_path: Path, short: None
):
    asked = options(tiny_folder("llama"), tmp_path / "run", format="nf4-calibrated")
    asked |= {"measures": ("activation",)}
    first = scan(**asked, drawn_texts=5)
    run = RunFolder(first.run)
    assert run.key.spec.rounding is not None and run.key.spec.rounding.drawn_texts == 5
    assert any("Codes were fitted to 5 texts that the model drew itself as well." in n for n in first.notes)
    assert "--drawn-texts 5" in read_manifest(run.path / "skiplist.json").made_by.command
    for part in (run.path / "drawn").iterdir():
        part.unlink()  # a finished run needs them no more
    scan(**asked, drawn_texts=5)
    assert not list((run.path / "drawn").iterdir())
    with pytest.raises(QprobeError, match=r"rounding\.drawn_texts: 5 -> 0"):
        scan(**asked)


def test_texts_are_refused_where_they_fit_nothing(tiny_folder: TinyFolder, tmp_path: Path):
    with pytest.raises(QprobeError, match="--drawn-texts is of texts that nf4-calibrated fits codes to"):
        scan(**options(tiny_folder("llama"), tmp_path / "run"), drawn_texts=5)
    with pytest.raises(QprobeError, match="--drawn-texts -5 "):
        scan(**options(tiny_folder("llama"), tmp_path / "run", format="nf4-calibrated"), drawn_texts=-5)
    encoder = options(tiny_folder("bert"), tmp_path / "run", format="nf4-calibrated")
    with pytest.raises(ModelError, match="BertModel does not write texts"):
        scan(**encoder, drawn_texts=5)
