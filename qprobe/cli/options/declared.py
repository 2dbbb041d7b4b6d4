"""The option of a command line that follows from a declaration in `qprobe.options`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from qprobe.options import EMPTY_PATH, flag_of, words_of

Command = Callable[..., Any]


class _Path(click.Path):
    """A path; an empty one, which `Path` would take for the folder that one is in, is wrong usage."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail(EMPTY_PATH, param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
NOT_NEGATIVE = click.IntRange(min=0)


def option(declaration: type, name: str, **settings: Any) -> Callable[[Command], Command]:
    """The click option of the field `name` of the options `declaration`: its flag, default, words or type.

    settings: of `click.option`, beside or in place of what follows from the field.
    """
    field = next(x for x in fields(declaration) if x.name == name)
    kind = get_type_hints(declaration)[name]
    found: dict[str, Any] = {"type": _type(kind)}
    if field.default is MISSING:
        found |= {"required": True}
    elif field.default is False:
        found = {"is_flag": True}
    elif field.default is not None:
        found |= {"default": field.default, "show_default": True}
    return click.option(flag_of(name), name, **found | settings)


def options(*several: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """What adds `several` options to a command, shown in their order."""

    def decorate(function: Command) -> Command:
        for one in reversed(several):
            function = one(function)
        return function

    return decorate


def _type(kind: Any) -> Any:
    """What click reads a field of the type `kind` as; text where nothing else is said."""
    words = words_of(kind)
    parts = {kind, *get_args(kind)}
    if words:
        return click.Choice(list(words))
    if Path in parts:
        return PATH
    return next((x for x in (int, float) if x in parts and str not in parts), None)
