"""What a scan keeps of its samples for a reader: texts, small pictures, and how images were cut."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from qprobe.loading.reference import load_reference
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.outputs import OutputErrors, run_model
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec
from qprobe.report.worst import patch_at
from qprobe.runs.folder import RunFolder
from qprobe.runs.shown import FILE
from qprobe.scanning.show import THUMBNAIL_PX, show_samples, shown_samples, thumbnail
from tests import tiny


def subject(tiny_folder: Callable[[str], Path], name: str) -> Subject:
    return subject_of(load_reference(str(tiny_folder(name)), "cpu"), FormatSpec())


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.VISION_NAMES)
def test_tokens_are_those_of_the_sequence_and_vision_tokens_have_a_place(
    name: str, tiny_folder: Callable[[str], Path]
):
    seen = subject(tiny_folder, name)
    batch = seen.encode(seen.groups(tuple(tiny.questions(name, 2, answer="a red bar")), 2)[0])
    errors = OutputErrors(batch, seen.layers, seen.dequantized, seen.quantized, doubled=False)
    with torch.no_grad(), replaced_forwards(seen.modules, errors.forward):
        run_model(seen.model, batch)
    rows = errors.rows()
    for sample in shown_samples(seen, batch):
        mine = rows[rows["sample"] == sample.id].set_index("layer")["tokens"]
        counts = {
            kind: [n for x, n in mine.items() if seen.layers[x].reads == kind] for kind in ("text", "vision")
        }
        assert len(sample.tokens) in counts["text"] and None in sample.tokens
        assert "red" in "".join(text or "" for text in sample.tokens)
        # every layer of the vision tower, before and after patches are merged
        assert sample.grid is not None and counts["vision"]
        assert all(patch_at(sample.grid, 1, int(n)) is not None for n in counts["vision"])


def test_a_text_model_has_tokens_and_no_picture(tiny_folder: Callable[[str], Path], tmp_path: Path):
    seen = subject(tiny_folder, "llama")
    samples = tuple(tiny.questions("llama", 3))
    groups = seen.groups(samples, 2)
    show_samples(seen, groups, RunFolder(tmp_path))
    found = RunFolder(tmp_path).samples
    assert list(found) == [s.id for group in groups for s in group]
    for sample in samples:
        shown = found[sample.id]
        assert shown.prompt == sample.prompt and shown.thumbnail is None and shown.grid is None
        assert shown.tokens and None not in shown.tokens
    before = (tmp_path / FILE).stat().st_mtime_ns
    show_samples(seen, groups, RunFolder(tmp_path))  # a resumed scan does not write them again
    assert (tmp_path / FILE).stat().st_mtime_ns == before


def test_a_thumbnail_is_a_small_jpeg_of_the_same_shape():
    drawn = io.BytesIO()
    Image.new("RGBA", (600, 300), (255, 0, 0, 128)).save(drawn, format="PNG")
    uri, size = thumbnail(drawn.getvalue())
    assert uri is not None and uri.startswith("data:image/jpeg;base64,") and size == (600, 300)
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as small:
        assert small.format == "JPEG" and small.size == (THUMBNAIL_PX, THUMBNAIL_PX // 2)
    assert thumbnail(None) == (None, None)
