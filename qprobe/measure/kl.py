"""Damage of a model's output: KL divergence on answer tokens, or what takes its place without answers.

KL(p_ref || p) = sum over the vocabulary of p_ref (log p_ref - log p), in nats, at the positions that
predict an answer token; sums and token counts are kept so that means are taken once, at the end. Classifiers
have a distribution of their own, encoders an output whose normalized error counts, see `readout_of`.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qprobe.errors import ModelError
from qprobe.inputs.batch import PAD, Batch
from qprobe.inputs.decoder import is_encoder_decoder, layout_of
from qprobe.loading.experts.weights import Layer
from qprobe.loading.inventory import has_language_head, separate_experts
from qprobe.measure.dequantized import DequantizedWeights
from qprobe.measure.experts.routing import times
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.outputs import run_model


@dataclass(frozen=True)
class KlSums:
    """Sums over the rows of one sample: damage, rows (answer tokens), rows with the same top-1 choice."""

    kl: float
    tokens: int
    top1_agree: int


@dataclass(frozen=True)
class Readout:
    """What of a model's output its damage is measured on, a row at a time.

    name: one of `qprobe.runs.key.DAMAGE`. rows: of each sample; None for one per token that is no padding, 0
    for one per answer token. by_distance: by the squared error of a row over the row's own square; else by
    KL, a row holding the logits of one distribution.
    """

    name: str
    rows: int | None
    by_distance: bool = False

    @property
    def is_answer(self) -> bool:
        """True if the rows are the logits of answer tokens."""
        return self.rows == 0

    def damage(self, reference: list[Tensor], other: list[Tensor]) -> Tensor:
        """(samples,) damage summed over the rows of each sample, float64; differentiable."""
        each = _distance if self.by_distance else _kl
        return torch.stack([each(p, q).double().sum() for p, q in zip(reference, other, strict=True)])

    def sums(self, reference: list[Tensor], other: list[Tensor]) -> list[KlSums]:
        """`KlSums` of each sample of a batch, from the rows of both models."""
        found = self.damage(reference, other).tolist()
        agree = [
            int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum()) for p, q in zip(reference, other, strict=True)
        ]
        return [KlSums(kl, len(p), same) for kl, p, same in zip(found, reference, agree, strict=True)]

    def counts(self, batch: Batch) -> list[int]:
        """How many rows each sample of the batch has."""
        if self.is_answer:
            return [end - start for start, end in batch.answers]
        if self.rows is None:
            return (batch.kinds != PAD).sum(dim=1).tolist()
        return [self.rows] * batch.size


ANSWERS = Readout("answers", 0)
TOKENS = Readout("tokens", None)  # masked language models, classifiers of tokens
OUTPUTS = Readout("outputs", None, by_distance=True)  # encoders
POOLED = Readout("outputs", 1, by_distance=True)  # encoders that give one vector for all of a text
EMBEDDINGS = Readout("embeddings", 2, by_distance=True)  # of an image and its text: CLIP and its kin


def readout_of(model: Any) -> Readout | None:
    """What the damage of `model` is measured on; None where its output is none of these.

    A classifier is known by its class's name, whose ending is the same for all architectures of transformers.
    """
    name = type(model).__name__
    if has_language_head(model):
        return ANSWERS if model.can_generate() else TOKENS
    if name.endswith("ForTokenClassification"):
        return TOKENS
    if name.endswith(("ForSequenceClassification", "ForRewardModel")):
        kind = getattr(model.config, "problem_type", None)
        if kind == "regression":
            return Readout("scores", 1, by_distance=True)
        return Readout("classes", model.config.num_labels if kind == _MULTI_LABEL else 1)
    if name.endswith("TextModelWithProjection"):
        return POOLED
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        return EMBEDDINGS
    has_decoder = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return None if "For" in name or has_decoder else OUTPUTS


_MULTI_LABEL = "multi_label_classification"
_AUDIO = ("input_features", "input_values", "audio_values")
_SPOKEN = ("user_audio_codes", "decoder_input_values")  # of what talks: Moshi, SpeechT5


def audio_needed(model: Any) -> str | None:
    """The input of `model` that is audio and cannot be left out; None if there is none."""
    takes = inspect.signature(model.forward).parameters
    if model.main_input_name in _AUDIO and "input_ids" not in takes:
        return model.main_input_name
    return next((x for x in _SPOKEN if x in takes), None)


def refuse_unread(model: Any) -> None:
    """Raises ModelError for a model whose inputs samples do not make: speech, images without an answer, a
    decoder behind an encoder that gives no answers.
    """
    takes = inspect.signature(model.forward).parameters
    name = type(model).__name__
    audio = audio_needed(model)
    if audio is not None:
        raise ModelError(
            f"{name} works on audio ({audio}), and qprobe measures text and images. Pass --measures weight, "
            "which runs no sample."
        )
    if "input_ids" not in takes and not is_encoder_decoder(model):
        raise ModelError(
            f"{name} reads {model.main_input_name}, and samples here are texts, with or without images. Pass "
            "--measures weight, which runs no sample."
        )
    if getattr(model.config, "is_encoder_decoder", False) and readout_of(model) is None:
        raise ModelError(
            f"{name} is an encoder-decoder without a language head, so its decoder answers nothing. Name the "
            "class with the head in architectures of config.json, or pass --measures weight, which runs no "
            "sample."
        )
    experts = separate_experts(model)
    if experts is not None:
        raise ModelError(
            f"{name} keeps each expert as layers of its own ({experts}), which read only the tokens that are "
            "routed to them, so samples cannot be told apart there. Pass --measures weight, which runs no "
            "sample."
        )
    if is_encoder_decoder(model):
        layout_of(model)


def read_out(model: Any, batch: Batch) -> list[Tensor]:
    """The rows of `readout_of(model)` for each sample: (rows, features) float32; differentiable.

    A sample without an answer gives an empty tensor where answers are read.
    """
    options: dict[str, Any] = {}
    if readout_of(model) == ANSWERS and "logits_to_keep" in inspect.signature(model.forward).parameters:
        length = batch.answering_kinds.shape[1]
        starts = [start for start, end in batch.answers if end > start]
        options["logits_to_keep"] = length - max(min(starts, default=length) - 1, 0)
    return rows_of(model, run_model(model, batch, **options), batch)


def rows_of(model: Any, output: Any, batch: Batch) -> list[Tensor]:
    """The rows of `read_out` in the model's `output` on the batch."""
    readout = readout_of(model)
    assert readout is not None, type(model).__name__
    if readout.is_answer:
        return at_answers(output.logits, batch)
    if readout.name == "scores":
        return list(output.logits.float()[:, None])
    if readout is POOLED:
        return list(output[0].float()[:, None])
    if readout.name == "classes":
        return list(_class_rows(output.logits.float(), readout.rows == 1))
    if readout is EMBEDDINGS:
        return list(torch.stack([output.image_embeds.float(), output.text_embeds.float()], dim=1))
    logits = output.get("logits", output.get("prediction_logits"))
    rows = (output[0] if logits is None else logits).float()
    return [x[k != PAD] for x, k in zip(rows, batch.kinds.to(rows.device), strict=True)]


