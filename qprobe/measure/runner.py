"""One batch of samples -> its finished units: outputs, KL of the all-4-bit model, sensitivity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import pandas as pd
import torch

from qprobe.formats.protocol import Format
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import Ends, Path, attribute, rows_by_sample, walking
from qprobe.measure.experts.routing import Product, times, tokens_read
from qprobe.measure.hooks import LayerForward, replaced_forwards
from qprobe.measure.kl import KlSums, in_four_bit, read_out, rows_of
from qprobe.measure.outputs import OutputErrors, output_rows, run_model
from qprobe.measure.subject import Subject
from qprobe.measure.weights import weight_rows
from qprobe.records import Sample
from qprobe.registry import measures as declared
from qprobe.registry.measures import ISOLATED, WEIGHTS, Need
from qprobe.runs.key import DAMAGE, Measures

STANDARD = "standard"  # the candidate that keeps nothing: every linear but the fixed ones in 4-bit


def applicable_measures(
    subject: Subject, batch: Batch | None, wanted: tuple[str, ...] | None, nodes: int
) -> tuple[Measures, tuple[str, ...]]:
    """(measures, notes): what can be measured on this model, and a sentence for each thing that cannot.

    batch: on which the 16-bit model is finite; None if there is none. wanted: names of declared measures;
    None for all.
    """
    asked = [x for x in declared.DECLARED if x.is_always or wanted is None or (x.follows or x.name) in wanted]
    needs: set[Need] = {need for x in asked for need in x.needs}
    lacking = {need: why for need in needs if (why := _lacking(need, subject, batch, nodes)) is not None}
    unmet = [(x, lacking[need]) for x in asked for need in sorted(x.needs) if need in lacking]
    left_out = {x.name for x, _ in unmet}
    notes = dict.fromkeys(f"{x.label[0].upper()}{x.label[1:]} {why}" for x, why in unmet if x.follows is None)
    measures = Measures.of([x for x in asked if x.name not in left_out], nodes)
    if subject.readout is None or subject.answers:
        return measures, tuple(notes)
    damage = DAMAGE[subject.readout.name]
    said = (
        f"This model gives no answers: its damage is {damage.what}, {damage.unit}, also where a column is "
        "called a KL."
    )
    return replace(measures, readout=subject.readout.name), (*notes, said)


def _lacking(need: Need, subject: Subject, batch: Batch | None, nodes: int) -> str | None:
    """What to say after its name of a measure with this need; None where the need is met."""
    if need == "head" and subject.readout is None:
        return "and KL do not apply: the model has no language head, and its output is of no kind known here."
    if need == "independent samples":
        if batch is None:
            return "is not measured: on no sample is the 16-bit model finite."
        if not halves_are_independent(subject, batch):
            return (
                "is not measured: in this architecture samples of one batch see each other, or share what a "
                "layer reads."
            )
    if need == "two nodes" and nodes < 2:
        return "is not measured: it takes two nodes or more."
    return None


def halves_are_independent(subject: Subject, batch: Batch) -> bool:
    """True if the second half of a doubled batch leaves the first half's output alone.

    False means that samples of one batch see each other in this architecture, so that the propagated
    error cannot be measured side by side; so does a layer whose rows are not those of samples, as where
    DeBERTa projects its table of relative positions. The first half is compared with the batch run alone:
    what differs must be rounding (kernels may sum in another order; below eps / 4 in nmse over a whole
    model), or a hundred times smaller than what 4-bit does to the second half.
    """
    once, twice = Counter[str](), Counter[str]()
    errors = OutputErrors(batch, subject.layers, subject.dequantized, subject.quantized, doubled=True)
    with torch.inference_mode():
        with replaced_forwards(subject.modules, counted(once, partial(_own, subject))):
            alone = _rows(subject, batch)
        with replaced_forwards(subject.modules, counted(twice, errors.forward)):
            both = _rows(subject, batch.repeated(2))
    if subject.shared.note(batch, once, twice):
        return False
    energy = sum(float(x.double().square().sum()) for x in alone)
    leaked, caused = (
        sum(float((y - x).double().square().sum()) for x, y in zip(alone, half, strict=True))
        for half in (both[: batch.size], both[batch.size :])
    )
    rounding = torch.finfo(subject.model.dtype).eps / 4
    return leaked <= max(rounding * energy, 0.01 * caused)


def shared_layers(subject: Subject, batch: Batch) -> frozenset[str]:
    """Names of the layers that read rows which belong to no sample; of other inputs it runs `batch` twice."""
    known = subject.shared.of(batch)
    if known is not None:
        return known
    once, twice = Counter[str](), Counter[str]()
    with torch.no_grad():
        for rows, given in ((once, batch), (twice, batch.repeated(2))):
            with replaced_forwards(subject.modules, counted(rows, partial(_own, subject))):
                run_model(subject.model, given)
    return subject.shared.note(batch, once, twice)


def _own(subject: Subject, name: str, product: Product, x: torch.Tensor) -> torch.Tensor:
    return times(product, x, subject.dequantized.own(name).to(x.dtype))


def counted(tokens: Counter[str], forward: LayerForward) -> LayerForward:
    """`forward`, which adds to `tokens` how many each layer reads."""

    def counting(name: str, product: Product, x: torch.Tensor) -> torch.Tensor:
        tokens[name] += tokens_read(product, x)
        return forward(name, product, x)

    return counting


def _rows(subject: Subject, batch: Batch) -> list[torch.Tensor]:
    """The rows of the readout, or without one those of the output, in float32."""
    if subject.readout is not None:
        return rows_of(subject.model, run_model(subject.model, batch), batch)
    return [rows.float() for rows in output_rows(subject.model, batch)]


def observe_weights(subject: Subject) -> dict[str, pd.DataFrame]:
    """The unit frame `WEIGHTS` of the whole model."""
    return {WEIGHTS.name: weight_rows(subject.dequantized)}


def observe(subject: Subject, measures: Measures, batch: Batch) -> dict[str, pd.DataFrame]:
    """The unit frames of one batch by stage, all in the dtype of the path; all but isolated KL.

    Samples without answer tokens get outputs but no KL and no sensitivity.
    """
    batch = batch.in_dtype(subject.path.dtype)
    with walking(subject.path):
        path = _path(subject, batch)
        rows, logits = observe_outputs(subject, batch, measures)
        frames = {"outputs": rows}
        if measures.sensitivity:
            ends = (logits[: batch.size], logits[batch.size :]) if measures.propagated else None
            frames |= _observe_damage(path, batch, measures, ends)
    return frames


def _observe_damage(
    path: Path, batch: Batch, measures: Measures, ends: Ends | None
) -> dict[str, pd.DataFrame]:
    """The frames "kl" and "sensitivity"; without rows if there is no answer."""
    if not any(path.readout.counts(batch)):
        none = [KlSums(0.0, 0, 0)] * batch.size
        return {"kl": kl_rows(batch, STANDARD, none), "sensitivity": rows_by_sample(path.readout, batch, {})}
    ends = ends or (path.logits(batch, 0.0), path.logits(batch, 1.0))
    found = attribute(path, batch, max(1, measures.nodes - 1), measures.tolerance, ends)
    return {"kl": kl_rows(batch, STANDARD, found.kl), "sensitivity": found.rows}


def observe_isolated(subject: Subject, _measures: Measures, batch: Batch) -> dict[str, pd.DataFrame]:
    """The unit frame `ISOLATED` of one batch: each linear's isolated KL, in the dtype of the path."""
    batch = batch.in_dtype(subject.path.dtype)
    with walking(subject.path):
        path = _path(subject, batch)
        return {ISOLATED.name: rows_by_sample(path.readout, batch, path.isolated_kl(batch))}


