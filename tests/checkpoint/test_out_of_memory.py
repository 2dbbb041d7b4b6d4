"""Where memory runs out, `quantize` ends with one sentence, and nothing of the folder is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qprobe.cli import main
from qprobe.manifest.write import write_manifest
from tests.checkpoint.manifests import every_third, manifest_for

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"
DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
PLACES = {
    "the weights are loaded": ("qprobe.checkpoint.quantize.dynamic_4bit", DEVICE, "The device"),
    "shards are written": ("transformers.PreTrainedModel.save_pretrained", MemoryError(), "This machine"),
    "the processor is saved": (
        "qprobe.checkpoint.quantize.save_processor",
        OSError(12, "Cannot allocate memory"),
        "This machine",
    ),
    "its files are read": ("qprobe.checkpoint.quantize.audit_files", RuntimeError(ALLOCATOR), "This machine"),
    "it is loaded as users do": (
        "qprobe.checkpoint.auditing.loaded.load_plainly",
        RuntimeError(ALLOCATOR),
        "This machine",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_left_of_a_checkpoint_that_memory_does_not_suffice_for(
    place: str, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, error, what = PLACES[place]

    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    folder = tiny_folder("llama")
    write_manifest(tmp_path / "skiplist.json", manifest_for(folder, every_third(folder)))
    monkeypatch.setattr(path, fail)
    out = tmp_path / "there" / "out"
    done = CliRunner().invoke(
        main,
        [
            "quantize",
            str(tmp_path / "skiplist.json"),
            "--out",
            str(out),
            "--model",
            str(folder),
            "--device",
            "cpu",
        ],
    )
    assert done.exit_code == 1
    (said,) = done.stderr.splitlines()[-1:]
    assert said.startswith(f"Error: {what} ran out of memory") and said.endswith("Pass another --device.")
    assert list(out.parent.iterdir()) == []
