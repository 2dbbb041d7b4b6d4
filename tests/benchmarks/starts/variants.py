"""What each start trains: an adapter of twice the rank, and how fast each part of it moves.

The first `RANK` rows of A and columns of B are those of a fresh adapter at a zero start, and the others are
zeros, which stay: a zero start. `corrected` and `distilled` hold their product there, as `finetune` does. The
others put it in the place of the fresh adapter and train it: with the factors of the closed form
(`decomposed`; LoftQ's as peft leaves them), or with A as long as a fresh one (`balanced`), of which A moves
more slowly by as much as B is larger (`slow-a`) or stays (`frozen-a`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.benchmarks.starts.bases import RANK
from tests.benchmarks.starts.lanes import Adapter, Begun

HELD = ("corrected", "distilled")
TRAINED = ("decomposed", "balanced", "slow-a", "frozen-a")  # made of what `corrected` holds
# peft 0.21 draws A by kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(in_features), so that the
# in_features numbers of a row, each of variance 1 / (3 in_features), have this squared length.
SQUARED_ROW = 1 / 3


def beginning(start: str, zero: Adapter, products: Mapping[str, Adapter]) -> Begun:
    """Where `start` begins. zero: a zero start; products: by start, on the layers that have one."""
    of = products.get("corrected" if start in TRAINED else start, {})
    adapter, pace = {}, {}
    for name, (a, b) in zero.items():
        once, never = torch.ones(RANK), torch.zeros(RANK)
        pace[name] = (torch.cat([once, never]), torch.cat([once, never]))
        if name not in of:
            adapter[name] = _beside((a, b), (torch.zeros_like(a), torch.zeros_like(b)))
        elif start in HELD:
            adapter[name] = _beside((a, b), of[name])
        else:
            found = of[name] if start in ("decomposed", "loftq") else balanced(*of[name])
            adapter[name] = _beside(found, (torch.zeros_like(a), torch.zeros_like(b)))
            if start in ("slow-a", "frozen-a"):
                ratio = float(found[0].norm() / found[1].norm()) if start == "slow-a" else 0.0
                pace[name] = (torch.cat([once * min(1.0, ratio), never]), pace[name][1])
    return Begun(adapter, pace)


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) of the same product, with orthogonal rows of A as long as those of a fresh adapter.

    An A with more rows than columns has no orthogonal ones, so both are returned as they are.
    """
    if a.shape[0] > a.shape[1]:
        return a, b
    rows, triangle = torch.linalg.qr(a.T.double())  # a = triangle^T rows^T
    length = SQUARED_ROW**0.5
    return (length * rows.T).to(a), (b.double() @ triangle.T / length).to(b)


def _beside(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(A, B) of the sum of two products."""
    device = first[0].device
    return torch.cat([first[0], second[0].to(device)]), torch.cat([first[1], second[1].to(device)], 1)
