"""llm-compressor's GPTQ and AWQ at int4 with a zero point per group, by its own recipes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.peers.workers.exchange import (
    group_bits,
    hand_back,
    has_images,
    linears,
    measured,
    read_job,
)


def recipe(method: str, group: int) -> list[Any]:
    """What the documentation of llm-compressor recommends for `method`."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=group)
    asked: dict[str, Any] = {
        "config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if method == "gptq":
        return [GPTQModifier(actorder="static", **asked)]
    if method == "awq":
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**asked)]
    return [QuantizationModifier(**asked)]


def read_back(module: Any) -> Tensor:
    """What a compressed checkpoint of `module` would hold, in float32."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    return fake_quantize(
        module.weight, module.weight_scale, module.weight_zero_point, module.quantization_scheme.weights
    )


def as_tensors(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One sample, as it was handed over."""
    (row,) = rows
    return {key: torch.tensor(value) for key, value in row.items()}


def main() -> None:
    """Quantize and hand back, with the norms that AWQ scales."""
    from datasets import Dataset
    from llmcompressor import oneshot

    job = read_job()
    model = job.load()
    method, group = job.options["method"], job.options["group"]
    names = list(linears(model))
    before = {name: value.detach().clone() for name, value in model.named_parameters() if "norm" in name}
    rows = [{key: x.tolist() for key, x in one.items()} for one in job.inputs]
    with measured(job.device) as cost:
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=recipe(method, group),
            num_calibration_samples=len(rows),
            max_seq_length=max(one["input_ids"].shape[1] for one in job.inputs),
            shuffle_calibration_samples=False,
            data_collator=as_tensors,
            # A vision-language model is not traced: all its Hessian matrices are held at once instead.
            pipeline="basic" if has_images(job.model) else "sequential",
        )
    with torch.no_grad():
        weights = {name: read_back(model.get_submodule(name)) for name in names}
    bits = {name: group_bits(weight.shape[1], 4, group, 20) for name, weight in weights.items()}
    after = dict(model.named_parameters())
    scaled = {name: after[name] for name, value in before.items() if not torch.equal(after[name], value)}
    hand_back(job, job.options["name"], {**weights, **scaled}, bits, cost, "llmcompressor")


if __name__ == "__main__":
    main()
