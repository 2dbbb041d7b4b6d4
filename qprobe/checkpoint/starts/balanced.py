"""Adapters that begin at a product, with factors of the sizes that a fresh adapter's have.

Adam moves every number by about the learning rate, however large its gradient is, so how far a step moves the
product B A depends on how large A and B are. The correction of a 4-bit weight leaves an A many times smaller
than LoRA draws one, and a B that makes up for it: from there an adapter learns many times as fast as from
zero, and overfits as much sooner (reports/starts). The same product has other factors, from which it learns
as fast as an adapter that begins at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# peft 0.21 draws A by kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(in_features), so that the
# in_features numbers of a row, each of variance 1 / (3 in_features), have this squared length.
SQUARED_ROW = 1 / 3


def balance(tuned: Any) -> None:
    """Balances the factors of every adapter of `tuned`, a peft model, that adds something."""
    for layer in adapters_of(tuned).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if bool(b.any()):
            left, right = balanced(b.data, a.data)
            a.data.copy_(right)
            b.data.copy_(left)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(left, right) of the same product, with orthogonal rows of `right` as long as those of a fresh adapter.

    left: (out_features, r); right: (r, in_features). An r above in_features leaves no orthogonal rows, so
    both are returned as they are.
    """
    if right.shape[0] > right.shape[1]:
        return left, right
    rows, triangle = torch.linalg.qr(right.T.double())  # right = triangle^T rows^T
    length = SQUARED_ROW**0.5
    return (left.double() @ triangle.T / length).to(left), (length * rows.T).to(right)


def adapters_of(tuned: Any) -> Mapping[str, Any]:
    """By module name of the base, the layers with a LoRA adapter."""
    base = tuned.get_base_model()
    return {name: x for name, x in base.named_modules() if hasattr(x, "lora_A")}
