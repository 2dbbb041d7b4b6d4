"""Folders, JSONL files and photographs become samples; what cannot be used is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qprobe.data.sampling import Wanted, choose_samples, split_held_out
from qprobe.data.sources import DEFAULT_PROMPT, PHOTOGRAPHS, from_folder, from_jsonl, photographs
from qprobe.errors import SampleError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, colour in (("b.png", "red"), ("a.jpg", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    return tmp_path


def test_a_folder_gives_its_images_in_name_order(pictures: Path) -> None:
    found = from_folder(pictures)
    assert [s.id for s in found.samples] == ["a.jpg", "b.png"]
    assert all(s.prompt == DEFAULT_PROMPT and s.answer is None for s in found.samples)
    assert found.samples[0].images[0] == (pictures / "a.jpg").read_bytes()


def test_a_file_that_is_no_image_is_skipped_and_named(pictures: Path) -> None:
    (pictures / "notes.txt").write_text("no image")
    (pictures / "short.png").write_bytes((pictures / "b.png").read_bytes()[:40])
    found = from_folder(pictures)
    assert len(found.samples) == 2
    assert [note.partition(":")[0] for note in found.skipped] == ["notes.txt", "short.png"]


def test_only_unreadable_files_are_an_error_that_names_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(SampleError, match=r"None of the 1 files .*notes\.txt"):
        from_folder(tmp_path)


@pytest.mark.parametrize(("make", "words"), [(False, "does not exist"), (True, "is empty")])
def test_a_missing_or_empty_folder_is_an_error(tmp_path: Path, make: bool, words: str) -> None:
    folder = tmp_path / "photos"
    if make:
        folder.mkdir()
    with pytest.raises(SampleError, match=words):
        from_folder(folder)


def test_the_limit_counts_usable_images(pictures: Path) -> None:
    (pictures / "0.txt").write_text("no image")
    assert [s.id for s in from_folder(pictures, limit=1).samples] == ["a.jpg"]


def test_jsonl_lines_of_three_forms_are_read_and_bad_ones_named(pictures: Path) -> None:
    lines = [
        {"image": "a.jpg", "prompt": "What colour?", "answer": "Blue."},
        {"image": "b.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]},
        {"messages": [
            {"role": "user", "content": [
                {"type": "image", "image": "b.png"}, {"type": "text", "text": "And?"}]},
            {"role": "assistant", "content": "Red."}]},
        {"prompt": "No image here."},
        {"image": "missing.png", "prompt": "x"},
        {"conversations": [{"from": "gpt", "value": "an answer without a question"}]},
        {"image": ["a.jpg", "b.png"], "prompt": "two"},
    ]  # fmt: skip
    path = pictures / "data.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"image": "a.j', encoding="utf-8")
    found = from_jsonl(path)
    assert [(s.prompt, s.answer, bool(s.images)) for s in found.samples] == [
        ("What colour?", "Blue.", True),
        ("What colour?", "Red.", True),
        ("And?", "Red.", True),
        ("No image here.", None, False),
    ]
    assert [note.partition(":")[0] for note in found.skipped] == [
        f"data.jsonl line {n}" for n in (5, 6, 7, 8)
    ]


def test_a_line_that_is_not_utf8_is_named_and_not_read_with_other_letters(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "Größe?"}\n'.encode() + '{"prompt": "Größe?"}\n'.encode("latin-1"))
    found = from_jsonl(path)
    assert [s.prompt for s in found.samples] == ["Größe?"]
    (note,) = found.skipped
    assert note.startswith("data.jsonl line 2: skipped, it is not UTF-8 (byte 15)")


def ids(path: Path, *lines: object) -> tuple[list[str], tuple[str, ...]]:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    found = from_jsonl(path)
    assert [s.prompt for s in found.samples] == [x["prompt"] for x in lines if "prompt" in x]
    return [s.id for s in found.samples], found.skipped


def test_a_line_without_an_id_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    without = [{"prompt": "a"}, {"prompt": "b", "id": None}, {"prompt": "c", "id": ""}]
    assert ids(path, *without, {"prompt": "d", "id": 0}) == (["data-1", "data-2", "data-3", "0"], ())


def test_lines_of_one_id_are_told_apart_and_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    found, notes = ids(
        path,
        {"prompt": "a", "id": 7},
        {"id": "x"},  # is skipped, so its id is free
        {"prompt": "b", "id": "7"},
        {"prompt": "c", "id": "x"},
        {"prompt": "d", "id": "data-6"},
        {"prompt": "e"},  # would be called so by its number
        {"prompt": "f", "id": "7 (line 8)"},
        {"prompt": "g", "id": 7},  # even the changed name is taken
    )
    assert found == [
        "7", "7 (line 3)", "x", "data-6", "data-6 (line 6)", "7 (line 8)", "7 (line 8) (line 8)"
    ]  # fmt: skip
    assert notes[1:] == (
        "data.jsonl: 3 lines with the id of an earlier one: '7' of line 1 is called '7 (line 3)' in line 3, "
        "'data-6' of line 5 is called 'data-6 (line 6)' in line 6, "
        "'7' of line 1 is called '7 (line 8) (line 8)' in line 8.",
    )


@pytest.mark.parametrize("line", ['{"text": "What?"}', '{"messages": [{"content": "What?"}]}'])
def test_a_file_without_the_keys_names_them(line: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(line)
    with pytest.raises(SampleError) as refused:
        from_jsonl(tmp_path / "data.jsonl")
    said = str(refused.value)
    assert all(f'"{key}"' in said for key in ("prompt", "image", "answer"))
    assert "text alone are fine" in said and ("no key 'role'" in said) == ("messages" in line)


def test_what_is_there_but_no_file_is_not_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="is no regular file"):
        from_jsonl(tmp_path)
    with pytest.raises(SampleError, match="does not exist"):
        from_jsonl(tmp_path / "data.jsonl")


def test_photographs_need_no_download_and_those_to_compare_on_were_not_scanned() -> None:
    assert len(photographs().samples) == len(PHOTOGRAPHS)
    scanned = choose_samples("some/model", True, Wanted(), "scan").samples
    compared = choose_samples("some/model", True, Wanted(), "compare").samples
    assert scanned and compared
    assert not {s.digest for s in scanned} & {s.digest for s in compared}


def test_a_text_model_gets_questions_without_images() -> None:
    found = choose_samples("some/model", False, Wanted(count=5), "scan").samples
    assert len(found) == 5 and all(not s.images for s in found)


def test_images_and_data_together_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="Both"):
        choose_samples("m", True, Wanted(images=tmp_path, data=tmp_path / "x.jsonl"), "scan")


def test_every_third_sample_is_held_out_and_none_is_lost() -> None:
    samples = photographs(limit=8).samples
    calibration, held_out = split_held_out(samples)
    assert len(held_out) == 2
    assert {s.id for s in (*calibration, *held_out)} == {s.id for s in samples}
    assert not set(calibration) & set(held_out)


def test_the_mark_that_some_editors_put_first_is_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_text('{"prompt": "what?", "answer": "a bag"}\n' * 2, encoding="utf-8-sig")
    found = from_jsonl(path)
    assert [s.answer for s in found.samples] == ["a bag"] * 2 and found.skipped == ()
