"""Any JSON value in any field gives a sample or one named reason, and no other exception.

ANY_JSON_EXAMPLES=100000 tries so many.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qprobe.data.reading import read_conversations
from qprobe.data.reasons import Refused
from qprobe.data.turns import learning, samples_of

EXAMPLES = int(os.environ.get("ANY_JSON_EXAMPLES", "2000"))
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
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
CONTENT = st.sampled_from(WORDS) | VALUES
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(("system", "user", "assistant", 7)), "content": CONTENT},
    optional={"weight": SCALARS, "name": VALUES},
)
ROW = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), VALUES, max_size=5)
GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ROWS = st.one_of(
    VALUES,
    ROW,
    st.builds(lambda turns, more: {**more, "messages": turns}, st.lists(TURN, max_size=4), ROW),
    st.builds(lambda asked, answer, more: {**more, "prompt": asked, "answer": answer}, CONTENT, VALUES, ROW),
    ROW.map(lambda more: {**more, **GOOD}),
)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(row=ROWS)
def test_any_json_value_gives_a_sample_or_one_named_reason(row: Any):
    check(row)


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
