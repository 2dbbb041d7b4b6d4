"""An adapter that learns, before anything else, to answer as the 16-bit model does.

A few steps down the gradient of the KL to the 16-bit model's answers (Hinton, Vinyals, Dean 2015, at
temperature 1), on the lines that are trained on. Lines that are kept back say which step is best, and whether
the result is used at all: a few steps on few lines can do harm to others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import torch
from torch import Tensor

from qprobe.calibration.damage import KEPT_BACK
from qprobe.checkpoint.adapters.record import Distilled
from qprobe.inputs.encoding import IGNORED
from qprobe.measure.kl import ANSWERS
from qprobe.options import Progress, no_progress
from qprobe.runs.statistics import ratio

RATE = 2e-4  # of Adam; falls to 0
EPSILON = 1e-12  # of Adam: gradients of a small KL are themselves below its usual 1e-8
CHECKS = 8  # looks at the lines kept back
FEWEST = 64  # lines to take, where there are as many: a few would decide nothing
MOST_BYTES = 4 * 2**30  # of the host's memory for what the 16-bit model answers; further lines are not used


@dataclass(frozen=True)
class Lesson:
    """One batch. inputs: of the model, with labels; logits: of the 16-bit model for the answer tokens of each
    line, (tokens, words), on the CPU.
    """

    inputs: Mapping[str, Tensor]
    logits: Sequence[Tensor]

    @property
    def tokens(self) -> int:
        return sum(len(x) for x in self.logits)


def answer_logits(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """For each line the logits that predict its labels, (tokens, words); differentiable."""
    device = next(model.parameters()).device
    given = {key: x.to(device) for key, x in inputs.items() if key != "labels"}
    learned, logits = inputs["labels"].to(device) != IGNORED, model(**given).logits
    if "decoder_input_ids" in given:  # whose place says which token comes there, not which one comes next
        return [row[mine] for row, mine in zip(logits, learned, strict=True)]
    return [row[:-1][mine[1:]] for row, mine in zip(logits, learned, strict=True)]


def lessons_of(reference: Any, batches: Iterable[Mapping[str, Tensor]]) -> list[Lesson]:
    """What the 16-bit model answers on `batches`, as far as `MOST_BYTES` hold it, one at least."""
    found: list[Lesson] = []
    room = MOST_BYTES
    for inputs in batches:
        with torch.no_grad():
            logits = [x.cpu() for x in answer_logits(reference, inputs)]
        room -= sum(x.nbytes for x in logits)
        if found and room < 0:
            break
        found.append(Lesson(inputs, logits))
    return found


def distil(
    model: Any,
    lessons: Sequence[Lesson],
    steps: int,
    at_once: int = 1,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Distilled:
    """Moves the trainable parameters of `model` to where its answers are nearest to those of `lessons`.

    Each step takes `at_once` lessons; every eighth, or the last one, is kept back. The parameters of the best
    look stay if its KL on those is lower by more than twice the standard error of the difference, paired by
    line; else those from before.
    """
    kept = set(range(KEPT_BACK - 1, len(lessons), KEPT_BACK)) or {len(lessons) - 1}
    training = [x for i, x in enumerate(lessons) if i not in kept]
    kept_back = [lessons[i] for i in sorted(kept)]
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE, eps=EPSILON)
    tokens_back = [len(x) for lesson in kept_back for x in lesson.logits]
    before = by_line(model, kept_back)
    best, best_step, at_best = before, 0, _copied(trained)
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1) if training else ():
        while len(order) < at_once:
            order += torch.randperm(len(training), generator=generator).tolist()
        taken = [training[order.pop(0)] for _ in range(at_once)]
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - (step - 1) / steps)
        optimizer.zero_grad(set_to_none=True)
        tokens = max(1, sum(x.tokens for x in taken))
        for lesson in taken:
            (kl_sums(model, lesson).sum() / tokens).backward()
        optimizer.step()
        progress("distill", step, steps)
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            found = by_line(model, kept_back)
            gain, error = ratio([a - b for a, b in zip(before, found, strict=True)], tokens_back)
            is_found = gain is not None and error is not None and gain > 2 * error
            if is_found and fsum(found) < fsum(best):
                best, best_step, at_best = found, step, _copied(trained)
    with torch.no_grad():
        for parameter, value in zip(trained, at_best, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    count = max(1, sum(tokens_back))
    return Distilled(best_step, fsum(before) / count, fsum(best) / count)


def by_line(model: Any, lessons: Sequence[Lesson]) -> list[float]:
    """KL of the answers of `model` to those of `lessons`, summed over the answer tokens of each line."""
    with torch.no_grad():
        return [float(x) for lesson in lessons for x in kl_sums(model, lesson)]


def kl_sums(model: Any, lesson: Lesson) -> Tensor:
    """(lines,) KL to the answers of `lesson`, summed over the answer tokens of each; differentiable."""
    answers = [x.float() for x in answer_logits(model, lesson.inputs)]
    return ANSWERS.damage([x.to(answers[0].device).float() for x in lesson.logits], answers)


def _copied(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in parameters]
