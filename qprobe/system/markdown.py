"""Somebody else's text in Markdown: it is read as text, whatever it holds."""

from __future__ import annotations

import re

from qprobe.system.wording import visible

_MARKS = re.compile(r"([\\`*\[\]<>|~&])")


def plain(text: str) -> str:
    """`text` on one line, where nothing is a mark of Markdown or HTML, in tables too."""
    return _MARKS.sub(r"\\\1", visible(text))


def code(text: str) -> str:
    """`text` on one line as code, with a fence that is longer than any row of backticks in it."""
    shown = visible(text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}"