def _class_rows(logits: Tensor, exclude: bool) -> Tensor:
    """(samples, rows, features) of (samples, labels): one row where labels `exclude` one another.

    A label on its own, of a reward model or beside others, is a yes of this logit against a no of 0.
    """
    if exclude and logits.shape[1] > 1:
        return logits[:, None]
    return torch.stack([torch.zeros_like(logits), logits], dim=-1)


def at_answers(logits: Tensor, batch: Batch) -> list[Tensor]:
    """The rows of `logits` (samples, last positions, vocabulary) that predict answer tokens, as float32.

    One tensor (answer tokens, vocabulary) a sample; empty for a sample without an answer.
    """
    offset = batch.answering_kinds.shape[1] - logits.shape[1]  # 0 where the model computed all positions
    return [
        logits[i, start - 1 - offset : end - 1 - offset].float() if end > start else logits[i, :0].float()
        for i, (start, end) in enumerate(batch.answers)
    ]


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    """(tokens,) KL at each position."""
    log_p = F.log_softmax(reference, dim=-1)
    log_q = F.log_softmax(other, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _distance(reference: Tensor, other: Tensor) -> Tensor:
    """(rows,) squared error of each row over the square of the reference's."""
    return (other - reference).square().sum(dim=-1) / reference.square().sum(dim=-1)


def in_four_bit(
    modules: dict[str, Layer], dequantized: DequantizedWeights, names: frozenset[str]
) -> AbstractContextManager[None]:
    """While open, the layers `names` compute with their 4-bit weights and all others as they are."""
    if not names:
        return nullcontext()
    chosen = {name: modules[name] for name in modules if name in names}
    return replaced_forwards(chosen, lambda name, product, x: times(product, x, dequantized.weight(name)))
