"""Every text and image stands in what a template writes, as written and in order, or the row is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qprobe.data.reasons import Refused
from qprobe.data.rendering import Template
from qprobe.records import Turn

Messages = list[dict[str, Any]]
TURNS = (
    Turn("system", ("Be short.",)),
    Turn("user", ("The logo ", b"image", " or b?")),
    Turn("assistant", ("<think>Hm.</think>b.",)),
    Turn("user", ("Sure?",)),
)


class Processor:
    """Writes with a Python function in place of a template."""

    tokenizer = None
    image_token = "[IMG]"

    def __init__(self, write: Callable[[Messages], str]) -> None:
        self._write = write

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool, tokenize: bool) -> str:
        return self._write(messages) + ("assistant:" if add_generation_prompt else "")


def shown(content: Any) -> str:
    """Content as most templates write it."""
    if isinstance(content, str):
        return content
    return "".join(x["text"] if x["type"] == "text" else "[IMG]" for x in content)


def joined(messages: Messages, write: Callable[[Any], str] = shown) -> str:
    return "".join(f"{x['role']}: {write(x['content'])}\n" for x in messages)


def parts_only(content: Any) -> str:
    assert isinstance(content, list), "wants parts"
    return shown(content)


def strings_only(messages: Messages) -> str:
    return joined(messages, lambda content: content.strip())


def strings_of_others(messages: Messages) -> str:
    """As templates that trim what is no question, which writes a list of parts as Python source."""
    return "".join(
        f"{x['role']}: {shown(x['content']) if x['role'] == 'user' else str(x['content']).strip()}\n"
        for x in messages
    )


def without_thoughts(messages: Messages) -> str:
    return joined(messages, lambda content: shown(content).rpartition("</think>")[2])


@pytest.mark.parametrize(
    ("write", "answer"),
    [
        (joined, "<think>Hm.</think>b."),
        (lambda x: joined(x, parts_only), "<think>Hm.</think>b."),
        (strings_only, "<think>Hm.</think>b."),
        (strings_of_others, "<think>Hm.</think>b."),
        (without_thoughts, "b."),
    ],
)
def test_each_kind_of_template_gets_content_as_it_takes_it(write: Any, answer: str):
    text = Template(Processor(write)).prompt(TURNS)
    assert text == (
        f"system: Be short.\nuser: The logo [IMG] or b?\nassistant: {answer}\nuser: Sure?\nassistant:"
    )


def refuses_system(messages: Messages) -> str:
    if messages[0]["role"] == "system":
        raise RuntimeError("System role not supported")
    return joined(messages)


def images_first(messages: Messages) -> str:
    return "[IMG]" + joined(messages).replace("[IMG]", "")


def as_source(messages: Messages) -> str:
    """As templates that make parts of everything and write them without taking them apart."""
    return joined(messages, lambda x: str(x if isinstance(x, list) else [{"type": "text", "text": x}]))


def last_only(messages: Messages) -> str:
    return joined(messages[-1:])


def upper(messages: Messages) -> str:
    return joined(messages).upper().replace("[IMG]", "[IMG]")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (refuses_system, r"given parts it fails \(System role not supported\); .*given strings it fails"),
        (images_first, "given parts it does not show an image of turn 2 where it stands"),
        (last_only, "given parts it leaves out or changes the text of turn 1"),
        (upper, "given strings it leaves out or changes the text of turn 1"),
        (lambda x: joined(x) + "[IMG]", "it shows more images than there are"),
        (
            as_source,
            "given parts it writes the list of parts itself, as source code; .*given strings it writes",
        ),
    ],
)
def test_a_template_that_loses_something_is_named_with_the_reason_of_each_way(write: Any, said: str):
    with pytest.raises(Refused, match=said):
        Template(Processor(write)).prompt(TURNS)


def test_a_tokenizer_gets_strings_first():
    class Tokenizer:
        def apply_chat_template(self, messages: Messages, **_: Any) -> str:
            return joined(messages, lambda content: content if isinstance(content, str) else "parts")

    assert Template(Tokenizer()).prompt((Turn("user", ("one", "two")),)) == "user: one\ntwo\n"


def test_the_learned_answer_keeps_its_thoughts():
    turns = (*TURNS, Turn("assistant", ("<think>Yes.</think>It is.",)))
    with pytest.raises(Refused, match="the text of turn 5"):
        Template(Processor(without_thoughts)).fitting(turns, False)
