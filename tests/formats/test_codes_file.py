"""The file of 4-bit weights, joined from several."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
from safetensors.torch import save, save_file

from qprobe.errors import ManifestError
from qprobe.formats.codes_file import join_codes, open_codes, write_codes
from qprobe.formats.nf4 import Nf4
from qprobe.records import CodesFile


def tensors(seed: int, size: int) -> dict[str, torch.Tensor]:
    """Codes of odd length and scales, so that files put end to end would lie askew."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer{seed}.weight": torch.randint(0, 256, (size, 1), dtype=torch.uint8, generator=generator),
        f"layer{seed}.weight.quant_map": torch.randn(16, generator=generator),
        f"a\u00e9{seed}.weight.absmax": torch.randn(3, 1, generator=generator),
    }


def test_joined_files_have_the_bytes_that_safetensors_writes_of_all_tensors(tmp_path):
    paths, every = [], {}
    for seed, size in ((2, 7), (1, 4), (3, 13)):
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors(seed, size), paths[-1])
        every |= tensors(seed, size)
    joined = join_codes(tmp_path / "all.safetensors", paths)
    assert (tmp_path / "all.safetensors").read_bytes() == save(every)
    assert joined == CodesFile("all.safetensors", hashlib.sha256(save(every)).hexdigest())


def test_a_damaged_part_is_named_and_nothing_is_left(tmp_path):
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for seed, path in enumerate(paths):
        save_file(tensors(seed, 5), path)
    paths[1].write_bytes(paths[1].read_bytes()[:-3])
    with pytest.raises(ManifestError, match=r"2.safetensors is damaged"):
        join_codes(tmp_path / "all.safetensors", paths)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["1.safetensors", "2.safetensors"]


def test_a_pipe_in_the_place_of_weights_is_not_opened(tmp_path):
    path = tmp_path / "codes.safetensors"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)  # else opening the pipe would wait for one
    with pytest.raises(ManifestError, match="is a pipe"), open_codes(path):
        pass
    os.close(writer)


def test_a_damaged_quantization_state_is_named(tmp_path):
    path = tmp_path / "codes.safetensors"
    write_codes(path, {"a": Nf4().stored(torch.randn(64, 64))})
    path.write_bytes(path.read_bytes().replace(b'"blocksize"', b"#blocksize#"))
    with (
        open_codes(path) as file,
        pytest.raises(ManifestError, match="the quantization state of a is damaged"),
    ):
        file.stored("a", "cpu")