def _path(subject: Subject, batch: Batch) -> Path:
    """The path of `subject`, which knows the layers whose rows belong to no sample."""
    return replace(subject.path, shared=shared_layers(subject, batch))


def isolated_half(samples: Iterable[Sample]) -> frozenset[str]:
    """Ids of half of the `samples` that have an answer, rounded up: those with isolated KL.

    They are picked by digest, so neither order nor kind of the samples enter it. Half as many samples make
    the estimate 1.4 times as uncertain and halve its cost; lists hardly change (reports/sensitivity).
    """
    given = list(samples)
    answered = [x for x in given if x.answer] or given  # a model that answers nothing is measured on all
    answered.sort(key=lambda x: (x.digest, x.id))
    return frozenset(x.id for x in answered[: (len(answered) + 1) // 2])


def observe_outputs(
    subject: Subject, batch: Batch, measures: Measures
) -> tuple[pd.DataFrame, list[torch.Tensor]]:
    """(rows, rows of the readout): errors of every linear, columns of the stage "outputs".

    Those of the readout (answer logits) are of the 16-bit model and then, where the propagated error is
    measured, of the all-4-bit model, one tensor per sample; none for a model without a readout.
    """
    errors = OutputErrors(
        batch,
        subject.layers,
        subject.dequantized,
        subject.quantized,
        doubled=measures.propagated,
        shared=shared_layers(subject, batch),
    )
    given = batch.repeated(2) if measures.propagated else batch
    with torch.no_grad(), replaced_forwards(subject.modules, errors.forward):
        output = run_model(subject.model, given)
    return errors.rows(), [] if subject.readout is None else rows_of(subject.model, output, given)


def kl_rows(batch: Batch, candidate: str, sums: list[KlSums]) -> pd.DataFrame:
    """One row for each sample with an answer, columns of the unit stage "kl". sums: of every sample."""
    rows = [
        (sample.id, candidate, s.tokens, s.kl, s.top1_agree)
        for sample, s in zip(batch.samples, sums, strict=True)
        if s.tokens
    ]
    return pd.DataFrame(rows, columns=["sample", "candidate", "answer_tokens", "kl_sum", "top1_agree"])


def nearest_kl(subject: Subject, batch: Batch, fmt: Format, candidate: str) -> pd.DataFrame:
    """The KL rows of the batch with every quantized linear rounded to nearest, one at a time as it runs."""

    def forward(name: str, product: Product, x: torch.Tensor) -> torch.Tensor:
        return times(product, x, fmt.pack(subject.dequantized.own(name)).unpack())

    with torch.inference_mode():
        reference = read_out(subject.model, batch)
        with replaced_forwards(subject.quantized_modules, forward):
            return kl_rows(batch, candidate, _sums(subject, batch, reference))


def candidate_kl(
    subject: Subject, batch: Batch, candidates: dict[str, frozenset[str]]
) -> dict[str, pd.DataFrame]:
    """For each candidate (name -> linears kept in 16-bit) the KL rows of the batch; costs a forward each."""
    frames = {}
    with torch.inference_mode():
        reference = read_out(subject.model, batch)
        for name, kept in candidates.items():
            with in_four_bit(subject.modules, subject.dequantized, subject.quantized - kept):
                sums = _sums(subject, batch, reference)
            frames[name] = kl_rows(batch, name, sums)
    return frames


def _sums(subject: Subject, batch: Batch, reference: list[torch.Tensor]) -> list[KlSums]:
    return subject.path.readout.sums(reference, read_out(subject.model, batch))
