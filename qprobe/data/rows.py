"""One row of any of the shapes that people have -> a conversation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qprobe.data.builtin import DEFAULT_PROMPT
from qprobe.data.content import IMAGE_MARK, VIDEO_MARK, Place, number_text, pieces_of
from qprobe.data.fields import Fields
from qprobe.data.pictures import Pictures
from qprobe.data.reasons import Refused, checked_text, shown
from qprobe.data.shapes.choices import CHOICES_LISTED, asked_with, choices_of, chosen
from qprobe.data.shapes.spoken import (
    PAIRS,
    Noted,
    Said,
    checked,
    is_pairs,
    is_turns,
    turns_of,
    turns_of_history,
    turns_of_pairs,
)
from qprobe.records import Part, Turn, Video
from qprobe.system.wording import counted

_LISTS = ("conversations", "messages", "conversation")
_QUESTION = ("prompt", "question", "query")
_ALPACA = ("instruction", "input")  # which are one question together
_CHOSEN, _REJECTED = "chosen", "rejected"  # of a preference
_ONE_OF_SEVERAL = "multiple_choice_answer"  # VQA's, the answer that most of the people in "answers" gave
_ANSWER = ("answer", "answers", "completion", "response", "output", _CHOSEN)
_LABEL = "label"  # ChartQA's answer; beside an image alone it is a class
_CAPTION = ("caption", "captions")
OPENING = (*_LISTS, *_QUESTION, *_ALPACA, *_ANSWER)
"""Fields of which a row has one: an object with one is a row, whatever else it holds."""
CHOSEN_COUNTS = f"{_CHOSEN} is read as the answer, and {_REJECTED} is not used"
NO_LAST_QUESTION = "a last question without an answer is left out"
TURNS_JOINED = "turns of the user that follow one another, with an image between, are read as one"
_ARTICLES = {"image": "an", "video": "a"}
_FIRST = ("system", "user", "human")  # who opens a conversation


@dataclass(frozen=True)
class Parsed:
    """What a row says.

    name: its id, None without one. unused: names of the fields that were not read. rules: what was done to
    read it, each a clause that goes on from "In 8 rows ".
    """

    name: str | None
    turns: tuple[Turn, ...]
    unused: frozenset[str]
    rules: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Asked:
    """What is asked where a row has an image and no question.

    prompt: the user's, also of videos. describe: whether without one `DEFAULT_PROMPT` is asked where the row
    brings no text at all; of an image with a caption it always is. Else the row is left out.
    """

    prompt: str | None = None
    describe: bool = False


def parse_row(row: Any, pictures: Pictures, asked: Asked = Asked()) -> Parsed:
    """The conversation of a row; its images are found and not decoded yet.

    row: or a Refused, as of `qprobe.data.source.Rows`, which is raised. A question behind the last answer is
    dropped: what is answered counts. Raises Refused, a clause that says why the row is left out.
    """
    if isinstance(row, Refused):
        raise row
    if isinstance(row, str):
        raise Refused('it is a text by itself, and no row such as {"prompt": ..., "answer": ...}')
    if not isinstance(row, Mapping):
        raise Refused("it is no JSON object")
    fields, noted = Fields(row), Noted()
    beside, videos = fields.take_images(), fields.take_videos()
    is_asked = bool(beside) or (bool(videos) and asked.prompt is not None)
    said = _said(fields, pictures, asked if is_asked else None, noted)
    system = fields.take("system", "system_prompt")
    if system is not None:
        said = _with_system(said, system, pictures)
    said = _placed(said, [pictures.find_video(x) for x in videos], VIDEO_MARK)
    said = _placed(said, [pictures.find(x) for x in beside], IMAGE_MARK)
    turns = _joined(_turns(said), noted)
    _check_turns(turns)
    if turns[-1].role == "user" and any(x.role == "assistant" for x in turns):
        turns = turns[:-1]
        noted.rules.add(NO_LAST_QUESTION)
    name = fields.take("id")
    if isinstance(name, bool) or not isinstance(name, str | int):
        noted.unread |= set() if name is None else {"id"}
        name = None
    seen = [isinstance(x, Video) for turn in turns for x in turn.seen]
    if any(seen) and not all(seen):
        raise Refused("it shows a video beside images, and both together are not read; leave one of them out")
    unused = fields.unused(beside, False in seen, True in seen)
    if noted.is_silent:
        _refuse_texts(fields.texts(beside))
    given = None if name is None else checked_text(number_text(name) or str(name), "its id")
    return Parsed(given, turns, unused | noted.unread, frozenset(noted.rules))


def _refuse_texts(names: Sequence[str]) -> None:
    """Raises Refused for texts beside an image that are read neither as a question nor as an answer."""
    if names:
        raise Refused(
            f"it has no question and no answer, and the text of {shown(', '.join(names))} is not read; call "
            "it prompt or answer, or pass --prompt to ask every image the same"
        )


def _said(fields: Fields, pictures: Pictures, asked: Asked | None, noted: Noted) -> list[Said]:
    """asked: None for a row without an image beside."""
    lists = [x for x in _LISTS if fields.has(x)] + [PAIRS] * is_pairs(fields.value(PAIRS))
    if lists and _repeats(fields, lists[0]):
        fields.take("prompt")
    named = [x for x in (*_QUESTION, *_ANSWER) if x in fields and not fields.is_taken(x)]
    if len(lists) > 1 or (lists and named not in ([], [_CHOSEN])):
        one, other = (*lists, *named)[:2]
        raise Refused(f"it has both {one} and {other}; leave one of them out")
    if lists:
        listed = fields.take(lists[0]) or []
        turns = turns_of_pairs(listed, noted) if lists[0] == PAIRS else listed
        said = turns_of(turns, lists[0], pictures, noted)
        return _answered(said, _answer(fields, noted) if named else None, pictures, noted)
    question, answer = _question(fields), _answer(fields, noted)
    if question is None and is_turns(answer) and answer[0].get("role", answer[0].get("from")) in _FIRST:
        return turns_of(answer, "turns", pictures, noted)
    if question is None:
        question, answer = _of_image(fields, answer, asked, noted)
    elif isinstance(question, str):
        question, answer = _with_choices(fields, question, answer, noted)
    if is_turns(question):
        said = turns_of(question, "prompt", pictures, noted)
    elif isinstance(question, str) and question.strip():
        said = _history(fields, pictures, noted)
        said.append(Said("user", pieces_of(question, len(said) + 1, pictures)))
    else:
        raise Refused(f"its prompt is {shown(repr(question))}, which is no text and no list of turns")
    return _answered(said, answer, pictures, noted)


def _repeats(fields: Fields, name: str) -> bool:
    """Whether the prompt of a row is the first question in its list of turns once more."""
    turns, prompt = fields.value(name), fields.value("prompt")
    if not isinstance(prompt, str) or not is_turns(turns):
        return False
    asked = (x.get("content", x.get("value")) for x in turns if x.get("role", x.get("from")) in _FIRST[1:])
    first = next(asked, None)
    return isinstance(first, str) and first.strip() == prompt.strip()


def _history(fields: Fields, pictures: Pictures, noted: Noted) -> list[Said]:
    """The turns before the question, which are a list of pairs."""
    turns = turns_of_history(fields.value("history"))
    if turns is None:
        return []
    fields.take("history")
    return turns_of(turns, "history", pictures, noted)


def _with_choices(fields: Fields, question: str, answer: Any, noted: Noted) -> tuple[str, Any]:
    """(question, answer) with the row's choices below the question, if it has some."""
    if answer is None and isinstance(fields.value(_LABEL), str | list | tuple) and _LABEL in fields:
        answer = fields.take(_LABEL)
    choices = choices_of(fields)
    if not choices or not question.strip():
        return question, answer
    asked = asked_with(question, choices)
    if asked is not None:
        noted.rules.add(CHOICES_LISTED)
    answer, rule = chosen(answer, choices)
    noted.rules.update(filter(None, [rule]))
    return asked or question, answer


