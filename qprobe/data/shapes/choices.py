"""Questions with choices: the choices stand below the question, and the answer is the letter of one.

Without them the model would be asked which, and not of what; and the number that data sets give for an answer
would be read as a text.
"""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Sequence
from itertools import pairwise
from string import ascii_uppercase
from typing import Any

from qprobe.data.content import number_text
from qprobe.data.fields import Fields
from qprobe.data.reasons import Refused, shown

CHOICES_LISTED = "the choices stand below the question, each behind its letter"
NUMBER_IS_LETTER = "the answer's number, counted from 0, became the letter of its choice"
NUMBER_IS_CHOICE = "the answer's number is one of the choices, and is not read as the place of another"
_NAMES = ("choices", "options")
_LONGEST = 100_000  # characters of a list that Python wrote


def choices_of(fields: Fields) -> list[str | int | float]:
    """The choices of a row: a list in one field, or texts in the fields A, B, ...; none if it has none.

    Raises Refused for choices that are no list of texts or numbers.
    """
    letters = [x for x in ascii_uppercase if isinstance(fields.value(x), str) and x in fields]
    if letters[:2] == ["A", "B"] and letters == list(ascii_uppercase[: len(letters)]):
        return [str(fields.take(x)) for x in letters]
    name = next((x for x in _NAMES if x in fields), "")
    found = fields.take(*_NAMES)
    if isinstance(found, dict) and isinstance(found.get("text"), list):  # beside their labels
        found = found["text"]
    if isinstance(found, str):
        found = written_list(found)
    if found is None or (isinstance(found, Sequence) and not found):
        return []
    if not isinstance(found, list | tuple) or not all(_is_plain(x) for x in found):
        raise Refused(f"its {name} are {shown(repr(found))}, which is no list of texts")
    if len(found) > len(ascii_uppercase):
        raise Refused(f"its {name} are {len(found)}, more than there are letters")
    return list(found)


def asked_with(question: str, choices: Sequence[Any]) -> str | None:
    """`question` with the choices below it; None where they stand in it behind their letters already."""
    listed = [f"{letter}. {str(x).strip()}" for letter, x in zip(ascii_uppercase, choices, strict=False)]
    if any(all(x[0] + mark in question for x in listed) for mark in (")", ".", ":")):
        return None
    return "\n".join([question, *listed])


def chosen(answer: Any, choices: Sequence[Any]) -> tuple[Any, str | None]:
    """(the answer, the rule by which a number was read): a letter, or what one of the choices is, stays.

    So does a number that is one choice and the place of another: who writes places for answers has no use for
    the words of a choice. Raises Refused for a number that none of the choices has.
    """
    text = answer.strip() if isinstance(answer, str) else answer
    if isinstance(text, bool) or not isinstance(text, int | str):
        return answer, None
    is_number = isinstance(text, int) or (text.isascii() and text.isdigit())
    place = int((number_text(text) or str(text))[:9]) if is_number else -1
    is_place = 0 <= place < len(choices)
    if text in choices:
        return answer, NUMBER_IS_CHOICE if is_place and choices[place] != text else None
    if not is_number:
        return answer, None
    if not is_place:
        raise Refused(f"its answer is {shown(repr(answer))}, and its choices are 0 to {len(choices) - 1}")
    return ascii_uppercase[place], NUMBER_IS_LETTER


def written_list(text: str) -> Any:
    """The list that `text` writes out, as JSON or as Python; another text as it is.

    Raises Refused for a list that is neither, such as numpy's.
    """
    if not text.lstrip().startswith("["):
        return text
    found = _as_json(text)
    if found is None and len(text) <= _LONGEST:
        found = _as_python(text)
    if not isinstance(found, list):
        raise Refused(f"{shown(text)} is a list that neither JSON nor Python reads")
    return found


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _as_python(text: str) -> Any:
    """The list, unless two texts stand in it without a comma, which Python would make one."""
    try:
        kinds = [x.type for x in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
        texts = [x for x in kinds if x not in (tokenize.NL, tokenize.NEWLINE)]
        if any(a == b == tokenize.STRING for a, b in pairwise(texts)):
            return None
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        return None


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
