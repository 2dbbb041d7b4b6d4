"""report/index.html: one file without any reference to another, from the parts in `page/`.

The charts are SVG drawn by a few hundred lines of our own. plotly.js would add 4.5 MB to every page, does not
follow the reader's light or dark scheme, and its points are beyond the keyboard.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PARTS = Path(__file__).with_name("page")
_SCRIPTS = ("core.js", "charts.js", "detail.js", "budget.js", "frontier.js", "table.js", "answers.js")


def page_html(data: Mapping[str, Any], title: str) -> str:
    """The page that shows `data` (see `qprobe.report.payload`)."""
    parts = {
        "title": html.escape(title),
        "style": _read("style.css"),
        "data": script_json(data),
        "script": "\n".join(map(_read, _SCRIPTS)),
    }
    before, *rest = _read("page.html").split("{{")
    pieces = [before]
    for piece in rest:  # not str.replace: the data may hold a placeholder of its own
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    return "".join(pieces)


def script_json(value: Any) -> str:
    """`value` as JSON that may stand inside a script element: no `<`, `>` or `&` is left in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()


def _read(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")
