"""What a module of experts computes, product by product, on the tokens that are routed to each expert."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprobe.loading.experts.weights import ExpertWeight, first_parameter, form_of


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert reads which token: rows of (expert, token), sorted by expert.

    expert, token: (rows,); tokens are numbered as in the flattened input. ends: how many rows the experts up
    to and with each one have. tokens: how many there are.
    """

    expert: Tensor
    token: Tensor
    ends: tuple[int, ...]
    tokens: int

    def spans(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) of each expert that has any."""
        start = 0
        for expert, end in enumerate(self.ends):
            if end > start:
                yield expert, slice(start, end)
            start = end

    def sample(self, count: int) -> Tensor:
        """(rows,) the sample of each row, where the tokens are those of `count` samples, one by one."""
        return self.token // (self.tokens // count)


def routing(expert: Tensor, token: Tensor, experts: int, tokens: int) -> Routing:
    """The routing of rows that are sorted by expert."""
    return Routing(expert, token, tuple(expert.bincount(minlength=experts).cumsum(0).tolist()), tokens)


@dataclass(frozen=True, eq=False)
class Routed(ExpertWeight):
    """The weight of experts while it multiplies: its rows are `routing`'s."""

    routing: Routing


def routed(layer: ExpertWeight, rows: Routing) -> Routed:
    """`layer` while it multiplies `rows`."""
    return Routed(layer.module, layer.parameter, layer.transposed, rows)


Product = nn.Linear | Routed
"""A weight that multiplies rows now: all rows by one matrix, or each by its expert's."""


def times(product: Product, x: Tensor, weight: Tensor) -> Tensor:
    """x W^T + b of each row, with `weight`, as it is stored, in the place of the product's own."""
    if isinstance(product, nn.Linear):
        return F.linear(x, weight, product.bias)
    y, bias = matmul(product, x, weight), product.bias
    return y if bias is None else y + bias[product.routing.expert].to(y.dtype)


def owned(y: Tensor) -> Tensor:
    """`y` as a tensor that is no view to autograd, without a copy: models such as LED change it in place.

    Nothing else may hold the tensor that it was a view of.
    """
    return torch.ops.aten._unsafe_view(y, y.shape)


def matmul(product: Product, x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of each row, (..., out_features)."""
    if isinstance(product, nn.Linear):
        return F.linear(x, weight)
    return _by_expert(product, x, weight, not product.transposed)


def towards_input(product: Product, grad: Tensor, weight: Tensor) -> Tensor:
    """grad W of each row, (..., in_features): what a backward pass hands on."""
    if isinstance(product, nn.Linear):
        return grad @ weight
    return _by_expert(product, grad, weight, product.transposed)


def _by_expert(product: Routed, x: Tensor, weight: Tensor, turned: bool) -> Tensor:
    """Each row times its expert's matrix, or times the transpose of it where `turned`."""
    parts = [
        x[rows] @ (weight[expert].T if turned else weight[expert]) for expert, rows in product.routing.spans()
    ]
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[1 if turned else 2])


def tokens_read(product: Product, x: Tensor) -> int:
    """How many tokens the product reads: its rows, or those that are routed to its experts."""
    return x.numel() // x.shape[-1] if isinstance(product, nn.Linear) else product.routing.tokens


def samples_apart(product: Product, x: Tensor, count: int) -> bool:
    """True if what the product reads can be cut into `count` equal shares, one for each sample."""
    tokens = tokens_read(product, x)
    return tokens > 0 and tokens % count == 0


def has_samples_behind(product: Product, x: Tensor, count: int) -> bool:
    """True if what a linear of texts reads has its `count` samples behind their tokens, as attention of
    Longformer has them, and all of FSMT: (tokens, samples, features).
    """
    return isinstance(product, nn.Linear) and x.dim() == 3 and 1 < count == x.shape[1] != x.shape[0]


def by_sample(product: Product, values: Tensor, count: int) -> Tensor:
    """(count,) float32: `values`, of the shape of an output, summed over the rows of each sample."""
    if isinstance(product, nn.Linear):
        return values.reshape(count, -1).sum(dim=1, dtype=torch.float32)
    sums = torch.zeros(count, device=values.device)
    return sums.index_add(0, product.routing.sample(count), values.sum(dim=1, dtype=torch.float32))


Multiply = Callable[[str, Tensor, Routing], Tensor]
"""(parameter, rows, whose they are) -> that product with its bias."""


def run_experts(module: Any, multiply: Multiply, *args: Any, **kwargs: Any) -> Tensor:
    """What `module` computes of the arguments of its forward, each of its products by `multiply`."""
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:]
    return (_run_given if form_of(module) == "given" else _run_routed)(module, multiply, *given)


def _run_routed(module: Any, multiply: Multiply, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """As `grouped_mm_experts_forward` of transformers (5.23.0, integrations/moe.py)."""
    order = index.reshape(-1).argsort(stable=True)
    rows = routing(index.reshape(-1)[order], order // index.shape[-1], module.num_experts, len(index))
    y = multiply(first_parameter(module), x[rows.token], rows)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = multiply("down_proj", y, rows)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y * weights.reshape(-1)[order, None]
    return y[order.argsort()].view(*index.shape, -1).sum(dim=1).to(x.dtype)


def _run_given(module: Any, multiply: Multiply, hidden_states: Tensor) -> Tensor:
    """As `Llama4TextExperts.forward` (transformers 5.23.0); rows of tokens routed elsewhere are 0."""
    x, experts = hidden_states.view(-1, module.hidden_size), module.num_experts
    chosen = x.detach().any(dim=-1).nonzero()[:, 0]
    tokens = len(x) // experts
    rows = routing(chosen // tokens, chosen % tokens, experts, tokens)
    gate, up = multiply("gate_up_proj", x[chosen], rows).chunk(2, dim=-1)
    y = multiply("down_proj", up * module.act_fn(gate), rows)
    return torch.zeros_like(x).index_copy(0, chosen, y.to(x.dtype))
