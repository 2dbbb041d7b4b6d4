"""Foreign text in a model card is text: CommonMark's own reader finds no mark in it."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from qprobe.system.markdown import code, plain

HOSTILE = [
    "`a`", "``", "a|b", "<script>x</script>", "[a](javascript:x)", "![a](b)", "*a* **b**", "\\", "a\n# b",
    "&lt;", "\x1b[2J", "~~a~~", "a\u202eb",
]  # fmt: skip


def inline(text: str) -> list[tuple[str, str]]:
    """(kind, text) of the parts of a table's only cell."""
    (table,) = [
        x for x in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text) if x.children
    ]
    return [(x.type, x.content) for x in table.children or ()]


@pytest.mark.parametrize("text", HOSTILE)
def test_plain_text_has_no_marks_and_stays_on_its_line(text: str):
    kinds = inline(f"x {plain(text)} y")
    assert {kind for kind, _ in kinds} <= {"text", "text_special"}
    seen = "".join(x for _, x in kinds)
    assert seen.isprintable() and seen.startswith("x ") and seen.endswith(" y")
    if text.isprintable():
        assert seen == f"x {text} y"


@pytest.mark.parametrize("text", [x for x in HOSTILE if x.isprintable()])
def test_code_is_one_span_that_holds_the_text(text: str):
    assert inline(f"x {code(text)} y") == [("text", "x "), ("code_inline", text), ("text", " y")]
