"""optimum-quanto's qint4: round to nearest, float scale and shift per group."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.peers.workers.exchange import group_bits, hand_back, linears, measured, read_job


def main() -> None:
    """Quantize and hand back."""
    from optimum.quanto import freeze, qint4, quantize

    job = read_job()
    model = job.load()
    names = list(linears(model))
    with measured(job.device) as cost:
        quantize(model, weights=qint4, exclude="lm_head")
        freeze(model)
    weights, bits = {}, {}
    for name in names:
        stored: Any = model.get_submodule(name).weight
        weights[name] = stored.dequantize()
        # Scale and shift in 16-bit, as they are kept beside a 16-bit model.
        bits[name] = group_bits(weights[name].shape[1], 4, stored._group_size, 32)
    hand_back(job, "quanto qint4", weights, bits, cost, "optimum-quanto")


if __name__ == "__main__":
    main()
