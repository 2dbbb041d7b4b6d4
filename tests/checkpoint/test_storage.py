"""Stored bytes are sums of storage: shared storage once, code tables not, persistent buffers yes."""

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qprobe.checkpoint.storage import StoredBytes, stored_bytes


def test_known_bytes_of_one_4bit_layer():
    # 100 x 60 = 6000 weights: 3000 B of codes; ceil(6000 / 64) = 94 one-byte scales in one nested block
    # of 256 (4 B); a bias of 100 bf16 values (200 B).
    layer = Linear4bit(60, 100, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer = layer.to(torch.bfloat16).to("cpu")
    assert layer.weight.quant_state.nested
    assert stored_bytes(layer) == StoredBytes(parameter_bytes=3200, total_bytes=3200 + 94 + 4)


def test_known_bytes_without_double_quantization():
    layer = Linear4bit(60, 100, bias=False, compress_statistics=False, quant_type="nf4")
    layer = layer.to(torch.bfloat16).to("cpu")
    assert stored_bytes(layer) == StoredBytes(parameter_bytes=3000, total_bytes=3000 + 4 * 94)


def test_shared_storage_counts_once_and_buffers_if_they_are_saved():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False))
    model[1].weight = nn.Parameter(model[0].weight[:])  # two parameters, one storage
    model.register_buffer("saved", torch.zeros(3))
    model.register_buffer("recomputed", torch.zeros(5), persistent=False)
    assert stored_bytes(model) == StoredBytes(parameter_bytes=128, total_bytes=128 + 12)
