"""Lists of turns, in the ways in which people write them -> turns whose images may stand elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qprobe.data.content import Piece, Place, pieces_of
from qprobe.data.pictures import Pictures
from qprobe.data.reasons import Refused, shown
from qprobe.records import Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
PAIRS = "texts"  # of {"user", "assistant"}, as The Cauldron has them
_SIDES = ("user", "assistant")  # of a pair
_TURN_KEYS = ("role", "from", "content", "value", "weight")
_IMAGES = ("image", "images")  # beside the content of a turn, as Ollama has them
_UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Said:
    """A turn whose images may still stand elsewhere in the row."""

    role: Role
    pieces: tuple[Piece, ...]
    learned: bool = True


@dataclass
class Noted:
    """What is found on the way through one row. is_silent: nothing but `DEFAULT_PROMPT` is said in it."""

    unread: set[str] = field(default_factory=set)
    rules: set[str] = field(default_factory=set)
    is_silent: bool = False


def is_turns(value: Any) -> bool:
    """Whether `value` is a list of turns."""
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(x, Mapping) and ("role" in x or "from" in x) for x in value)
    )


def is_pairs(value: Any) -> bool:
    """Whether `value` is a list of {"user", "assistant"}."""
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(x, Mapping) and {*_SIDES} <= {*x} for x in value)
    )


def turns_of_pairs(pairs: Sequence[Mapping[str, Any]], noted: Noted) -> list[dict[str, Any]]:
    """The turns of a list of {"user", "assistant"}."""
    noted.unread |= {f"{PAIRS}[].{shown(str(x))}" for pair in pairs for x in pair if x not in _SIDES}
    return [{"role": side, "content": pair[side]} for pair in pairs for side in _SIDES]


def turns_of_history(value: Any) -> list[dict[str, Any]] | None:
    """The turns of a list of [question, answer], as LLaMA-Factory has them; None for anything else."""
    lists = value if isinstance(value, list | tuple) else ()
    pairs = [x for x in lists if isinstance(x, list | tuple) and len(x) == 2]
    if not lists or len(pairs) < len(lists) or not all(isinstance(x, str) for pair in pairs for x in pair):
        return None
    return [{"role": side, "content": x} for pair in pairs for side, x in zip(_SIDES, pair, strict=True)]


def turns_of(listed: Any, name: str, pictures: Pictures, noted: Noted, before: int = 0) -> list[Said]:
    """The turns of a list of {"role", "content"} or {"from", "value"}; `before` others precede them.

    name: of the field that holds them. Raises Refused for what is no such list, or holds what is not read.
    """
    if not isinstance(listed, Sequence) or isinstance(listed, str | bytes):
        raise Refused(f"its {name} are not a list of objects")
    if not listed:
        raise Refused(f"its {name} are empty")
    if not all(isinstance(x, Mapping) for x in listed):
        raise Refused(f"its {name} are not a list of objects")
    said = []
    for place, turn in enumerate(listed, start=before + 1):
        role = _one_of(turn, ("role", "from"), place)
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(f"turn {place} is from {shown(repr(role))}; known are {', '.join(ROLES)}")
        for key, value in turn.items():
            if key in (*_TURN_KEYS, *_IMAGES) or value is None or value == "" or value == []:
                continue
            if key in _UNREAD:
                raise Refused(f"turn {place} has {key}, which is not read there")
            noted.unread.add(f"{name}[].{shown(str(key))}")
        pieces = pieces_of(_one_of(turn, ("content", "value"), place), place, pictures)
        pieces = _with_images(pieces, turn, place, pictures)
        said.append(checked(Said(ROLES[role], pieces, _is_learned(turn.get("weight"), place)), place))
    return said


def checked(said: Said, place: int) -> Said:
    """`said`. Raises Refused if it is empty, or another than the user shows an image."""
    if said.role != "user" and not all(isinstance(x, str) for x in said.pieces):
        raise Refused(f"turn {place} of the {said.role} has an image or a video; only the user shows one")
    if not said.pieces:
        raise Refused(f"turn {place} of the {said.role} is empty")
    return said


def _with_images(
    pieces: tuple[Piece, ...], turn: Mapping[str, Any], place: int, pictures: Pictures
) -> tuple[Piece, ...]:
    """`pieces` with the images that stand beside them in the turn: where it marks them, or in front."""
    given = [turn[x] for x in _IMAGES if turn.get(x) not in (None, "", [])]
    if not given:
        return pieces
    several = given[0] if isinstance(given[0], list | tuple) else given
    marks = [x for x in pieces if isinstance(x, Place) and not x.is_video]
    if len(given) > 1 or (marks and (len(marks) != len(several) or any(x.index is not None for x in marks))):
        raise Refused(f"turn {place} has other images than it has places for")
    found = iter([pictures.find(x) for x in several])
    if not marks:
        return (*found, *pieces)
    return tuple(next(found) if isinstance(x, Place) and not x.is_video else x for x in pieces)


def _one_of(turn: Mapping[str, Any], keys: tuple[str, str], place: int) -> Any:
    """What stands under one of two spellings of a key; tables hold both, with null for the one not used."""
    given = [x for x in keys if turn.get(x) is not None]
    if len(given) > 1:
        raise Refused(f"turn {place} has both {keys[0]} and {keys[1]}; leave one of them out")
    return turn[given[0]] if given else None


def _is_learned(weight: Any, place: int) -> bool:
    if weight is None or (weight in (0, 1) and isinstance(weight, int | float)):
        return weight is None or bool(weight)
    raise Refused(f"turn {place} has the weight {shown(repr(weight))}; known are 0 and 1")
