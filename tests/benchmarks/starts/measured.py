"""Every start on one base: where it begins, and what training makes of it."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from qprobe.checkpoint.ready import adapted_linears
from qprobe.options import DEFAULT_ADAPT
from qprobe.records import Sample
from qprobe.training.distilled import by_line, distil, lessons_of
from tests.benchmarks.hardware import made_with
from tests.benchmarks.starts.bases import (
    RANK,
    Asked,
    Inputs,
    Task,
    base_weights,
    corrections,
    labelled,
    open_task,
    prepared,
)
from tests.benchmarks.starts.lanes import Begun, Lanes, loftq_start, train, with_products, zero_start
from tests.benchmarks.starts.variants import TRAINED, beginning

RATE, WARMUP = 2e-4, 0.05
LOOKS = (0, 20, 60, 120)  # and the last step


@dataclass
class Found:
    """One base of one model, as far as it was measured.

    kl: by start, of each held-out sample, summed over its `tokens`. losses: by start and seed, for each look
    (step, mean loss of each judged line, nats per answer token). distilled: step of the best look, KL on what
    was kept back before and there.
    """

    model: str
    base: str
    made_with: str
    tokens: list[int] = field(default_factory=list)
    kl: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, list[list[tuple[int, list[float]]]]] = field(default_factory=dict)
    distilled: tuple[int, float, float] | None = None
    seconds: float = 0.0


Tell = Callable[[Found], None]


def measure(asked: Asked, tell: Tell) -> Found:
    """Every start on one base: its KL, and what training makes of it; `tell` is called with what there is."""
    begun = time.perf_counter()
    torch.set_num_threads(1)
    found = Found(asked.model, asked.base, made_with(asked.device))

    def done(what: str) -> None:
        found.seconds = time.perf_counter() - begun
        print(f"{asked.model} {asked.base}: {what} at {found.seconds:.0f} s", file=sys.stderr, flush=True)
        tell(found)

    task = open_task(asked)
    given = prepared(task)
    done("gathered")
    weights = base_weights(task, asked, given)
    done("rounded")
    residuals = {n: task.subject.modules[n].weight.float() - w.float() for n, w in weights.items()}
    products = {"corrected": corrections(residuals, given)}
    if "loftq" in asked.starts:
        products["loftq"] = {n: loftq_start(x, RANK) for n, x in residuals.items()}
    held_out = lessons_of(task.subject.model, task.inputs(task.held_out, 8))
    taught_on = task.calibration if "distilled" in asked.starts else []
    lessons = lessons_of(task.subject.model, task.inputs(taught_on, 16))
    found.tokens = [len(x) for lesson in held_out for x in lesson.logits]
    done("decomposed")
    del given, residuals
    model = task.subject.model
    with torch.no_grad():
        for name, w_hat in weights.items():
            model.get_submodule(name).weight.copy_(w_hat)
    names = adapted_linears(model, DEFAULT_ADAPT, None).names
    zeros = [zero_start(model, names, RANK, seed) for seed in asked.seeds]

    lane = Lanes(model, names, RANK, 1)
    for start in (x for x in asked.starts if x not in ("distilled", *TRAINED)):
        lane.set(0, with_products(zeros[0], products.get(start, {})))
        found.kl[start] = by_line(model, held_out)
    done("closed form")
    if "distilled" in asked.starts:
        lane.set(0, with_products(zeros[0], products["corrected"]))  # alone, as `finetune` distils it
        taught = distil(model, lessons, asked.distill)
        found.distilled = (taught.steps, taught.before, taught.after)
        found.kl["distilled"], products["distilled"] = by_line(model, held_out), lane.adapter(0)
    lane.remove()
    done("distilled")
    del held_out, lessons
    gc.collect()
    zero = dict(zip(asked.seeds, zeros, strict=True))
    for part in _parts(asked.seeds, asked.at_once):
        begins = [beginning(start, zero[seed], products) for seed in part for start in asked.starts]
        for step, losses in looks(task, names, begins, part, asked):
            for (seed, start), of_lines in zip(product(part, asked.starts), losses, strict=True):
                curves = found.losses.setdefault(start, [[] for _ in asked.seeds])
                curves[asked.seeds.index(seed)].append((step, of_lines))
            done(f"step {step} of seeds {', '.join(map(str, part))}")
    return found


def _parts(seeds: Sequence[int], at_once: int) -> list[Sequence[int]]:
    """The first seed alone, so that something is there early; then `at_once` of the others."""
    return [seeds[:1], *(seeds[i : i + at_once] for i in range(1, len(seeds), at_once))]


def looks(
    task: Task, names: Sequence[str], begins: Sequence[Begun], seeds: Sequence[int], asked: Asked
) -> Iterator[tuple[int, list[list[float]]]]:
    """Trains `begins`, all starts of the first seed and then of the next, from the base of `task`.

    At each look (step, for each of `begins` the mean loss of each judged line).
    """
    model = task.subject.model
    lanes = Lanes(model, names, 2 * RANK, len(begins))
    for number, one in enumerate(begins):
        lanes.begin(number, one)
    judged = task.inputs(task.judged, 8)
    batches = step_batches(task, seeds, len(begins) // len(seeds), asked.batch)
    for step in train(lanes, batches, asked.steps, RATE, max(1, round(WARMUP * asked.steps))):
        if step in (*LOOKS, asked.steps):
            by_batch = [lanes.line_losses(inputs) for inputs in judged]
            yield step, [[x for one in by_batch for x in one[n]] for n in range(len(begins))]
    lanes.remove()


def step_batches(task: Task, seeds: Sequence[int], copies: int, size: int) -> Iterator[Inputs]:
    """Batches of `size` training samples for each seed, in its own order, `copies` times each."""
    orders = [_order(len(task.training), seed, size) for seed in seeds]
    while True:
        taken = [task.training[next(order)] for order in orders for _ in range(size)]
        yield in_lanes(task, taken, len(seeds), copies)


def in_lanes(task: Task, samples: Sequence[Sample], groups: int, copies: int) -> Inputs:
    """`samples`, which are `groups` of equal size, as one batch with each group `copies` times in a row."""
    batch = labelled(task.subject.encode(tuple(samples)).in_dtype(task.subject.dtype))

    def spread(x: Tensor) -> Tensor:
        assert len(x) == len(samples), "rows of a batch are samples"
        grouped = x.view(groups, 1, -1, *x.shape[1:])
        return grouped.expand(-1, copies, *[-1] * (grouped.dim() - 2)).reshape(-1, *x.shape[1:])

    return {key: spread(x) for key, x in batch.items()}


def _order(count: int, seed: int, size: int) -> Iterator[int]:
    """Places of samples, pass by pass in an order of its own, without a batch that is not full."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()[: count - count % size]