def _question(fields: Fields) -> Any:
    """What is asked, an instruction above its input; None if the row does not say."""
    alpaca = [x for x in _ALPACA if x in fields]
    named = [x for x in _QUESTION if x in fields]
    if alpaca and named:
        raise Refused(f"it has both {named[0]} and {alpaca[0]}; leave one of them out")
    if not alpaca:
        found = fields.take(*_QUESTION)
        if found is None:
            _refuse_blank(fields, (*_QUESTION, *_ALPACA))
        return found
    texts = [fields.take(x) for x in alpaca]
    strange = next((i for i, x in enumerate(texts) if not isinstance(x, str)), None)
    if strange is not None:
        raise Refused(f"its {alpaca[strange]} is {shown(repr(texts[strange]))}, which is no text")
    return "\n".join(x for x in texts if x.strip()) or _refuse_blank(fields, alpaca)


def _answer(fields: Fields, noted: Noted) -> Any:
    """The answer, of several kinds the one that counts; None if the row does not bring one."""
    if _ONE_OF_SEVERAL in fields:
        fields.take("answers")
        return fields.take(_ONE_OF_SEVERAL)
    found = fields.take(*_ANSWER)
    if found is None:
        _refuse_blank(fields, _ANSWER)
    if _CHOSEN in fields and fields.take(_REJECTED) is not None:
        noted.rules.add(CHOSEN_COUNTS)
    is_turn = isinstance(found, Mapping) and ("role" in found or "from" in found)
    return [found] if is_turn else found


