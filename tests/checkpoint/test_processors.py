"""Processors beside a checkpoint that is written, and read again from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qprobe.checkpoint.quantize import save_processor
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from tests import families


@pytest.mark.parametrize(
    ("family", "argument"), [("smolvlm", "image_seq_len"), ("internvl", "image_seq_length")]
)
def test_a_processor_without_its_video_half_keeps_its_own_arguments(
    family: str, argument: str, tmp_path: Path
):
    # 169 and 256 are the defaults of the classes, by which images would get too many tokens
    save_processor(families.processor_of(family), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert getattr(load_processor(resolve(str(tmp_path))), argument) == 4
