"""llama.cpp's formats by ggml's own code in xllamacpp's wheel, with importance matrices.

A mix such as Q4_K_M follows `llama_tensor_get_type` of llama.cpp for a Llama model: more bits for the values'
projection and down projections of some blocks, and another format where the rows are no multiple of 256.
A vision tower and its projector stay in 16-bit, as in llama.cpp, where they are a file of their own.
"""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.peers.workers.exchange import hand_back, input_energy, linears, measured, read_job

# Where rows are no multiple of 256: `tensor_type_fallback` of llama.cpp.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
# (format of most tensors, of those that matter most)
MIXES = {"Q4_K_M": ("Q4_K", "Q6_K"), "Q5_K_M": ("Q5_K", "Q6_K")}
SUPER_BLOCK = 256


def more_bits(block: int, blocks: int) -> bool:
    """Whether the mix gives this block more bits: `use_more_bits` of llama.cpp."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def format_of(name: str, columns: int, mix: str, blocks: int) -> str:
    """The format of one linear."""
    usual, better = MIXES.get(mix, (mix, mix))
    found = re.search(r"\.layers\.(\d+)\.", name)
    if found is None or "vision" in name:
        return "F16"
    block = int(found[1])
    is_better = name.endswith(("v_proj", "down_proj")) and more_bits(block, blocks)
    wanted = better if is_better else usual
    return FALLBACK[wanted] if wanted in FALLBACK and columns % SUPER_BLOCK else wanted


def library() -> Any:
    """ggml inside xllamacpp's extension."""
    spec = find_spec("xllamacpp")
    assert spec is not None and spec.submodule_search_locations
    ggml = ctypes.CDLL(f"{spec.submodule_search_locations[0]}/xllamacpp.abi3.so")
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return ggml


def read_back(ggml: Any, weight: Tensor, energy: Tensor | None, kind: str) -> tuple[Tensor, float]:
    """(what `kind` stores of `weight`, bits per weight)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows, columns = weight.shape
    source = np.ascontiguousarray(weight.detach().float().cpu().numpy())
    target = np.zeros((rows, columns // block * size), dtype=np.uint8)
    matrix = None if energy is None else np.ascontiguousarray(energy.float().cpu().numpy())
    written = ggml.ggml_quantize_chunk(
        GGMLQuantizationType[kind].value, source.ctypes.data, target.ctypes.data, 0, rows, columns,
        None if matrix is None else matrix.ctypes.data,
    )  # fmt: skip
    assert written == target.nbytes
    back = dequantize(target, GGMLQuantizationType[kind])
    return torch.from_numpy(np.asarray(back, dtype=np.float32)).view(rows, columns), 8 * size / block


def main() -> None:
    """Quantize to each format and hand back."""
    job = read_job()
    model = job.load()

    def run() -> None:
        with torch.no_grad():
            for inputs in job.batches():
                model(**inputs)

    with measured(job.device) as seeing:
        energies = input_energy(model, run)
    ggml, blocks = library(), model.config.get_text_config().num_hidden_layers
    for mix in job.options["formats"]:
        with measured(job.device) as cost, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            tasks = {
                name: pool.submit(
                    read_back,
                    ggml,
                    module.weight,
                    energies[name],
                    format_of(name, module.in_features, mix, blocks),
                )
                for name, module in linears(model).items()
            }
            found = {name: task.result() for name, task in tasks.items()}
        cost.seconds += seeing.seconds
        weights = {name: weight for name, (weight, _) in found.items()}
        bits = {name: of_one for name, (_, of_one) in found.items()}
        hand_back(job, f"llama.cpp {mix}", weights, bits, cost, "xllamacpp")


if __name__ == "__main__":
    main()
