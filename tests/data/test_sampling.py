"""Which samples a command uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from qprobe.data.builtin import DEFAULT_PROMPT, PHOTOGRAPHS, photographs
from qprobe.data.reading import are_too_many
from qprobe.data.sampling import (
    SCAN_SAMPLES,
    Wanted,
    choose_samples,
    from_data,
    from_folder,
    independent_of,
    split_held_out,
    unanswered_note,
)
from qprobe.errors import LeftOutWarning, SampleError
from qprobe.records import Sample, asked
from tests import tiny


@pytest.mark.parametrize("seed", [-1, 1000, 2000])
@pytest.mark.parametrize("purpose", ["scan", "compare"])
def test_a_seed_that_could_draw_the_other_purpose_s_scenes_is_refused(seed: int, purpose):
    with pytest.raises(SampleError, match=f"--seed {seed} is out of range.* 0 to 999"):
        choose_samples("demo", True, Wanted(count=1, seed=seed), purpose)


@pytest.mark.parametrize("purpose", ["scan", "compare"])
def test_a_prompt_for_scenes_that_bring_their_own_is_refused(purpose):
    with pytest.raises(SampleError, match=r"--prompt does not apply to the built-in scenes"):
        choose_samples("demo", True, Wanted(prompt="What is it?", count=1), purpose)


@pytest.mark.slow
def test_scenes_of_a_scan_are_never_those_of_a_comparison():
    drawn = {
        purpose: {
            s.digest
            for seed in (0, 999)
            for s in choose_samples("demo", True, Wanted(count=8, seed=seed), purpose).samples
        }
        for purpose in ("scan", "compare")
    }
    assert len(drawn["scan"]) == len(drawn["compare"]) == 16 and not drawn["scan"] & drawn["compare"]


def test_seeds_are_of_built_in_scenes_alone():
    first, second = (choose_samples("llama", False, Wanted(seed=seed), "scan") for seed in (0, 5000))
    assert first == second


@pytest.mark.slow
def test_the_demo_is_scanned_on_more_scenes_than_a_user_has_images():
    assert SCAN_SAMPLES == {"demo": 192, "given": 32}
    assert len(choose_samples("demo-outliers", True, Wanted(), "scan").samples) == 192


@pytest.mark.parametrize("count", [0, -3])
def test_no_samples_are_no_request(count: int):
    with pytest.raises(SampleError, match=rf"--samples {count} asks for no sample"):
        choose_samples("llama", False, Wanted(count=count), "scan")


def test_every_third_sample_is_held_out():
    samples = choose_samples("llama", False, Wanted(count=7), "scan").samples
    calibration, held_out = split_held_out(samples)
    assert held_out == samples[2::3] and len(held_out) == 2
    assert [s for s in samples if s not in held_out] == list(calibration)
    assert split_held_out(samples[:2]) == (samples[:2], ())


def test_a_sample_given_twice_is_never_on_both_sides():
    rows = [Sample(f"{i}", asked(f"question {i % 4}")) for i in range(12)]
    calibration, held_out = split_held_out(tuple(rows))
    assert {x.prompt for x in held_out} == {"question 2"}
    assert not {x.digest for x in calibration} & {x.digest for x in held_out}
    assert len(calibration) + len(held_out) == 12


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, colour in (("b.png", "red"), ("a.jpg", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    return tmp_path


def test_a_folder_gives_its_images_in_name_order(pictures: Path) -> None:
    found = from_folder(pictures, Wanted())
    assert [s.id for s in found.samples] == ["a.jpg", "b.png"]
    assert all(s.prompt == DEFAULT_PROMPT and s.answer is None for s in found.samples)
    assert found.samples[0].images == ((pictures / "a.jpg").read_bytes(),)


def test_a_file_that_is_no_image_is_left_out_and_named(pictures: Path) -> None:
    (pictures / "notes.txt").write_text("no image")
    (pictures / "short.png").write_bytes((pictures / "b.png").read_bytes()[:40])
    found = from_folder(pictures, Wanted())
    assert len(found.samples) == 2
    assert [note.partition(":")[0] for note in found.notes] == ["notes.txt", "short.png"]


def test_many_files_that_are_no_images_are_an_error(pictures: Path) -> None:
    for n in range(10):
        (pictures / f"{n}.txt").write_text("no image")
    with pytest.raises(SampleError, match=r"10 of 12 files .* --bad-data skip"):
        from_folder(pictures, Wanted())
    assert len(from_folder(pictures, Wanted(bad_data="skip")).samples) == 2


def test_only_unreadable_files_are_an_error_that_names_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(SampleError, match=r"No file of .* is left to measure.*notes\.txt"):
        from_folder(tmp_path, Wanted())


def test_what_only_looks_like_an_image_is_named_and_a_folder_is_not_entered(tmp_path: Path) -> None:
    pictures = tmp_path / "photos"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(tiny.picture(0))
    os.mkfifo(pictures / "pipe.png")
    (pictures / "gone.png").symlink_to(pictures / "nowhere.png")
    (pictures / "more.png").mkdir()
    found = from_folder(pictures, Wanted())
    assert found.left_out == (
        "gone.png: left out, it does not exist.",
        "pipe.png: left out, it cannot be read (it is a pipe).",
    )
    with pytest.raises(SampleError, match="holds folders, and no image beside them"):
        from_folder(pictures.parent, Wanted())


@pytest.mark.parametrize(("make", "words"), [(False, "does not exist"), (True, "is empty")])
def test_a_missing_or_empty_folder_is_an_error(tmp_path: Path, make: bool, words: str) -> None:
    folder = tmp_path / "photos"
    if make:
        folder.mkdir()
    with pytest.raises(SampleError, match=words):
        from_folder(folder, Wanted())


def test_the_limit_counts_usable_images_and_rows(pictures: Path) -> None:
    (pictures / "0.txt").write_text("no image")
    assert [s.id for s in from_folder(pictures, Wanted(), limit=1).samples] == ["a.jpg"]
    rows = [{"prompt": 5}, *({"prompt": x} for x in "abc")]
    assert [s.prompt for s in from_data(Wanted(data=rows), 2).samples] == ["a", "b"]


def test_an_image_without_a_question_is_asked_the_prompt(pictures: Path) -> None:
    rows = [{"image": str(pictures / "a.jpg")}, {"prompt": "mine?", "image": str(pictures / "a.jpg")}]
    assert [s.prompt for s in from_data(Wanted(data=rows), 9).samples] == [DEFAULT_PROMPT, "mine?"]
    assert [s.prompt for s in from_data(Wanted(data=rows, prompt="Why?"), 9).samples] == ["Why?", "mine?"]


def test_samples_of_one_conversation_are_on_one_side(pictures: Path) -> None:
    rows = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": f"{n} {i}"} for i in range(4)]}
        for n in range(6)
    ]
    samples = from_data(Wanted(data=rows), 99).samples
    calibration, held_out = split_held_out(samples)
    assert len(samples) == 12 and len(held_out) == 4
    assert not {s.turns[0] for s in calibration} & {s.turns[0] for s in held_out}


def spoken(*texts: str) -> dict[str, list[dict[str, str]]]:
    turns = enumerate(texts)
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in turns]}


def test_a_repeated_conversation_and_its_beginning_are_never_on_both_sides() -> None:
    # the fifth row is only the first turn of the first and second; the third has the same question alone
    two = spoken("who?", "me", "why?", "so")
    other = spoken("who?", "you", "how?", "well")
    rows = [two, two, other, spoken("when?", "now"), spoken("who?", "me"), spoken("where?", "here"), two]
    samples = from_data(Wanted(data=rows), 99).samples
    calibration, held_out = split_held_out(samples)
    assert {s.turns[0].text for s in held_out} == {"when?"}
    assert {s.turns[0].text for s in calibration} == {"who?", "where?"}
    assert {s.turns[0].text for s in independent_of(samples, samples[:1])} == {"who?", "when?", "where?"}
    answers = [(*(t.text for t in s.turns), s.answer) for s in independent_of(samples, samples[:1])]
    assert not any(said[:2] == ("who?", "me") for said in answers)


def test_one_question_for_all_rows_still_leaves_some_to_hold_out() -> None:
    samples = from_data(Wanted(data=[spoken("go on", str(n)) for n in range(9)]), 9).samples
    assert [len(part) for part in split_held_out(samples)] == [6, 3]


def test_photographs_need_no_download_and_those_to_compare_on_were_not_scanned() -> None:
    assert len(photographs().samples) == len(PHOTOGRAPHS)
    scanned = choose_samples("some/model", True, Wanted(), "scan").samples
    compared = choose_samples("some/model", True, Wanted(), "compare").samples
    assert scanned and compared
    assert not {s.digest for s in scanned} & {s.digest for s in compared}


def test_a_text_model_gets_questions_without_images() -> None:
    found = choose_samples("some/model", False, Wanted(count=5), "scan").samples
    assert len(found) == 5 and all(not s.images for s in found)


def test_images_for_a_text_model_are_an_error_that_says_what_to_pass(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(SampleError, match=r"does not apply, since some/model reads text only\. Pass --data"):
        choose_samples("some/model", False, Wanted(images=tmp_path), "scan")


def test_rows_of_plain_text_are_told_where_the_text_goes() -> None:
    with pytest.raises(SampleError, match=r'but text.*a plain text goes into "prompt"'):
        choose_samples("m", False, Wanted(data=[{"text": "The cat sat."}]), "scan")


def test_images_and_data_together_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="Both"):
        choose_samples("m", True, Wanted(images=tmp_path, data=tmp_path / "x.jsonl"), "scan")


def test_every_third_photograph_is_held_out_and_none_is_lost() -> None:
    samples = photographs(limit=8).samples
    calibration, held_out = split_held_out(samples)
    assert len(held_out) == 2
    assert {s.id for s in (*calibration, *held_out)} == {s.id for s in samples}
    assert not set(calibration) & set(held_out)


def test_the_mark_that_some_editors_put_first_is_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_text('{"prompt": "what?", "answer": "a bag"}\n' * 2, encoding="utf-8-sig")
    found = from_data(Wanted(data=path), 9)
    assert [s.answer for s in found.samples] == ["a bag"] * 2 and found.notes == ()


@pytest.mark.parametrize("purpose", ["scan", "compare"])
def test_rows_that_are_left_out_are_warned_of_and_counted(purpose) -> None:
    rows = [{"prompt": 5}, *({"prompt": x, "answer": x} for x in "abc")]
    with pytest.warns(
        LeftOutWarning, match=r"Left out: 1 of the first 3 rows of data\. The first: data row 1"
    ):
        found = choose_samples("m", True, Wanted(data=rows, count=2), purpose)
    assert found.share == "Left out: 1 of the first 3 rows of data." and len(found.samples) == 2


def test_a_refusal_says_where_reading_stopped() -> None:
    rows = [*({"prompt": str(i)} for i in range(7)), *[{"prompt": 5}] * 20, *[{"prompt": "a"}] * 40]
    with pytest.raises(SampleError, match=r"^10 of the first 17 rows of data cannot be used to measure"):
        from_data(Wanted(data=rows), 32)


def test_it_is_told_where_the_model_writes_the_answers() -> None:
    with_answer, without = Sample("a", asked("a"), "b"), Sample("b", asked("b"))
    wanted = Wanted(data=[])
    assert unanswered_note([without] * 3, wanted) == ("No row brings an answer; the model wrote all 3.",)
    assert unanswered_note([with_answer, without], wanted) == (
        "1 of 2 samples bring no answer; the model wrote them.",
    )
    assert unanswered_note([with_answer], wanted) == unanswered_note([without], Wanted()) == ()


def test_ten_left_out_of_fewer_than_a_hundred_are_too_many():
    assert are_too_many(89, 10, "refuse") and not are_too_many(89, 10, "skip")
    assert not are_too_many(90, 10, "refuse")  # a tenth is not more than a tenth
    assert not are_too_many(1, 9, "refuse")  # nine are few, whatever their share
