"""Choices of a row, and which of them an answer is."""

from __future__ import annotations

from typing import Any

import pytest

from qprobe.data.fields import Fields
from qprobe.data.reasons import Refused
from qprobe.data.shapes.choices import NUMBER_IS_CHOICE, NUMBER_IS_LETTER, asked_with, choices_of, chosen

WORDS, NUMBERS = ["red", "green", "blue"], ["2", "7", "0"]


@pytest.mark.parametrize(
    ("answer", "choices", "found"),
    [
        ("green", WORDS, ("green", None)),
        ("B", WORDS, ("B", None)),
        ("something else", WORDS, ("something else", None)),
        (0, WORDS, ("A", NUMBER_IS_LETTER)),
        (2, WORDS, ("C", NUMBER_IS_LETTER)),
        (" 1 ", WORDS, ("B", NUMBER_IS_LETTER)),
        ("7", NUMBERS, ("7", None)),  # no place of any
        ("2", NUMBERS, ("2", NUMBER_IS_CHOICE)),  # one choice, and the place of another
        (7, [2, 7, 0], (7, None)),
        (1, [0, 1], (1, None)),  # the place of itself
        (True, WORDS, (True, None)),
        (False, WORDS, (False, None)),
        (None, WORDS, (None, None)),
        (1.0, WORDS, (1.0, None)),
        (["green"], WORDS, (["green"], None)),
        ("²", WORDS, ("²", None)),  # a digit to Python, and no number
    ],
)
def test_an_answer_is_a_choice_or_the_place_of_one(answer: Any, choices: list[Any], found: tuple[Any, Any]):
    assert chosen(answer, choices) == found


@pytest.mark.parametrize("answer", [3, "3", -1, "99999999999999999999"])
def test_a_number_that_none_of_the_choices_has_is_refused(answer: Any):
    with pytest.raises(Refused, match=r"its answer is .*, and its choices are 0 to 2"):
        chosen(answer, WORDS)


def of(**row: Any) -> list[Any]:
    return choices_of(Fields(row))


def test_choices_are_a_list_a_written_list_texts_beside_labels_or_letters():
    for name in ("choices", "options"):
        assert of(**{name: WORDS}) == of(**{name: tuple(WORDS)}) == WORDS
        assert of(**{name: '["red", "green", "blue"]'}) == of(**{name: "['red', 'green', 'blue']"}) == WORDS
    assert of(choices={"text": WORDS, "label": ["A", "B", "C"]}) == WORDS
    assert of(A="red", B="green") == ["red", "green"]
    assert of(A="red", C="green") == of(B="red") == of(A="red", B=2) == []
    assert of(choices=[]) == of(choices=None) == of(question="x") == []


def test_what_is_no_list_of_few_texts_is_refused():
    assert len(of(choices=[str(n) for n in range(26)])) == 26
    for wrong, said in (
        ([str(n) for n in range(27)], "its choices are 27, more than there are letters"),
        ([["nested"]], "which is no list of texts"),
        ({"a": 1}, "which is no list of texts"),
        ("red", "which is no list of texts"),
        ("['red' 'green']", "neither JSON nor Python reads"),
    ):
        with pytest.raises(Refused, match=said):
            of(choices=wrong)


@pytest.mark.parametrize("mark", [")", ".", ":"])
def test_choices_that_stand_in_the_question_behind_their_letters_are_not_added(mark: str):
    listed = f"Which? A{mark} red B{mark} green C{mark} blue"
    assert asked_with(listed, WORDS) is None
    assert asked_with(f"Which? A{mark} red C{mark} blue", WORDS) is not None
    assert asked_with("Which?", [" red ", 2]) == "Which?\nA. red\nB. 2"
