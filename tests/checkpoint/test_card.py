"""A model card shows foreign text as text."""

from __future__ import annotations

from dataclasses import replace

from markdown_it import MarkdownIt

from qprobe.checkpoint.card import model_card
from qprobe.manifest.records import Compared
from tests.exports.manifests import manifest_of

HOSTILE = "a`b|c<img src=x>\n# [d](javascript:e)"


def test_what_a_manifest_brings_begins_no_line_no_cell_no_link_and_no_tag():
    manifest = manifest_of({"model.a": False, "lm_head": True})
    compared = (Compared(HOSTILE, 9, 0.1, 0.01, True),)
    layers = tuple(replace(x, reason=HOSTILE) for x in manifest.layers)
    made = replace(manifest.made_by, command=HOSTILE, qprobe=HOSTILE)
    hostile = replace(manifest, compared=compared, layers=layers, made_by=made)
    reader = MarkdownIt("commonmark").enable("table")
    kinds = [
        [x.type for x in reader.parse(model_card(one, "LlamaForCausalLM"))] for one in (hostile, manifest)
    ]
    assert kinds[0].count("heading_open") == kinds[1].count("heading_open")
    parsed = reader.parse(model_card(hostile, "LlamaForCausalLM"))
    inner = [child.type for x in parsed for child in x.children or ()]
    assert not {"html_inline", "link_open", "image"} & set(inner)
    assert not [x for x in parsed if x.type == "html_block"]
    cells = [x.content for x in parsed if x.type == "inline" and "chosen" in x.content]
    assert len(cells) == 1 and cells[0].startswith("a") and cells[0].endswith(" (chosen)")
