"""JSON that somebody else may have written, as Python values of a known type."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NoReturn, TypeVar

import msgspec

from qprobe.system.wording import is_hidden, shortened

FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that spreadsheets compute (OWASP, CSV injection)."""

T = TypeVar("T")

_PLACE = re.compile(r"^(?P<said>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)  # of msgspec's messages
_LACKS = re.compile(r"Object missing required field `(.+)`")
_STEP = re.compile(r"\.([^.\[]+)|\[([0-9]+)\]")
_SHOWN = 60  # characters of a wrong value that a message repeats


def strict_json(data: bytes) -> Any:
    """The JSON value in `data`.

    Raises ValueError for what Python's reader lets pass or chokes on: NaN, infinities, numbers beyond
    double precision, a key given twice, nesting without end.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite_number,
            object_pairs_hook=_object_without_repeats,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def decode(kind: type[T], value: Any, where: str) -> T:
    """The JSON value `value` as a `kind`: a dataclass, or what dataclasses are made of.

    Nothing is converted but lists to tuples and whole numbers to floats. Every key of a dataclass must be
    there, unless its default is None, and no other. Raises ValueError naming the place, from `where` on,
    with what was wanted and what is there.
    """
    try:
        found = msgspec.convert(value, type=kind, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(_explained(str(error), value, where)) from None
    _check_keys(found, value, where)
    return found


def check_visible(value: Any, where: str) -> None:
    """Raises ValueError, naming the place, if a text in the JSON `value` holds a character that is not seen.

    It would begin a line of its own, or worse, wherever the text is shown or written.
    """
    if isinstance(value, str) and not value.isprintable() and any(map(is_hidden, value)):
        shown = shortened(ascii(value), _SHOWN)
        raise ValueError(f"{where} holds a character that is not printable ({shown})")
    if isinstance(value, dict):
        for name, one in value.items():
            check_visible(name, f"a name in {where}")
            check_visible(one, f"{where}.{name}")
    elif isinstance(value, list):
        for index, one in enumerate(value):
            check_visible(one, f"{where}[{index}]")


def check_names(names: Iterable[str], where: str) -> None:
    """Raises ValueError if one of `names` can be no module's: a table would compute what begins so."""
    for name in names:
        if name.startswith(FORMULAS):
            raise ValueError(f"{where}: {shortened(ascii(name), _SHOWN)} is the name of no layer")


def _explained(said: str, value: Any, where: str) -> str:
    """msgspec's message with the place's name and what stands there."""
    match = _PLACE.match(said)
    assert match is not None
    what, path = match["said"], match["path"] or ""
    lacks = _LACKS.fullmatch(what)
    if lacks:
        return f"{where}{shortened(path, 120)} lacks {lacks[1]}"
    said = shortened(f"{what[:1].lower()}{what[1:]}", 200)
    return f"{where}{shortened(path, 120)} is {_shown(value, path)} ({said})"


def _shown(value: Any, path: str) -> str:
    """The start of what stands at `path` in `value`."""
    for key, index in _STEP.findall(path):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and index:
            value = value[int(index)]
        else:  # below a key that msgspec does not name
            return "wrong"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _check_keys(found: Any, value: Any, where: str) -> None:
    """Raises ValueError unless the objects in `value` have the keys of the dataclasses in `found`.

    msgspec ignores a key that a dataclass does not have.
    """
    if is_dataclass(found):
        names = {x.name for x in fields(found)}
        needed = {x.name for x in fields(found) if x.default is not None or x.default_factory is not MISSING}
        for problem, keys in (("lacks", needed - value.keys()), ("has the unknown", value.keys() - names)):
            if keys:
                raise ValueError(f"{where} {problem} {shortened(', '.join(sorted(keys)), 200)}")
        for name in value:
            _check_keys(getattr(found, name), value[name], f"{where}.{name}")
    elif isinstance(found, list | tuple):
        for index, (one, raw) in enumerate(zip(found, value, strict=True)):
            _check_keys(one, raw, f"{where}[{index}]")
    elif isinstance(found, dict):
        for name, one in found.items():
            _check_keys(one, value[name], f"{where}.{shortened(name, 60)}")


def _refuse_constant(token: str) -> NoReturn:
    raise ValueError(f"{token} is no JSON number")


def _finite_number(token: str) -> float:
    number = float(token)
    if not math.isfinite(number):
        raise ValueError(f"the number {shortened(token, 40)} is too large")
    return number


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shortened(repr(repeated), _SHOWN)} stands twice in one object")
    return result
