"""ModelOpt's auto_quantize: which linears it leaves in 16-bit beside int4, by effective bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.peers.workers.exchange import hand_back_lists, linears, measured, read_job

INT4_BITS, FULL_BITS, GROUP = 4.0, 16.0, 64
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def effective_bits(model: nn.Module, share: float) -> float:
    """`share` of the saved bits as ModelOpt counts: no scales, but what stays in 16-bit, as the head."""
    counted = (nn.Linear, *CONVOLUTIONS)
    sizes = {name: x.weight.numel() for name, x in model.named_modules() if isinstance(x, counted)}
    chosen = sum(sizes[name] for name in linears(model))
    stored = chosen * (INT4_BITS + share * (FULL_BITS - INT4_BITS))
    return (stored + (sum(sizes.values()) - chosen) * FULL_BITS) / sum(sizes.values())


def int4() -> dict[str, Any]:
    """Weights in int4 with a scale per group, and nothing else."""
    import modelopt.torch.quantization as mtq

    config = mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG
    rows = [dict(row) for row in config["quant_cfg"]]
    for row in rows:
        if row.get("quantizer_name") == "*weight_quantizer":
            row["cfg"] = {"num_bits": 4, "block_sizes": {-1: GROUP, "type": "static"}}
    return {**config, "quant_cfg": rows}


def next_token_loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of the passage itself, as ModelOpt's examples take it; no token stands for an image."""
    logits, ids = output.logits[0, :-1], batch["input_ids"][0, 1:]
    return torch.nn.functional.cross_entropy(logits, ids.where(ids < logits.shape[-1], -100))


def left_alone(model: nn.Module) -> list[str]:
    """What ModelOpt would quantize beside the linears, and the head."""
    return ["*lm_head*", *(name for name, x in model.named_modules() if isinstance(x, CONVOLUTIONS))]


def main() -> None:
    """Choose for each budget and hand back; the scores are estimated once and kept in a file."""
    import modelopt.torch.quantization as mtq

    job = read_job()
    names = list(linears(job.load()))
    gradient = job.options["method"] == "gradient"
    lists = {}
    with measured(job.device) as cost:
        for share in job.options["shares"]:
            model = job.load()
            model, _ = mtq.auto_quantize(
                model,
                constraints={"effective_bits": effective_bits(model, share)},
                quantization_formats=[int4()],
                data_loader=job.batches(),
                forward_step=(lambda m, x: m(**x)) if gradient else (lambda m, x: m(**x).logits),
                loss_func=next_token_loss if gradient else None,
                disabled_layers=left_alone(model),
                num_calib_steps=len(job.inputs),
                num_score_steps=len(job.inputs),
                method=job.options["method"],
                checkpoint=str(job.out / f"{job.options['method']}.pt"),
            )
            is_kept = {name: not model.get_submodule(name).weight_quantizer.is_enabled for name in names}
            lists[str(share)] = [name for name in names if is_kept[name]]
    hand_back_lists(job, job.options["name"], lists, cost, "nvidia-modelopt")


if __name__ == "__main__":
    main()
