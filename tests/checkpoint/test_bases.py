"""Calibrated weights that the base of an adapter had, and manifests without any."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qprobe.checkpoint.adapters.effect import _codes
from qprobe.checkpoint.adapters.lora import Adapter
from qprobe.checkpoint.starts.corrected import correction_of
from qprobe.errors import ManifestError
from qprobe.formats.codes_file import FILE_NAME, sha256_of, write_codes
from qprobe.formats.nf4 import Nf4
from qprobe.manifest.write import write_manifest
from qprobe.records import CodesFile
from tests.checkpoint.manifests import manifest_for

TinyFolder = Callable[[str], Path]


def test_a_corrected_start_without_calibrated_weights_says_what_to_do(
    tiny_folder: TinyFolder, tmp_path: Path
):
    said = r"needs calibrated weights, which the manifest has not\. Scan with --format nf4-calibrated"
    with (
        pytest.raises(ManifestError, match=said),
        correction_of(manifest_for(tiny_folder("llama")), tmp_path),
    ):
        pass


def test_an_adapter_is_held_against_the_calibrated_weights_of_its_own_folder(
    tiny_folder: TinyFolder, tmp_path: Path
):
    adapter = Adapter(tmp_path, {}, {})
    with ExitStack() as stack:
        assert _codes(adapter, stack) is None
        plain = manifest_for(tiny_folder("llama"))
        write_manifest(tmp_path / "skiplist.json", plain)
        assert _codes(adapter, stack) is None
        layers = [x for x in plain.layers if x.is_four_bit]
        weights = {x.name: Nf4().stored(torch.full(x.shape, 0.5 + i)) for i, x in enumerate(layers)}
        write_codes(tmp_path / FILE_NAME, weights)
        codes = CodesFile(FILE_NAME, sha256_of(tmp_path / FILE_NAME))
        calibrated = replace(plain, format=replace(plain.format, name="nf4-calibrated"), codes=codes)
        write_manifest(tmp_path / "skiplist.json", calibrated)
        found = _codes(adapter, stack)
        assert found is not None and found.layers == weights.keys()
