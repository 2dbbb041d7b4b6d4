"""What is said of files that hold weights in several dtypes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from qprobe.loading.source import Source
from qprobe.loading.stored import cached_folder, mixed_note
from qprobe.models.headers import SINGLE
from tests.scanning.asked import options, scan

BF16, F32, F8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


def noted(folder: Path, *dtypes: torch.dtype) -> str | None:
    """The note on matrices of these dtypes, beside what is no matrix of floats."""
    tensors = {f"{i}.weight": torch.zeros(2, 2).to(dtype) for i, dtype in enumerate(dtypes)}
    beside = {"norm": torch.zeros(4), "ids": torch.zeros(2, 2, dtype=torch.int64)}
    save_file({**tensors, **beside}, folder / SINGLE)
    return mixed_note(folder, "bfloat16")


def test_matrices_of_several_dtypes_are_counted_the_most_frequent_first(tmp_path: Path):
    assert noted(tmp_path, F32, BF16, BF16, torch.float16) == (
        "The files hold matrices in BF16 (2 tensors), F32 (1 tensor), F16 (1 tensor); all were read in "
        "bfloat16."
    )


def test_one_dtype_says_nothing_unless_it_has_8_bits(tmp_path: Path):
    for dtype in (BF16, F32, torch.float16):
        assert noted(tmp_path, dtype, dtype) is None
    said = noted(tmp_path, F8)
    assert said is not None and "F8_E4M3 (1 tensor)" in said and "without the scales" in said
    assert mixed_note(tmp_path / "none", "bfloat16") is None


def test_files_are_where_the_source_is_or_in_the_cache_and_nothing_is_fetched(tmp_path: Path):
    def source(where: str) -> Source:
        return Source(id=where, location=where, revision=None)

    assert cached_folder(source(str(tmp_path))) == tmp_path
    assert cached_folder(source("somebody/not-here")) is None


@pytest.mark.slow
def test_a_scan_notes_it(tiny_folder: Callable[[str], Path], tmp_path: Path):
    folder = copytree(tiny_folder("llama"), tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    name = next(x for x in tensors if x.endswith("up_proj.weight"))
    save_file({**tensors, name: tensors[name].float()}, folder / SINGLE, {"format": "pt"})
    asked = {"measures": ("activation",), "samples": 4, "batch_size": 2, "max_new_tokens": 2}
    notes = scan(**options(folder, tmp_path / "run", **asked)).notes
    assert any(x.endswith("F32 (1 tensor); all were read in bfloat16.") for x in notes)
