"""AutoRound's int4 with a zero point per group; `iters` 0 rounds to nearest."""

from __future__ import annotations

from typing import Any

import torch

from tests.benchmarks.peers.workers.exchange import group_bits, hand_back, linears, measured, read_job


def main() -> None:
    """Quantize and hand back."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    job = read_job()
    model: Any = job.load()
    rows, group = job.cropped(), job.options["group"]
    with measured(job.device) as cost:
        tool = AutoRound(
            model,
            AutoTokenizer.from_pretrained(job.model),
            scheme={"bits": 4, "group_size": group, "sym": False, "data_type": "int", "act_bits": 16},
            dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows],
            seqlen=rows.shape[1],
            nsamples=len(rows),
            iters=job.options["iters"],
            batch_size=8,
            device_map=0 if job.device.startswith("cuda") else "cpu",
            **job.options.get("more", {}),
        )
        quantized, _ = tool.quantize()
    weights = {name: module.weight for name, module in linears(quantized).items()}
    bits = {name: group_bits(weight.shape[1], 4, group, 20) for name, weight in weights.items()}
    hand_back(job, job.options["name"], weights, bits, cost, "auto-round")


if __name__ == "__main__":
    main()