def _of_image(fields: Fields, answer: Any, asked: Asked | None, noted: Noted) -> tuple[str, Any]:
    """(question, answer) of a row that asks nothing itself; raises Refused where nothing is asked."""
    caption = None
    if asked is not None and answer is None:
        caption = fields.take(*_CAPTION)
        if caption is None:
            _refuse_blank(fields, _CAPTION)
    found = answer if caption is None else caption
    if asked is not None and asked.prompt is not None:
        return asked.prompt, found
    if caption is None and not (asked is not None and asked.describe):
        named = [x for x in _ANSWER if x in fields]
        if named:
            raise Refused(f"it has no prompt beside its {named[0]}")
        there = shown(", ".join(sorted(fields.names()))) or "nothing"
        held = next((x for x in ("data", "rows", "train") if isinstance(fields.value(x), list)), None)
        wrapped = "" if held is None else f"; where {held} holds the rows, make that array the whole file"
        raise Refused(f"it has none of conversations, messages, or prompt and answer, but {there}{wrapped}")
    noted.is_silent = found is None
    if found is not None:
        noted.rules.add(f'the question is "{DEFAULT_PROMPT}", since there is an answer alone')
    return DEFAULT_PROMPT, found


def _answered(said: list[Said], answer: Any, pictures: Pictures, noted: Noted) -> list[Said]:
    """`said` with its answer: turns, which may repeat the question, or a text."""
    if answer is None:
        return said
    if is_turns(answer):
        whole = turns_of(answer, "turns", pictures, noted)
        if [(x.role, x.pieces) for x in whole[: len(said)]] == [(x.role, x.pieces) for x in said]:
            return whole
        return [*said, *turns_of(answer, "completion", pictures, noted, len(said))]
    text = _answer_text(answer)
    if not text.strip():
        raise Refused("its answer is empty; leave the field out where there is none")
    return [*said, Said("assistant", pieces_of(text, len(said) + 1, pictures))]


def _refuse_blank(fields: Fields, names: Sequence[str]) -> None:
    """Raises Refused for an empty text under one of `names`, which null is not."""
    blank = next((x for x in names if isinstance(fields.value(x), str)), None)
    if blank is not None:
        raise Refused(f"its {blank} is empty; leave the field out where there is none")


def _answer_text(answer: Any) -> str:
    """An answer as text; of several the most frequent one, the first of those that are."""
    if isinstance(answer, str):
        return answer
    if hasattr(answer, "tolist"):  # numpy's numbers and arrays
        answer = answer.tolist()
    number = number_text(answer)
    if number is not None:
        return number
    if isinstance(answer, Mapping):
        inner = next((answer[x] for x in ("answer", "text") if x in answer), None)
        if inner is None or isinstance(inner, Mapping):
            raise Refused(f"its answer is {shown(repr(dict(answer)))}, which holds no text")
        return _answer_text(inner)
    if isinstance(answer, Sequence) and not isinstance(answer, bytes):
        if any(isinstance(x, Sequence) and not isinstance(x, str) for x in answer):
            raise Refused("its answers are lists of lists")
        texts = [x for x in map(_answer_text, (x for x in answer if x is not None)) if x.strip()]
        return Counter(texts).most_common(1)[0][0] if texts else ""
    raise Refused(f"its answer is {shown(repr(answer))}, which is neither text nor a number")


