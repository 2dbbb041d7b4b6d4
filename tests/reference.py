"""Slow, obvious oracles: modules one by one, float64, full weight gradients, hand-made swaps of weights.

Nothing here is taken from qprobe's measuring code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def round_trip(weight: Tensor) -> Tensor:
    """NF4 with double quantization through bitsandbytes' own module, read back as it computes with it."""
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compress_statistics=True
    )
    layer.weight = bnb.nn.Params4bit(weight.detach().clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(weight.dtype)


def quantized_copy(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of `model` in which the weights of the linears `names` are their round trips."""
    twin = copy.deepcopy(model)
    for name in names:
        linear = twin.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = round_trip(linear.weight)
    return twin


def captured(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(input, output) of every linear in one forward pass, rows flattened, in execution order."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear:

            def note(_: Any, args: Any, output: Tensor, name: str = name) -> None:
                seen[name] = (args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1]))

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def activation_sums(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, tuple[float, float, float]]:
    """(signal, noise, peak) of each linear: sum ||Wx + b||^2, sum ||Dx||^2, max |Dx|, in float64."""
    sums = {}
    for name, (x, y) in captured(model, inputs).items():
        weight = model.get_submodule(name).weight
        error = x.double() @ (round_trip(weight).double() - weight.double()).T
        sums[name] = (float(y.double().square().sum()), float(error.square().sum()), float(error.abs().max()))
    return sums


def propagated_sums(
    model: nn.Module, quantized: Iterable[str], inputs: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """(signal, noise) of each linear's output in a model with all `quantized` in 4-bit against `model`."""
    wanted, got = captured(model, inputs), captured(quantized_copy(model, quantized), inputs)
    return {
        name: (
            float(y.double().square().sum()),
            float((got[name][1].double() - y.double()).square().sum()),
        )
        for name, (_, y) in wanted.items()
    }


def kl_nats(reference: Tensor, other: Tensor) -> float:
    """KL(softmax(reference) || softmax(other)) summed over rows, a plain loop in float64."""
    total = 0.0
    for p_logits, q_logits in zip(reference.double(), other.double(), strict=True):
        p, q = p_logits.softmax(0), q_logits.softmax(0)
        total += float((p * (p.log() - q.log())).sum())
    return total


def ablation_kl(
    model: nn.Module, quantized: Iterable[str], layer: str, inputs: dict[str, Tensor], span: tuple[int, int]
) -> tuple[float, float]:
    """(KL with only `layer` in 4-bit, KL of all `quantized` in 4-bit less that with only `layer` kept).

    Nats summed over the answer in `span` of one sample, from three copies with swapped weights.
    """
    names = set(quantized)
    start, end = span

    def logits(swapped: set[str]) -> Tensor:
        with torch.no_grad():
            return quantized_copy(model, swapped)(**inputs).logits[0, start - 1 : end - 1]

    plain = logits(set())
    alone, standard, kept = (kl_nats(plain, logits(x)) for x in ({layer}, names, names - {layer}))
    return alone, standard - kept


def weight_gradient_slopes(
    model: nn.Module, quantized: Iterable[str], inputs: dict[str, Tensor], span: tuple[int, int], alpha: float
) -> dict[str, float]:
    """<dKL/dW, D> of each linear at W + alpha D, from full weight gradients; one sample, answer in `span`."""
    start, end = span
    with torch.no_grad():
        reference = model(**inputs).logits[0, start - 1 : end - 1].double().log_softmax(-1)
    twin = copy.deepcopy(model)
    differences = {}
    for name in quantized:
        weight = twin.get_submodule(name).weight
        differences[name] = round_trip(weight) - weight.detach()
        weight.data = weight.data + alpha * differences[name]
        weight.requires_grad_(True)
    other = twin(**inputs).logits[0, start - 1 : end - 1].double().log_softmax(-1)
    (reference.exp() * (reference - other)).sum().backward()
    return {
        name: float((twin.get_submodule(name).weight.grad.double() * d.double()).sum())
        for name, d in differences.items()
    }


def logit_slopes(
    model: nn.Module, layer: str, inputs: dict[str, Tensor], span: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(p, j): the 16-bit model's probabilities and d logits / ds for `layer`'s weight at W + s D, s = 0.

    (answer tokens, vocabulary) each, for one sample. j is the gradient of v -> d(v . logits)/ds, which is
    linear in v, so it needs attention that can be differentiated twice.
    """
    start, end = span
    twin = copy.deepcopy(model)
    module = twin.get_submodule(layer)
    difference = round_trip(module.weight) - module.weight
    s = torch.zeros((), requires_grad=True)
    module.forward = lambda input: F.linear(input, module.weight + s * difference, module.bias)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        logits = twin(**inputs).logits[0, start - 1 : end - 1]
        v = torch.zeros_like(logits, requires_grad=True)
        (slope,) = torch.autograd.grad(logits, s, v, create_graph=True)
        (j,) = torch.autograd.grad(slope, v)
    return logits.detach().softmax(-1), j
