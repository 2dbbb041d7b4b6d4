"""Every line of a data file is a conversation to train on, or named with the reason why not."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from qprobe.data.conversations import Conversation, Turn, keep_good, read_conversations
from qprobe.errors import SampleError
from tests import tiny

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}


def write(folder: Path, *records: Any) -> Path:
    """A data file with one record a line (text as it stands), and a picture beside it."""
    (folder / "a.png").write_bytes(tiny.picture(0))
    path = folder / "train.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in records), "utf-8")
    return path


def image_header(folder: Path, name: str, width: int, height: int) -> None:
    """A PNG that says it has width x height pixels; a hundred bytes, like any bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b"")
    (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.png", "conversations": [HUMAN, GPT]},
        {"image": ["a.png"], "conversations": [{"from": "human", "value": "What is it?"}, GPT]},
        {
            "messages": [
                {"role": "user", "content": [
                    {"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"},
                ]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            ]
        },
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": "A cat."},
            ],
        },
        {"image": "a.png", "prompt": "What is it?", "answer": "A cat."},
    ],
)  # fmt: skip
def test_the_formats_people_have_say_the_same(record: dict, tmp_path: Path):
    found = read_conversations(write(tmp_path, record))
    turns = (Turn("user", "What is it?", "before"), Turn("assistant", "A cat."))
    assert found.good == (Conversation(1, turns, tmp_path / "a.png"),) and found.bad == ()


def test_system_later_turns_and_an_image_behind_the_text(tmp_path: Path):
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "What is it?\n<image>"},
        GPT,
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    (found,) = read_conversations(write(tmp_path, {"image": "a.png", "conversations": turns})).good
    assert [x.role for x in found.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [x.image for x in found.turns] == [None, "after", None, None, None]


def test_an_image_alone_is_a_question(tmp_path: Path):
    record = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, GPT]}
    (found,) = read_conversations(write(tmp_path, record)).good
    assert found.turns[0] == Turn("user", "", "before")


def test_text_alone_is_a_conversation_too(tmp_path: Path):
    path = write(tmp_path, {"conversations": [{"from": "human", "value": "Hi"}, GPT]}, "", "  ")
    (found,) = read_conversations(path).good
    assert found.image is None and found.turns[0].image is None


