"""One batch of samples -> its finished units: outputs, KL of the all-4-bit model, sensitivity."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch

from qprobe.measure.attribution import RESIDUAL, attribute, walking
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.kl import KlSums, answer_logits, at_answers, in_four_bit, kl_sums
from qprobe.measure.outputs import OutputErrors, halves_are_independent, run_model
from qprobe.measure.subject import Subject
from qprobe.samples.inputs import Batch

STANDARD = "standard"  # the choice that keeps nothing: every linear but the fixed ones in 4-bit


@dataclass(frozen=True)
class Measures:
    """What is measured on every batch. propagated needs independent samples, sensitivity a language head.

    nodes: of the path attribution to begin with; tolerance: see `attribute`.
    """

    propagated: bool
    sensitivity: bool
    nodes: int = 2
    tolerance: float = RESIDUAL

    @property
    def stages(self) -> tuple[str, ...]:
        return ("outputs", "kl", "sensitivity") if self.sensitivity else ("outputs",)


def applicable_measures(
    subject: Subject, batch: Batch, wanted: tuple[str, ...] | None, nodes: int
) -> tuple[Measures, tuple[str, ...]]:
    """(measures, notes): what can be measured on this model, and a sentence for each thing that cannot.

    wanted: names among "activation", "propagated", "sensitivity"; None for all.
    """
    notes = []
    propagated = wanted is None or "propagated" in wanted
    sensitivity = wanted is None or "sensitivity" in wanted
    if propagated and not halves_are_independent(
        subject.model, batch, subject.layers, subject.round_trips, subject.quantized
    ):
        propagated = False
        notes.append(
            "Propagated error is not measured: in this architecture samples of one batch see each other."
        )
    if sensitivity and not subject.has_head:
        sensitivity = False
        notes.append(
            "Sensitivity and KL do not apply: the model has no language head, so there are no answer tokens."
        )
    return Measures(propagated, sensitivity, nodes), tuple(notes)


def observe(subject: Subject, batch: Batch, measures: Measures) -> dict[str, pd.DataFrame]:
    """The unit frames of one batch by stage (see `Measures.stages`), all in the dtype of the path.

    Samples without answer tokens get outputs but no KL and no sensitivity.
    """
    path = subject.path
    batch = batch.in_dtype(path.dtype)
    with walking(path):
        rows, logits = observe_outputs(subject, batch, measures)
        frames = {"outputs": rows}
        if measures.sensitivity and batch.answer_tokens:
            ends = (logits[: batch.size], logits[batch.size :]) if measures.propagated else None
            found = attribute(path, batch, measures.nodes, measures.tolerance, ends)
            frames |= {"kl": kl_rows(batch, STANDARD, found.kl), "sensitivity": found.rows}
        elif measures.sensitivity:
            frames["kl"] = kl_rows(batch, STANDARD, [])
            frames["sensitivity"] = pd.DataFrame(columns=["sample", "layer", "answer_tokens", "kl_sum"])
    return frames


def observe_outputs(
    subject: Subject, batch: Batch, measures: Measures
) -> tuple[pd.DataFrame, list[torch.Tensor]]:
    """(rows, answer logits): activation and propagated error of every linear, columns of the stage "outputs".

    The answer logits are those of the 16-bit model and then, where the propagated error is measured,
    of the all-4-bit model, one tensor a sample; none for a model without a language head.
    """
    errors = OutputErrors(
        batch, subject.layers, subject.round_trips, subject.quantized, doubled=measures.propagated
    )
    given = batch.repeated(2) if measures.propagated else batch
    with torch.no_grad(), replaced_forwards(subject.modules, errors.forward):
        output = run_model(subject.model, given)
    return errors.rows(), at_answers(output.logits, given) if subject.has_head else []


def kl_rows(batch: Batch, choice: str, sums: list[KlSums]) -> pd.DataFrame:
    """One row for each sample with an answer, columns of the unit stage "kl"."""
    rows = [
        (sample.id, choice, s.tokens, s.kl, s.top1_agree)
        for sample, s in zip(batch.samples, sums, strict=False)
        if s.tokens
    ]
    return pd.DataFrame(rows, columns=["sample", "choice", "answer_tokens", "kl_sum", "top1_agree"])


def choice_kl(subject: Subject, batch: Batch, choices: dict[str, frozenset[str]]) -> dict[str, pd.DataFrame]:
    """For each choice (name -> linears kept in 16-bit) the KL rows of the batch; costs a forward each."""
    frames = {}
    with torch.inference_mode():
        reference = answer_logits(subject.model, batch)
        for name, kept in choices.items():
            with in_four_bit(subject.modules, subject.round_trips, subject.quantized - kept):
                sums = kl_sums(reference, answer_logits(subject.model, batch))
            frames[name] = kl_rows(batch, name, sums)
    return frames
