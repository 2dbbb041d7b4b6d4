"""A scan of videos: of the frames, in every layer that reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import qprobe
from tests import tiny
from tests.inputs.videos import video_processor
from tests.scanning.asked import TinyFolder


@pytest.mark.slow
def test_videos_are_measured_as_images_are(tiny_folder: TinyFolder, tmp_path: Path):
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        tiny_folder("qwen2_vl"), dtype="float32"
    )
    rows = [
        {"id": str(i), "video": tiny.frames(i, i + 1), "prompt": f"what moves in {i}?", "answer": "a cat"}
        for i in range(3)
    ]
    run = qprobe.scan(model, processor=video_processor(), data=rows, out=tmp_path / "run", samples=3)
    table = run.layers.set_index("layer")
    # Two samples are measured and one is held out: 2 x 4 patches of each, four of which make a token.
    assert table.loc["model.visual.blocks.0.attn.qkv", ["samples", "tokens"]].tolist() == [2, 16]
    assert table.loc["model.visual.merger.mlp.0", "tokens"] == 4
    measured = table.drop("lm_head")
    assert (measured["activation_nmse"] > 0).all() and measured["sensitivity_kl"].abs().min() > 0
