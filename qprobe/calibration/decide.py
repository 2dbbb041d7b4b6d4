"""Whether tokens are weighed: decided for each model by what it costs on samples that were kept back.

Weights of tokens (`qprobe.calibration.token_weights`) leave less damage on most models, and no less on some.
A few layers are rounded both ways for most of the samples, and the damage of both is measured on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from qprobe.calibration.damage import mean_damage, unit_of
from qprobe.calibration.gram import Gathering, SharedInput, Weights, passes
from qprobe.calibration.layers import rounded_layers
from qprobe.calibration.room import rounded_together
from qprobe.formats.nf4 import Nf4, PackedNf4
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.experts.routing import Product, times
from qprobe.measure.hooks import LayerForward
from qprobe.measure.subject import Subject
from qprobe.runs.folder import RunFolder
from qprobe.runs.notes import TokensCount, Trial
from qprobe.runs.shards import waiting
from qprobe.system.processes import Shard

Trials = Mapping[str, Callable[[], float]]

TRIAL = (
    5  # one shared input of so many is rounded for the decision; most blocks have 4, so that all kinds are
)
TRIAL_LARGE = 17  # above `FLOAT32_UP_TO` parameters, where rounding takes longest


def decided(
    subject: Subject,
    inputs: Sequence[SharedInput],
    batches: Callable[[], Iterable[Batch]],
    training: int,
    weights: Weights,
    fmt: Nf4,
    limit_bytes: int,
    outputs: Mapping[str, Tensor] | None = None,
    tried: Callable[[Trials], Mapping[str, float]] = lambda trials: {name: x() for name, x in trials.items()},
) -> TokensCount:
    """The decision, on every `TRIAL`-th of `inputs`.

    batches: gives the samples, each time from the first; the first `training` of them are fitted to, the
    others kept back. weights: of their tokens. limit_bytes: for Gram matrices at once. outputs: what weighed
    tokens go with, see `qprobe.calibration.token_weights.TokenWeights`. tried: what two trials give, by name.
    """
    trial = trial_inputs(subject, inputs)
    names = frozenset(name for one in trial for name in one.names)

    def damage(counts: Weights | None) -> float:
        packed: dict[str, PackedNf4] = {}
        for part in passes(trial, limit_bytes, subject.reference.device):
            gathering = Gathering(subject, part, counts)
            with walking(subject.path):
                gathering.add_all(islice(batches(), training))
            sides = None if counts is None else outputs
            packed |= _rounded(subject, gathering, fmt, limit_bytes, sides)
        with walking(subject.path):
            return mean_damage(subject, islice(batches(), training, None), _reading(subject, names, packed))

    found = tried({"tokens-plain": partial(damage, None), "tokens-weighted": partial(damage, weights)})
    return TokensCount.of(found["tokens-plain"], found["tokens-weighted"], unit_of(subject))


def tried_in_turn(run: RunFolder, shard: Shard, trials: Trials) -> dict[str, float]:
    """The damage of each of `trials`, by its topic in the notes of `run`; processes share them.

    Each process begins with another one, and waits for whoever is at the next.
    """
    found: dict[str, float] = {}
    for name in (list(trials)[i] for i in shard.rotated(range(len(trials)))):
        with waiting(run.path, name):
            run.notes.reread()
            if run.notes.get(name) is None:
                run.notes.put(name, Trial.of(trials[name]()))
            noted = run.notes.get(name)
            assert isinstance(noted, Trial), name
            found[name] = noted.damage_or_nan
    return found


def trial_inputs(subject: Subject, inputs: Sequence[SharedInput]) -> list[SharedInput]:
    """Those of `inputs` that are rounded for the decision, from all over the model."""
    every = TRIAL if subject.path.dtype == torch.float32 else TRIAL_LARGE
    return list(inputs[every // 2 :: every]) or list(inputs)


def _rounded(
    subject: Subject, gathering: Gathering, fmt: Nf4, limit_bytes: int, outputs: Mapping[str, Tensor] | None
) -> dict[str, PackedNf4]:
    found: dict[str, PackedNf4] = {}
    for group in rounded_together(subject, gathering.inputs, limit_bytes):
        grams = [gathering.grams.pop(one.leader) for one in group]
        with subject.running(f"round {group[0].leader}"):
            rounded = rounded_layers(subject, group, grams, gathering.apart, fmt, outputs)
        stored = {name: x.stored for of_one in rounded for name, x in of_one.items()}
        found |= {name: x.packed() for name, x in stored.items() if x is not None}
    return found


def _reading(subject: Subject, names: frozenset[str], packed: Mapping[str, PackedNf4]) -> LayerForward:
    """What linears compute with `names` in 4-bit, and all others in 16-bit.

    packed: their weights; those that calibration left out are rounded to nearest, as they will be stored.
    """

    def forward(name: str, product: Product, x: Tensor) -> Tensor:
        if name in packed:
            weight = packed[name].unpack()
        else:
            weight = (subject.dequantized.weight if name in names else subject.dequantized.own)(name)
        return times(product, x, weight.to(x.dtype))

    return forward
