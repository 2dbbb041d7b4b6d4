"""A row that makes no conversation is named with its number and the reason; what is not used is told once."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from qprobe.data.conversation import Conversations
from qprobe.data.reading import Reading, read_conversations
from qprobe.data.reasons import Refused
from qprobe.data.rows import Asked
from qprobe.data.turns import learning, samples_of
from tests import tiny

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}
ASKED = {"prompt": "What is it?", "answer": "A cat."}


def read(folder: Path, *rows: Any) -> Conversations:
    """What a file with one row per line (text as it stands) gives, with a picture beside it."""
    (folder / "a.png").write_bytes(tiny.picture(0))
    path = folder / "train.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in rows), "utf-8")
    return read_conversations(path)


def image_header(folder: Path, name: str, width: int, height: int) -> None:
    """A PNG that says it has width x height pixels; a hundred bytes, like any bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b"")
    (folder / name).write_bytes(data)


def talk(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **more}


def spoken(*contents: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": x} for i, x in enumerate(contents)]}


BAD = [
    ('{"image": "a.png", "conversations": [{"from": "hum', "not a complete JSON object"),
    ("[1, 2]", "no JSON object"),
    ("5", "no JSON object"),
    ('{"image": "a.png", "image": "b.png"}', "stands twice"),
    ('{"prompt": "a", "answer": NaN}', "NaN is no JSON number"),
    ("[" * 20_000, "nested too deeply"),
    # images
    (talk(HUMAN, GPT, image="gone.png"), "gone.png does not exist"),
    (talk(HUMAN, GPT, image="notes.txt"), "notes.txt is no image"),
    (talk(HUMAN, GPT, image="cut.png"), "cut.png cannot be read"),
    (talk(HUMAN, GPT, image="large.png"), "large.png has 121 megapixels, more than the 100"),
    (talk(HUMAN, GPT, image="huge.png"), "more than 179 megapixels"),
    (talk(HUMAN, GPT, image="."), "folder"),
    (talk(HUMAN, GPT, image="pipe"), "pipe"),
    (talk(HUMAN, GPT, image="/dev/zero"), "device"),
    (talk(HUMAN, GPT, image="x" * 5000), "cannot be read"),
    (talk(HUMAN, GPT, image="a\0.png"), "cannot be read"),
    (talk(HUMAN, GPT, image="https://a.b/c.png"), "address https://a.b/c.png; --allow-downloads fetches it"),
    (talk(HUMAN, GPT, image="s3://a/c.png"), "address s3://a/c.png; only files and http addresses"),
    (talk(HUMAN, GPT, image="file://there/c.png"), "on another machine"),
    (talk(HUMAN, GPT, image="data:image/png;base64,@@"), "base64 is damaged"),
    (talk(HUMAN, GPT, image="data:nothing"), "without data"),
    (talk(HUMAN, GPT, image="data:image/png;base64,AAAA"), "its image is no image"),
    (talk(HUMAN, GPT, image=7), "its image is 7"),
    (talk(HUMAN, GPT, image={"height": 5}), "names no file and holds no bytes"),
    (talk(HUMAN, GPT, image=["a.png", "b.png"]), "1 place for images and 2 images"),
    (talk(HUMAN, GPT, HUMAN, GPT, image="a.png"), "2 places for images and 1"),
    (talk(HUMAN, GPT), "turn 1 has an <image>, but the row names no image file"),
    (talk(HUMAN, {"from": "gpt", "value": "<image>"}, image="a.png"), "only the user"),
    # what shows something else
    ({**spoken("<video>what happens?", "it runs"), "videos": ["v.mp4"]}, "v.mp4 does not exist"),
    (spoken("<video>what happens?", "it runs"), "turn 1 has a <video>, but the row names no video file"),
    ({**ASKED, "video": "v.mp4"}, "v.mp4 does not exist"),
    ({**ASKED, "video": "a.png"}, "video a.png is a still image; give the frames of one video as a list"),
    ({**ASKED, "video": ["a.png", "gone.png"]}, "gone.png does not exist"),
    ({**ASKED, "video": ["a.png", 7]}, "a frame of its video is 7, which is no path of a file"),
    ({**ASKED, "video": 7}, "its video is 7, which is no path of a file"),
    ({**ASKED, "video": ["a.png"] * 769}, "its video has 769 frames; 1 to 768 are read"),
    ({**ASKED, "video": ["a.png"], "image": "b.png"}, "shows a video beside images, and both together"),
    ({**ASKED, "video": ["a.png"], "clip": "other"}, "clip names a video or a sound, and is not read"),
    ({**ASKED, "video": "notes.txt"}, "video notes.txt is neither an animated image nor a video file"),
    (spoken([{"type": "video"}, {"type": "text", "text": "a"}], "x"), "the row names no video file"),
    ({**ASKED, "clip": {"path": "v"}}, "clip names a video or a sound"),
    ({**ASKED, "where": "v.mp4"}, "where names a video or a sound"),
    ({**ASKED, "scan": "other.png"}, "scan seems to hold an image"),
    ({**ASKED, "views": ["other.png"]}, "views seems to hold an image"),
    (spoken([{"type": "video", "video": "v.mp4"}], "x"), "v.mp4 does not exist"),
    (spoken([{"type": "audio"}], "x"), "part of type 'audio'"),
    (spoken('<img src="a.png"> what?', "x"), "<img src"),
    (spoken("<image_1> what?", "x"), "<image_1>, which is not read"),
    (spoken([{"type": "text", "text": "a", "cache": 1}], "x"), "a part with cache, which is not read"),
    ({**ASKED, "image_id": 7}, "its field image_id names an image, and the row shows none"),
    ({**ASKED, "image": "a.png", "mask": "b.png"}, "mask seems to hold an image"),
    (spoken("<image 2> what?", "x") | {"image": "a.png"}, "its parts show the images [1], and it has 1"),
    ({"messages": [{"role": "user", "content": "<image> what?", "images": []}]}, "names no image file"),
    (
        {"messages": [{"role": "user", "content": "<image> what?", "images": ["a.png", "b.png"]}]},
        "turn 1 has other images than it has places for",
    ),
    # choices
    ({"question": "a", "choices": ["b", "c"], "answer": 2}, "its answer is 2, and its choices are 0 to 1"),
    ({"question": "a", "choices": ["b", "c"], "answer": -1}, "its answer is -1, and its choices are 0 to 1"),
    ({"question": "a", "choices": {"x": 1}}, "its choices are {'x': 1}, which is no list of texts"),
    ({"question": "a", "options": "b or c"}, "its options are 'b or c', which is no list of texts"),
    ({"question": "a", "options": [["b"]]}, "which is no list of texts"),
    # turns
    (talk(image="a.png"), "conversations are empty"),
    ({"image": "a.png", "conversations": "hello"}, "conversations are not a list"),
    ({"image": "a.png", "conversations": ["hello"]}, "not a list of objects"),
    ({"image": "a.png"}, "none of conversations, messages, or prompt and answer, but image"),
    ({"foo": 1}, "none of conversations, messages, or prompt and answer, but foo"),
    ({"data": [ASKED]}, "but data; where data holds the rows, make that array the whole file"),
    ({}, "none of conversations, messages, or prompt and answer, but nothing"),
    (talk(HUMAN, GPT, messages=[]), "both conversations and messages"),
    (talk(GPT, HUMAN, image="a.png"), "turn 1 is the assistant's, where the user"),
    (talk(HUMAN, HUMAN, GPT, image="a.png"), "2 places for images and 1 image"),
    (talk(*[{"from": "human", "value": "a"}] * 2), "turn 2 is the user's, where the assistant"),
    (talk(HUMAN, GPT, GPT, image="a.png"), "turn 3 is the assistant's, where the user"),
    (talk({"from": "system", "value": "a"}), "no turn but the system's"),
    (talk(HUMAN, {"from": "bot", "value": "x"}, image="a.png"), "turn 2 is from 'bot'"),
    (talk(HUMAN, {"from": "gpt", "value": " "}, image="a.png"), "assistant is empty"),
    (talk(HUMAN, {"from": "gpt"}, image="a.png"), "turn 2 has no text"),
    (talk(HUMAN, {**GPT, "weight": 0.5}, image="a.png"), "turn 2 has the weight 0.5; known are 0 and 1"),
    (talk(HUMAN, {**GPT, "tool_calls": [{}]}, image="a.png"), "turn 2 has tool_calls"),
    (talk({"from": "human", "value": ""}, GPT), "user is empty"),
    (talk({"from": "human", "value": "a", "content": "b"}, GPT), "turn 1 has both content and value"),
    (talk({"from": "human", "value": "a"}, {**GPT, "role": "user"}), "turn 2 has both role and from"),
    (talk(HUMAN, GPT, image=""), "but the row names no image file"),
    (talk(HUMAN, GPT, images=[{"bytes": None, "path": None}]), "but the row names no image file"),
    (talk(HUMAN, GPT, prompt="a", answer="b"), "both conversations and prompt"),
    ({"messages": [], "answer": "b"}, "both messages and answer"),
    # prompt and answer
    ({"image": "a.png", "answer": "A cat."}, "no prompt beside its answer"),
    ({"prompt": 5}, "its prompt is 5"),
    ({"prompt": ["a"], "answer": "b"}, "its prompt is ['a']"),
    ({"prompt": "a", "question": "b"}, "both prompt and question"),
    ({"prompt": "a", "answer": "b", "answers": ["c"]}, "both answer and answers"),
    ({"prompt": "", "answer": "b"}, "its prompt is empty; leave the field out where there is none"),
    ({"prompt": " ", "answer": "b"}, "its prompt is ' '"),
    ({"prompt": "a", "answer": ""}, "its answer is empty; leave the field out where there is none"),
    ({"prompt": "a", "answer": " \n"}, "its answer is empty"),
    ({"prompt": "a", "answers": ["", " "]}, "its answer is empty"),
    ({"instruction": "", "input": "", "output": "b"}, "its instruction is empty"),
    ({"instruction": "a", "input": "", "output": ""}, "its output is empty"),
    ({"instruction": "a", "input": ["b"]}, "its input is ['b'], which is no text"),
    ({"prompt": "a", "input": "b", "output": "c"}, "both prompt and input"),
    ({"prompt": "a", "answer": "b", "chosen": "c"}, "both answer and chosen"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "its chosen is empty"),
    ({"texts": [{"user": "a", "assistant": "b"}], "answer": "c"}, "both texts and answer"),
    ({"texts": [{"user": "", "assistant": "b"}]}, "turn 1 of the user is empty"),
    ({"chosen": "a", "rejected": "b"}, "no prompt beside its chosen"),
    ('"a question"', 'it is a text by itself, and no row such as {"prompt": ..., "answer": ...}'),
    ({"prompt": "a", "answer": True}, "its answer is True"),
    ({"prompt": "a", "answer": [["b"]]}, "lists of lists"),
    ({"prompt": "a", "answer": {"score": 1}}, "holds no text"),
    ('{"prompt": "\\ud83d", "answer": "x"}', "half of a character ('\\ud83d')"),
    ('{"prompt": "a", "answer": "x", "image": "\\ud83d"}', "half of a character"),
    ('{"prompt": "a", "answer": "x", "id": "\\ud83d"}', "its id holds half of a character"),
    ({**ASKED, "system": 5}, "its system prompt is 5"),
    ({**spoken("a", "b"), "system": "<image>"}, "only the user shows one"),
    (
        {"system": "Be long.", "messages": [{"role": "system", "content": "Be short."}]},
        "a system prompt and a turn of the system",
    ),
]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with images of every bad kind."""
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "cut.png").write_bytes(tiny.picture(0)[:500])
    os.mkfifo(tmp_path / "pipe")
    image_header(tmp_path, "large.png", 11_000, 11_000)
    image_header(tmp_path, "huge.png", 20_000, 20_000)
    return tmp_path


@pytest.mark.parametrize(("row", "why"), BAD)
def test_a_bad_row_is_named_by_its_number_and_the_reason(row: Any, why: str, files: Path):
    good = talk(HUMAN, GPT, image="a.png")
    found = read(files, good, "", row, good)
    assert [x.row for x in found.good] == [1, 4] and [x.row for x in found.skipped] == [3]
    assert why in found.skipped[0].why and found.notes == ()
    (sentence,) = found.sentences()
    assert sentence.startswith("train.jsonl line 3: ") and sentence.endswith(".") and sentence.isprintable()
    assert len(sentence) < 400


def test_what_somebody_wrote_cannot_write_on_the_terminal(tmp_path: Path):
    found = read(tmp_path, {**ASKED, "image": "\x1b[2J\nok"}, {**ASKED, "\x1b[31mred": "x"})
    assert all(x.isprintable() for x in (*found.sentences(), *found.notes)) and found.notes


def test_fields_that_are_not_read_are_told_once(tmp_path: Path):
    row = {
        **ASKED,
        "id": "7",
        "source": "coco",
        "score": None,
        "tags": [],
        "image": "a.png",
        "file": "x/a.png",
    }
    more = {
        "messages": [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    }
    found = read(tmp_path, row, {**row, "id": "8", "split": "train"}, more, {**ASKED, "id": [1]})
    assert len(found.good) == 4
    assert found.notes == ("train.jsonl: not used are the fields file, id, messages[].name, source, split.",)


def test_a_row_whose_image_is_unusable_is_left_out_whole(tmp_path: Path):
    found = read(tmp_path, {**ASKED, "images": ["a.png", "gone.png"]}, {**ASKED, "image_path": "gone.png"})
    assert found.good == () and len(found.skipped) == 2


@pytest.mark.parametrize("held", [{"bytes": b"x", "path": None}, [{"bytes": b"x", "path": "a.png"}], [b"x"]])
def test_an_image_in_a_field_that_is_not_read_is_never_dropped(held: Any):
    (skipped,) = read_conversations([{**ASKED, "screenshot": held}]).skipped
    assert skipped.why.startswith("its field screenshot seems to hold an image")


@pytest.mark.parametrize("field", ["image_path", "file_name", "filename", "image_url", "image_file_name"])
def test_beside_an_image_itself_a_name_says_where_it_came_from(field: str):
    image = {"bytes": tiny.picture(0), "path": "a.png"}
    found = read_conversations([{**ASKED, "image": image, field: "train/000017.jpg"}])
    assert [x.seen for x in found.good] == [(tiny.picture(0),)]
    assert found.notes == (f"data: not used are the fields {field}.",)


def test_numbers_that_python_does_not_write_are_named():
    rows = [{**ASKED, "answer": 10**5000}, {**ASKED, "id": 10**5000}]
    assert {x.why for x in read_conversations(rows).skipped} == {"it holds a number of thousands of digits"}


def test_two_turns_of_weight_zero_are_read_and_not_learned(tmp_path: Path):
    row = spoken("hi", "wrong", "again", "right")
    row["messages"][1]["weight"] = 0
    (found,) = read(tmp_path, row).good
    assert [x.learned for x in learning(found, "each").turns if x.role == "assistant"] == [False, True]
    assert [(x.prompt, x.answer) for x in samples_of(found, "each")] == [("again", "right")]
    assert [x.text for x in samples_of(found, "first")[0].turns] == ["hi", "wrong", "again"]


@pytest.mark.parametrize(("which", "answers"), [("first", ["b"]), ("last", ["d"]), ("each", ["b", "d"])])
def test_the_answers_that_turns_name_count(which: Any, answers: list[str], tmp_path: Path):
    (found,) = read(tmp_path, spoken("a", "b", "c", "d")).good
    samples = samples_of(found, which)
    assert [x.answer for x in samples] == answers
    assert [x.text for x in learning(found, which).turns if x.role == "assistant" and x.learned] == answers
    assert all(x.turns == found.turns[: 1 + 2 * "bd".index(str(x.answer))] for x in samples)
    names = ["train-1 turn 2", "train-1 turn 4"] if which == "each" else ["train-1"]
    assert [x.id for x in samples] == names


@pytest.mark.parametrize("which", ["first", "last", "each"])
def test_a_question_at_the_end_counts_only_where_nothing_is_answered(which: Any, tmp_path: Path):
    (answered, alone) = read(tmp_path, spoken("a", "b", "c"), spoken("a")).good
    assert [x.answer for x in samples_of(answered, which)] == ["b"]
    assert [x.text for x in learning(answered, which).turns] == ["a", "b"]
    assert [x.answer for x in samples_of(alone, which)] == [None]
    with pytest.raises(Refused, match="no answer to learn"):
        learning(alone, which)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "A cat."}, "the text of text is not read; call it prompt or answer, or pass --prompt"),
        ({"label": "cat", "words": [{"text": "a"}]}, "the text of label, words is not read"),
        ({"texts": ["Which?", "A cat."]}, "the text of texts is not read"),
        ({"caption": ""}, "its caption is empty"),
        ({"caption": " "}, "its answer is empty"),
        ({"prompt": ""}, "its prompt is empty"),
        ({"prompt": "", "answer": "A cat."}, "its prompt is empty"),
        ({"instruction": "", "input": ""}, "its instruction is empty"),
        ({"answer": ""}, "its answer is empty"),
    ],
)
def test_a_scan_puts_no_question_in_the_place_of_a_text(row: dict[str, Any], why: str, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(tiny.picture(0))
    rows = [{"image": "a.png", **row}, {"image": "a.png", "image_id": "x7", "file": "x/a.png", "label": 3}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    found = read_conversations(path, Reading(asked=Asked(describe=True)))
    assert [x.row for x in found.good] == [2] and why in found.skipped[0].why
    if "is not read" in why:
        found = read_conversations(path, Reading(asked=Asked("Why?")))
        assert [x.turns[0].text for x in found.good] == ["Why?", "Why?"]


def test_a_conversation_that_nothing_is_learned_of_is_named(tmp_path: Path):
    row = spoken("a", "b")
    row["messages"][1]["weight"] = 0
    (found,) = read(tmp_path, row).good
    for make in (samples_of, learning):
        with pytest.raises(Refused, match="weight 0"):
            make(found, "each")


def test_an_image_is_decoded_once_however_many_rows_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from PIL import Image

    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **more: opened.append(args) or original(*args, **more))
    line = talk(HUMAN, GPT, image="a.png")
    assert len(read(tmp_path, line, line, line).good) == 3
    assert len(opened) == 1


def test_a_line_that_is_not_utf8_is_named_and_not_read_with_other_letters(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "Größe?"}\n'.encode() + '{"prompt": "Größe?"}\n'.encode("latin-1"))
    found = read_conversations(path)
    assert [x.turns[0].text for x in found.good] == ["Größe?"]
    assert found.skipped[0].why.startswith("it is not UTF-8 (byte 15)")


def names(path: Path, *rows: dict[str, Any]) -> tuple[list[str], Conversations]:
    path.write_text("\n".join(json.dumps(x) for x in rows))
    found = read_conversations(path)
    assert [x.turns[0].text for x in found.good] == [x["prompt"] for x in rows if "prompt" in x]
    return [x.name for x in found.good], found


def test_a_row_without_an_id_is_named_by_its_number(tmp_path: Path):
    without = [{"prompt": "a"}, {"prompt": "b", "id": None}, {"prompt": "c", "id": ""}]
    found, read = names(tmp_path / "data.jsonl", *without, {"prompt": "d", "id": 0})
    assert found == ["data-1", "data-2", "data-3", "0"] and read.notes == ()


def test_rows_of_one_id_are_told_apart_and_named(tmp_path: Path):
    found, read = names(
        tmp_path / "data.jsonl",
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
    assert read.notes == (
        "data.jsonl: 3 lines with the id of an earlier one: '7' of line 1 is called '7 (line 3)' in line 3, "
        "'data-6' of line 5 is called 'data-6 (line 6)' in line 6, "
        "'7' of line 1 is called '7 (line 8) (line 8)' in line 8.",
    )
