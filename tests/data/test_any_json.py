"""Any JSON value in any field gives a sample or one named reason, and no other exception.

ANY_JSON_EXAMPLES=100000 tries so many.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qprobe.data.reading import read_conversations
from qprobe.data.reasons import Refused
from qprobe.data.turns import learning, samples_of

EXAMPLES = int(os.environ.get("ANY_JSON_EXAMPLES", "4000"))
ROWS = 40  # of one seed
WORDS = (
    "", " ", "a", "<image>", "<image>\n<image> x", "<img>a.png</img>", "<video>", "a.png", "user", "gpt",
    "system", "human", "assistant", "image", "image_url", "file:///a", "http://[", "data:,", "s3://", "../",
    "data:image/png;base64,", "\ud83d", "\0", "\x1b[1m", "v.mp4", "https://a/b.png", "file://x/y",
    "iVBORw0KGgo" + "A" * 80, "<image 1>", "<image_2> <image 1>", "['a', 'b']", "['a' 'b']", "[" * 300, "1",
)  # fmt: skip
KEYS = (
    "messages", "conversations", "prompt", "question", "answer", "answers", "completion", "response",
    "instruction", "input", "output", "chosen", "rejected", "texts", "caption", "multiple_choice_answer",
    "image", "images", "image_path", "image_1", "system", "id", "video", "role", "content", "from", "value",
    "weight", "type", "text", "path", "url", "bytes", "index", "image_url", "detail", "tool_calls", "",
    "conversation", "choices", "options", "label", "history", "source", "data", "file_name",
    "image_id", "A", "B",
)  # fmt: skip
GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
FLOATS = (0.0, -0.0, 1.5, -1e300, 5e-324, float("nan"), float("inf"), float("-inf"))
CHARACTERS = 'aZ 09"\\{<\t\n\x7f\x85\xe9\u0301\u202e\u2028\ufeff\uffff\ud800\udfff\U0001f5bc\U0010ffff'


class Values:
    """JSON values of all kinds, drawn with `draw`, twenty times as fast as by strategies of hypothesis."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def scalar(self) -> Any:
        draw = self.draw
        return draw.choice(
            (
                lambda: None,
                lambda: draw.random() < 0.5,
                lambda: draw.choice((draw.randint(-3, 3), draw.randint(-(2**70), 2**70))),
                lambda: draw.choice((*FLOATS, draw.uniform(-10, 10))),
                lambda: draw.choice(WORDS),
                lambda: self.text(5),
            )
        )()

    def text(self, longest: int) -> str:
        one = lambda: self.draw.choice((self.draw.choice(CHARACTERS), chr(self.draw.randrange(0x110000))))  # noqa: E731
        return "".join(one() for _ in range(self.draw.randint(0, longest)))

    def value(self, depth: int = 3) -> Any:
        kind = self.draw.random()
        if depth == 0 or kind < 0.4:
            return self.scalar()
        if kind < 0.7:
            return [self.value(depth - 1) for _ in range(self.draw.randint(0, 3))]
        return {self.draw.choice(KEYS): self.value(depth - 1) for _ in range(self.draw.randint(0, 4))}

    def content(self) -> Any:
        return self.draw.choice(WORDS) if self.draw.random() < 0.5 else self.value()

    def turn(self) -> dict[str, Any]:
        made = {"role": self.draw.choice(("system", "user", "assistant", 7)), "content": self.content()}
        more = {"weight": self.scalar, "name": self.value}
        return made | {key: make() for key, make in more.items() if self.draw.random() < 0.5}

    def fields(self) -> dict[str, Any]:
        keys = [
            self.draw.choice(KEYS) if self.draw.random() < 0.5 else self.text(3)
            for _ in range(self.draw.randint(0, 5))
        ]
        return {key: self.value() for key in keys}

    def row(self) -> Any:
        turns = [self.turn() for _ in range(self.draw.randint(0, 4))]
        return self.draw.choice(
            (
                self.value,
                self.fields,
                lambda: {**self.fields(), "messages": turns},
                lambda: {**self.fields(), "prompt": self.content(), "answer": self.value()},
                lambda: {**self.fields(), **GOOD},
            )
        )()


@pytest.mark.slow
@settings(max_examples=EXAMPLES // ROWS, deadline=None)
@given(seed=st.integers(0, 2**64))
def test_any_json_value_gives_a_sample_or_one_named_reason(seed: int):
    values = Values(random.Random(seed))
    for _ in range(ROWS):
        row = values.row()
        try:
            check(row)
        except Exception as error:
            error.add_note(f"The row: {row!r}")
            raise


def check(row: Any) -> None:
    found = read_conversations([row])
    assert len(found.good) + len(found.skipped) == 1
    for sentence in (*found.sentences(), *found.notes):
        assert sentence.isprintable() and len(sentence) < 1000
    for one in found.good:
        for make in (samples_of, learning):
            try:
                made = make(one, "each")
            except Refused as problem:
                assert str(problem)
            else:
                assert made
        for turn in one.turns:
            assert turn.parts and all(isinstance(x, str | bytes | Path) for x in turn.parts)
            assert turn.text.encode() is not None
