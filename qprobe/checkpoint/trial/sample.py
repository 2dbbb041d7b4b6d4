"""A small sample for a trial: a picture and a question through the model's processor, or else bare tokens."""

from __future__ import annotations

import inspect
import io
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from qprobe.data.builtin import QUESTIONS
from qprobe.errors import ModelError, SampleError
from qprobe.inputs.batch import TEXT, Batch, reads_images
from qprobe.inputs.decoder import Decoder, Layout, is_encoder_decoder, layout_of
from qprobe.inputs.processed import ProcessedSamples
from qprobe.measure.kl import ANSWERS, audio_needed, readout_of
from qprobe.records import Sample, asked

TOKENS = 8  # bare ones, where there is no processor
_SIDE = 56  # pixels: two tokens of Qwen2-VL, whose processor takes no less


def trial_batch(model: Any, processor: Any) -> Batch | None:
    """A batch of one sample on the device and in the dtype of `model`; None for a model that reads neither
    text nor, ahead of a decoder, images, or needs audio.

    processor: None, or one that takes no such sample, gives bare tokens and no picture. The decoder behind an
    encoder begins its answer.
    """
    takes = inspect.signature(model.forward).parameters
    if audio_needed(model) is not None or ("input_ids" not in takes and not is_encoder_decoder(model)):
        return None
    batch = _processed(model, processor) or _bare(model)
    if batch is not None and batch.decoder_kinds is None and _needs_decoder(model):
        begin = getattr(model.config, "decoder_start_token_id", None) or 0
        batch = replace(batch, inputs={**batch.inputs, "decoder_input_ids": torch.tensor([[begin]])})
    return None if batch is None else batch.to(model.device)


def _needs_decoder(model: Any) -> bool:
    """False for a classifier, whose decoder reads the text again."""
    return getattr(model.config, "is_encoder_decoder", False) and readout_of(model) in (None, ANSWERS)


def _processed(model: Any, processor: Any) -> Batch | None:
    if processor is None:
        return None
    made = ProcessedSamples(processor, model.dtype, _layout(model))
    try:
        return made.batch([_sample(reads_images(processor))])
    except SampleError:
        return None


def _layout(model: Any) -> Layout:
    """`layout_of`; a decoder of which nothing says how it begins may begin with any token here."""
    try:
        return layout_of(model)
    except ModelError:
        return Layout(decoder=Decoder(0))


def _bare(model: Any) -> Batch | None:
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if model.main_input_name != "input_ids" or size is None:
        return None
    ids = torch.arange(1, TOKENS + 1)[None] % size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = torch.full(ids.shape, TEXT, dtype=torch.uint8)
    return Batch((Sample("tokens", asked(QUESTIONS[0])),), inputs, kinds, ((0, 0),))


def _sample(has_picture: bool) -> Sample:
    if not has_picture:
        return Sample("question", asked(QUESTIONS[0]))
    file = io.BytesIO()
    Image.linear_gradient("L").resize((_SIDE, _SIDE)).convert("RGB").save(file, "PNG")
    return Sample("picture", asked(QUESTIONS[0], file.getvalue()))
