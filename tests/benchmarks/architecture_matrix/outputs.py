"""Oracles of what a model puts out: each layer's error on its inputs, and the KL of the whole, in loops.

As `oracles`: bitsandbytes rounds, and sums are taken in float64. Samples run one at a time, without padding.
Errors of layers are those of the model in float32, in which a scan measures them: rounding of activations to
16-bit adds up over layers to as much as 2 % of an error.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import qprobe
from qprobe.inputs.batch import PAD, Batch
from qprobe.inputs.decoder import layout_of
from qprobe.inputs.processed import ProcessedSamples
from qprobe.records import Sample, asked
from tests.benchmarks.architecture_matrix.oracles import (
    in_four_bit,
    plain_model,
    through_nf4,
    unlike,
    weight_of,
)
from tests.benchmarks.architecture_matrix.road import OK, Course

ACTIVATION_TOLERANCE = 1e-3  # relative
KL_TOLERANCE = 5e-3  # relative, of the same bf16 products
KL_LOADED = 0.1  # relative, of 4-bit models, whose own products round otherwise; and above the floor alone
KL_FLOOR = 1e-5  # nats: what the rounding of logits makes of a KL of nothing


def untrue_outputs(course: Course, processor: Any) -> dict[str, list[str]]:
    """By oracle, what disagrees in a scan that ran samples."""
    run = course.given["scan"].folder
    model, spec, table = plain_model(course.folder), run.key.spec, run.table.set_index("layer")
    processed = ProcessedSamples(processor, torch.bfloat16, layout_of(model))

    def batches(keys: Any) -> list[Batch]:
        return [unpadded(processed.batch([sample_of(course, key.id)])) for group in keys for key in group]

    return {
        "activation": activation_errors(model, table, batches(spec.calibration)),
        "KL": damages(course, model, batches(spec.held_out)),
    }


def unpadded(batch: Batch) -> Batch:
    """A batch of one sample without the token that tells a decoder's sequence from an encoder's, and without
    patches that only fill up.
    """
    if batch.decoder_kinds is None:
        return batch
    inputs = {
        **batch.inputs,
        "decoder_input_ids": batch.inputs["decoder_input_ids"][:, batch.decoder_kinds[0] != PAD],
    }
    if "flattened_patches" in inputs:
        is_there = inputs["attention_mask"][0] > 0
        inputs |= {key: inputs[key][:, is_there] for key in ("flattened_patches", "attention_mask")}
    return replace(batch, inputs=inputs)


def sample_of(course: Course, name: str) -> Sample:
    """The sample that a scan calls `name`: it ends with its line in the file of samples."""
    line = int("".join(x for x in name.rpartition("-")[2] if x.isdigit()))
    row = json.loads(course.data.read_text().splitlines()[line - 1])
    image = (course.data.parent / row["image"]).read_bytes() if "image" in row else None
    return Sample(name, asked(row["prompt"], image), answer=row["answer"])


def activation_errors(model: nn.Module, table: Any, batches: Iterable[Batch]) -> list[str]:
    """activation_nmse of every linear that has one, from hooks on each."""
    signal, noise = (dict.fromkeys(table.index, 0.0) for _ in range(2))
    handles = []
    said = table["activation_nmse"].dropna()
    wide = copy.deepcopy(model).float()
    linears = dict(wide.named_modules())
    for name in said.index:
        linear = linears.get(name)
        if linear is None:
            continue  # a fused weight of experts, whose inputs its module makes inside
        weight = weight_of(model, name).detach()
        change = through_nf4(weight).double() - weight.double()

        def note(_: Any, args: Any, output: Tensor, name: str = name, change: Tensor = change) -> None:
            signal[name] += float(output.double().square().sum())
            noise[name] += float((args[0].double() @ change.T).square().sum())

        handles.append(linear.register_forward_hook(note))
    for batch in batches:
        output_of(wide, batch.in_dtype(torch.float32))
    for handle in handles:
        handle.remove()
    return [
        sentence
        for name in said.index
        if signal[name] > 0
        for sentence in unlike(
            f"activation_nmse of {name}",
            said[name],
            noise[name] / signal[name],
            ACTIVATION_TOLERANCE,
        )
    ]


def damages(course: Course, model: nn.Module, batches: list[Batch]) -> list[str]:
    """The KL of standard 4-bit and of the list, by weights that are put into the 16-bit model, and loaded."""
    result = course.given["scan"].result
    if result.kl_standard_4bit is None or not batches:
        return []
    reference = [rows_of(model, x) for x in batches]
    standard = qprobe.load_standard_4bit(str(course.folder), device="cpu")[0]
    found = [*_damage("standard 4-bit", result.kl_standard_4bit, model, standard, batches, reference)]
    if course.cells["load"][0] == OK and result.kl_dynamic is not None:
        loaded = course.given["load"]
        found += _damage("dynamic 4-bit", result.kl_dynamic, model, loaded, batches, reference)
    return found


def _damage(
    what: str,
    said: float,
    model: nn.Module,
    loaded: nn.Module,
    batches: list[Batch],
    reference: list[Tensor],
) -> list[str]:
    twin = copy.deepcopy(model)
    for name in in_four_bit(loaded):
        weight = weight_of(twin, name)
        weight.data = through_nf4(weight)
    swapped = mean_damage(reference, [rows_of(twin, x) for x in batches], _is_distance(model))
    own = mean_damage(reference, [rows_of(loaded, x) for x in batches], _is_distance(model))
    return [
        *unlike(f"KL of {what}", said, swapped, KL_TOLERANCE, KL_FLOOR),
        *unlike(f"KL of {what} as loaded", said, own, KL_LOADED, KL_FLOOR),
    ]


def rows_of(model: Any, batch: Batch) -> Tensor:
    """(rows, features) in float64 of one sample: answer logits, else what the model puts out."""
    output = output_of(model, batch)
    if hasattr(output, "image_embeds") and hasattr(output, "text_embeds"):
        return torch.cat([output.image_embeds, output.text_embeds]).double()
    logits = getattr(output, "logits", getattr(output, "prediction_logits", None))
    if logits is None:
        return output[0].reshape(-1, output[0].shape[-1]).double()
    if model.can_generate():
        return answer_logits(logits, batch).double()
    rows = logits.reshape(-1, logits.shape[-1]).double()
    if rows.shape[-1] == 1:  # one label: yes against a no of 0
        return torch.cat([torch.zeros_like(rows), rows], dim=-1)
    return rows


def output_of(model: Any, batch: Batch) -> Any:
    """What the model puts out; a cache would have FSMT read its answers without a causal mask."""
    with torch.no_grad():
        return model(**batch.inputs, **({"use_cache": False} if model.can_generate() else {}))


def answer_logits(logits: Tensor, batch: Batch, start: int | None = None) -> Tensor:
    """(tokens, vocabulary) that predict the answer's tokens, or those from `start` on.

    Counted from the end: GIT puts the patches of an image ahead of its text.
    """
    read = batch.inputs["input_ids" if batch.decoder_kinds is None else "decoder_input_ids"].shape[1]
    first, end = batch.answers[0]
    return logits[0, -read:][(first if start is None else start) - 1 : end - 1]


def _is_distance(model: Any) -> bool:
    """True for a model that puts out vectors, and no logits of anything."""
    return "For" not in type(model).__name__ and not model.can_generate()


def mean_damage(reference: list[Tensor], other: list[Tensor], is_distance: bool) -> float:
    """The mean over all rows of KL, or of the squared error over the square of the reference's row."""
    each = [_distance(p, q) if is_distance else _kl(p, q) for p, q in zip(reference, other, strict=True)]
    return float(torch.cat(each).mean())


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    p, q = reference.softmax(-1), other.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def _distance(reference: Tensor, other: Tensor) -> Tensor:
    return (other - reference).square().sum(-1) / reference.square().sum(-1)
