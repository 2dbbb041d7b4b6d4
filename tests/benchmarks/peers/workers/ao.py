"""torchao's int4 weight-only: round to nearest, or with HQQ's search of scales."""

from __future__ import annotations

from typing import Any

import torch

from tests.benchmarks.peers.workers.exchange import group_bits, hand_back, linears, measured, read_job


def main() -> None:
    """Quantize and hand back."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
        IntxChooseQParamsAlgorithm,
    )

    job = read_job()
    group, is_hqq = job.options["group"], job.options["algorithm"] != "affine"
    model = job.load()
    names = set(linears(model))
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(group),
        mapping_type=MappingType.SYMMETRIC if is_hqq else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm(job.options["algorithm"]),
    )
    with measured(job.device) as cost:
        quantize_(model, config, filter_fn=lambda module, name: name in names)
    weights: dict[str, Any] = {name: model.get_submodule(name).weight.dequantize() for name in names}
    # Scale in 16-bit; a zero point takes a byte.
    bits = {
        name: group_bits(weight.shape[1], 4, group, 16 if is_hqq else 24) for name, weight in weights.items()
    }
    hand_back(job, job.options["name"], weights, bits, cost, "torchao")


if __name__ == "__main__":
    main()