def _with_system(said: Sequence[Said], system: Any, pictures: Pictures) -> list[Said]:
    """`said` with the row's system prompt in front."""
    if not isinstance(system, str | list | tuple):
        raise Refused(f"its system prompt is {shown(repr(system))}, which is no text")
    if isinstance(system, str) and not system.strip():
        return list(said)
    turn = checked(Said("system", pieces_of(system, 1, pictures)), 1)
    if said and said[0].role == "system":
        if said[0].pieces != turn.pieces:
            raise Refused("it has a system prompt and a turn of the system; leave one of them out")
        return list(said)
    return [turn, *said]


def _placed(said: Sequence[Said], shown_there: Sequence[Part], mark: str) -> list[Said]:
    """The turns with each of `shown_there` where the row says, or in front of the first question.

    shown_there: images, or videos; mark: what marks one in the text.
    """
    kind, is_video = ("video", True) if mark == VIDEO_MARK else ("image", False)
    places = [x for turn in said for x in turn.pieces if isinstance(x, Place) and x.is_video == is_video]
    inside = [x for turn in said for x in turn.pieces if not isinstance(x, str | Place)]
    distinct = [x for i, x in enumerate(shown_there) if places or x not in (*inside, *shown_there[:i])]
    if places and len(shown_there) > len(places):  # fields that name one image twice
        distinct = list(dict.fromkeys(shown_there))
    if places and not distinct:
        turn = next(i for i, x in enumerate(said, start=1) if any(p in places for p in x.pieces))
        tag = places[0].tag
        if tag != mark:
            raise Refused(f"turn {turn} has {tag}, which is not read; {IMAGE_MARK} marks an image")
        raise Refused(f"turn {turn} has {_ARTICLES[kind]} {mark}, but the row names no {kind} file")
    if any(x.index is not None for x in places):
        order = [x.index if x.index is not None else -1 for x in places]
        if sorted(order) != list(range(len(distinct))):
            raise Refused(f"its parts show the images {order}, and it has {len(distinct)}")
        distinct = [distinct[x] for x in order]
    if places and len(places) != len(distinct):
        raise Refused(
            f"it has {counted(len(places), 'place')} for {kind}s and {counted(len(distinct), kind)}"
        )
    left = iter(distinct)
    if not places and distinct:
        first = next((i for i, x in enumerate(said) if x.role == "user"), None)
        if first is None:
            raise Refused(f"it has {_ARTICLES[kind]} {kind}, and no turn of the user to show it")
        return [
            Said(x.role, (*distinct, *x.pieces), x.learned) if i == first else x for i, x in enumerate(said)
        ]
    return [Said(x.role, tuple(next(left) if p in places else p for p in x.pieces), x.learned) for x in said]


def _turns(said: Sequence[Said]) -> tuple[Turn, ...]:
    """`said`, all of whose places are filled."""
    return tuple(
        Turn(x.role, tuple(p for p in x.pieces if not isinstance(p, Place)), x.learned) for x in said
    )


def _joined(turns: Sequence[Turn], noted: Noted) -> tuple[Turn, ...]:
    """`turns` with the user's that follow one another as one, where an image is at the seam."""
    found: list[Turn] = []
    for turn in turns:
        before = found[-1] if found else None
        seam = () if before is None else (before.parts[-1], turn.parts[0])
        if before is None or (before.role, turn.role) != ("user", "user") or all(map(_is_text, seam)):
            found.append(turn)
        else:
            found[-1] = Turn("user", (*before.parts, *turn.parts))
            noted.rules.add(TURNS_JOINED)
    return tuple(found)


def _is_text(part: Part) -> bool:
    return isinstance(part, str)


def _check_turns(turns: Sequence[Turn]) -> None:
    """Raises Refused unless, behind a turn of the system, user and assistant take turns, the user first."""
    spoken = [(i, x) for i, x in enumerate(turns, start=1) if i > 1 or x.role != "system"]
    for place, turn in spoken:
        expected = "user" if (place - spoken[0][0]) % 2 == 0 else "assistant"
        if turn.role != expected:
            raise Refused(f"turn {place} is the {turn.role}'s, where the {expected} must speak")
    if not spoken:
        raise Refused("it has no turn but the system's")