BAD = [
    ('{"image": "a.png", "conversations": [{"from": "hum', "no whole JSON object"),
    ("[1, 2]", "no JSON object"),
    ('{"image": "a.png", "image": "b.png"}', "stands twice"),
    ({"image": "gone.png", "conversations": [HUMAN, GPT]}, "gone.png does not exist"),
    ({"image": "notes.txt", "conversations": [HUMAN, GPT]}, "notes.txt is no image"),
    ({"image": "cut.png", "conversations": [HUMAN, GPT]}, "cut.png cannot be read"),
    ({"image": "large.png", "conversations": [HUMAN, GPT]}, "large.png has 100 megapixels, more than the 89"),
    ({"image": "huge.png", "conversations": [HUMAN, GPT]}, "more than 179 megapixels"),
    ({"image": ".", "conversations": [HUMAN, GPT]}, "is no file"),
    ({"image": "pipe", "conversations": [HUMAN, GPT]}, "pipe is no file"),
    ({"image": "x" * 5000, "conversations": [HUMAN, GPT]}, "x... cannot be read"),
    ({"image": "https://a.b/c.png", "conversations": [HUMAN, GPT]}, "address https://a.b/c.png; only files"),
    ({"image": 7, "conversations": [HUMAN, GPT]}, "its image is 7"),
    ({"image": ["a.png", "b.png"], "conversations": [HUMAN, GPT]}, "names 2 images"),
    ({"image": "a.png", "conversations": []}, "conversations are empty"),
    ({"image": "a.png", "conversations": "hello"}, "conversations are empty"),
    ({"image": "a.png", "conversations": ["hello"]}, "not a list of objects"),
    ({"image": "a.png"}, "none of conversations, messages, or prompt and answer, but image"),
    ({"foo": 1}, "none of conversations, messages, or prompt and answer, but foo"),
    ({"conversations": [HUMAN, GPT], "messages": []}, "both conversations and messages"),
    ({"image": "a.png", "conversations": [GPT, HUMAN]}, "turn 1 is the assistant's, where the user"),
    ({"image": "a.png", "conversations": [HUMAN, HUMAN, GPT]}, "2 of its turns have an image"),
    ({"conversations": [{"from": "human", "value": "a"}] * 2}, "turn 2 is the user's, where the assistant"),
    ({"image": "a.png", "conversations": [HUMAN, GPT, GPT]}, "turn 3 is the assistant's, where the user"),
    ({"image": "a.png", "conversations": [HUMAN]}, "no answer to learn"),
    ({"conversations": [{"from": "system", "value": "a"}]}, "no turn but the system's"),
    ({"image": "a.png", "conversations": [HUMAN, {"from": "bot", "value": "x"}]}, "turn 2 is from 'bot'"),
    ({"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": " "}]}, "assistant is empty"),
    ({"image": "a.png", "conversations": [HUMAN, {"from": "gpt"}]}, "turn 2 has no text"),
    ({"conversations": [{"from": "human", "value": ""}, GPT]}, "user is empty"),
    ({"conversations": [HUMAN, GPT]}, "names no image file"),
    ({"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": "<image>"}]}, "only the user"),
    ({"image": "a.png", "prompt": "What?"}, "no answer beside its prompt"),
    ({"image": "a.png", "answer": "A cat."}, "no prompt beside its answer"),
    ({"conversations": [HUMAN, GPT], "prompt": "a", "answer": "b"}, "both conversations and prompt"),
    ({"messages": [], "answer": "b"}, "both messages and answer"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "part of type 'audio'"),
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with images of every bad kind."""
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "cut.png").write_bytes(tiny.picture(0)[:500])
    os.mkfifo(tmp_path / "pipe")
    image_header(tmp_path, "large.png", 10_000, 10_000)
    image_header(tmp_path, "huge.png", 20_000, 20_000)
    return tmp_path


@pytest.mark.parametrize(("record", "why"), BAD)
def test_a_bad_line_is_named_by_its_number_and_the_reason(record: Any, why: str, files: Path):
    good = {"image": "a.png", "conversations": [HUMAN, GPT]}
    found = read_conversations(write(files, good, "", record, good))
    assert [x.line for x in found.good] == [1, 4] and [x.line for x in found.bad] == [3]
    assert why in found.bad[0].why
    with pytest.raises(SampleError, match=r"1 of 3 lines .* train\.jsonl line 3: .* --bad-data skip"):
        keep_good(found, "refuse")
    assert keep_good(found, "skip") == found.good


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path: Path):
    path = write(tmp_path, {"image": "a.png", "conversations": [HUMAN, GPT]})
    path.write_bytes(path.read_bytes() + b'\n{"prompt": "\xff", "answer": "a"}\n')
    assert [x.line for x in read_conversations(path).bad] == [2]


def test_a_mark_of_byte_order_in_front_is_no_bad_line(tmp_path: Path):
    path = write(tmp_path, {"image": "a.png", "conversations": [HUMAN, GPT]})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [x.line for x in read_conversations(path).good] == [1]


def test_many_bad_lines_are_counted_and_the_first_are_shown(tmp_path: Path):
    found = read_conversations(write(tmp_path, *["{"] * 9))
    with pytest.raises(SampleError, match=r"9 of 9 .* line 5: .* And 4 more"):
        keep_good(found, "refuse")
    with pytest.raises(SampleError, match=r"No line of train\.jsonl can be trained on"):
        keep_good(found, "skip")


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), (b" \n", "is empty")])
def test_no_file_and_an_empty_file_are_one_sentence(content: bytes | None, said: str, tmp_path: Path):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SampleError, match=said):
        read_conversations(path)


def test_an_image_is_decoded_once_however_many_lines_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from PIL import Image

    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or original(path))
    line = {"image": "a.png", "conversations": [HUMAN, GPT]}
    assert len(read_conversations(write(tmp_path, line, line, line)).good) == 3
    assert len(opened) == 1
