"""What the processor makes of samples: each text with its images is processed once while it is needed.

A batch is put together from its samples' own inputs, so that telling the shapes of images apart, and every
pass over the same samples, runs the processor no further time and decodes no image again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qprobe.inputs.batch import (
    Batch,
    UnreadableError,
    cut,
    full_text,
    mark_in,
    marked,
    process,
    process_image,
    prompt_text,
    seen,
    tokenizer_of,
)
from qprobe.inputs.decoder import Decoder, Layout, read_ahead, with_answers
from qprobe.inputs.joining import TEXT_KEYS, Inputs, Side, joined, stacked
from qprobe.records import Sample, Video

ROOM_BYTES = 2**29  # of inputs that are held: those of 35 images of four tiles of 560 pixels, in 16-bit

Key = tuple[tuple[bytes | Path | Video, ...], str]  # what is shown, and the text

_NOT_INPUTS = ("labels",)  # what PaliGemma's processor adds for training: the model would compute a loss


class ProcessedSamples:
    """The inputs of samples on the CPU, floating ones in `dtype`.

    Holds the inputs of one kind of text at a time, prompts or prompts with answers, up to `room_bytes`; what
    does not fit is processed again when it is next asked for. All shapes of processed images are
    held.
    layout: how the model reads them, see `layout_of`. An encoder reads no answers.
    """

    def __init__(
        self,
        processor: Any,
        dtype: torch.dtype,
        layout: Layout = Layout(),  # noqa: B008  # frozen
        room_bytes: int = ROOM_BYTES,
    ) -> None:
        self.processor = processor
        self._dtype = dtype
        self._layout = layout
        self._room_bytes = room_bytes
        self._kind = ""
        self._held: dict[Key, Inputs] = {}
        self._shapes: dict[Key, tuple] = {}

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """One batch of `samples`, texts with their answers, padded on the right.

        Raises SampleError if the processor cannot read them.
        """
        decoder, vision = self._layout.decoder, self._layout.vision_token_ids
        if decoder is None:
            inputs = self._joined(samples, "full", "right")
            return marked(self.processor, samples, inputs, vision)
        prompts = [replace(s, answer=None) for s in samples]
        inputs = self._encoded(samples)
        if decoder.sees_alone:
            read = seen(prompts, inputs)
        else:
            read = marked(self.processor, prompts, inputs, vision)
        return with_answers(replace(read, samples=tuple(samples)), self.processor, decoder)

    def prompts(self, samples: Sequence[Sample]) -> Inputs:
        """Inputs of `samples` without their answers. Errors as of `batch`.

        Padded on the left, where the answer follows them; on the right where an encoder reads them. Those
        that a decoder reads are of one length, as `batches` cuts them.
        """
        decoder = self._layout.decoder
        if decoder is None:
            return self._joined(samples, "prompt", "left")
        inputs = self._encoded(samples)
        if decoder.prompt != "decoder":
            return inputs
        ids = [read_ahead(self.processor, decoder, s) for s in samples]
        return {**inputs, "decoder_input_ids": torch.tensor(ids)}

    def _encoded(self, samples: Sequence[Sample]) -> Inputs:
        """What the encoder reads of `samples`."""
        decoder = self._layout.decoder
        if decoder is not None and decoder.sees_alone:
            return stacked([self._inputs(s, "prompt") for s in samples])
        return self._joined(samples, "prompt", "right")

    @property
    def decoder(self) -> Decoder | None:
        """Of an encoder-decoder."""
        return self._layout.decoder

    def refusal(self, sample: Sample) -> str | None:
        """Why the template, the processor or the model's positions do not take `sample`; None if they do.

        What they make of it is held: prompts of samples without an answer in preference.
        """
        mark = mark_in(self.processor, [*(x.text for x in sample.turns), sample.answer or ""])
        if mark is not None:
            return mark
        kind = self._kind_of(sample)
        try:
            if kind == "full" and self._kind == "prompt":
                made = self._made(sample, full_text(self.processor, sample))
            else:
                made = self._inputs(sample, kind)
        except UnreadableError as error:
            return error.why
        return self._layout.excess(made["input_ids"].shape[1]) if "input_ids" in made else None

    def batches(self, samples: Iterable[Sample], size: int) -> list[tuple[Sample, ...]]:
        """`samples` in groups of at most `size` whose images have one processed shape, in stable order."""
        return cut(self.one_shape_groups(samples), size)

    def one_shape_groups(self, samples: Iterable[Sample]) -> list[tuple[Sample, ...]]:
        """`samples` in groups whose images have one processed shape, in stable order."""
        by_shape: dict[tuple, list[Sample]] = {}
        for sample in samples:
            by_shape.setdefault((*self._shape(sample), *self._ahead(sample)), []).append(sample)
        return [tuple(group) for group in by_shape.values()]

    def _shape(self, sample: Sample) -> tuple:
        if not sample.seen:
            return ()
        key = (sample.seen, prompt_text(self.processor, sample))
        if key not in self._shapes:
            self._inputs(sample, self._kind_of(sample))
        return self._shapes[key]

    def _ahead(self, sample: Sample) -> tuple[int, ...]:
        """How many tokens a decoder reads ahead of the answer: positions of some do not take padding."""
        if self.decoder is None or self.decoder.prompt != "decoder":
            return ()
        return (len(read_ahead(self.processor, self.decoder, sample)),)

    def _kind_of(self, sample: Sample) -> Literal["prompt", "full"]:
        """The text of `sample` that is processed first."""
        return "prompt" if sample.answer is None or self.decoder is not None else "full"

    def _inputs(self, sample: Sample, kind: Literal["prompt", "full"]) -> Inputs:
        text = (prompt_text if kind == "prompt" else full_text)(self.processor, sample)
        key = (sample.seen, text)
        if key not in self._held:
            found = self._made(sample, text)
            self._hold(key, found, kind)
            return found
        return self._held[key]

    def _made(self, sample: Sample, text: str) -> Inputs:
        """The inputs of `sample`, of which the shape of its images is kept."""
        if self.decoder is not None and self.decoder.sees_alone:
            made = process_image(self.processor, sample, text if self.decoder.prompt == "image" else None)
        else:
            made = process(self.processor, [sample], [text], "right")
        found = {
            k: v.to(self._dtype) if v.is_floating_point() else v
            for k, v in made.items()
            if isinstance(v, Tensor) and k not in _NOT_INPUTS
        }
        if "input_ids" in found:  # for which SigLIP's tokenizer gives no mask
            found.setdefault("attention_mask", torch.ones_like(found["input_ids"]))
        self._shapes[sample.seen, prompt_text(self.processor, sample)] = _shape_of(found)
        return found

    def _hold(self, key: Key, inputs: Inputs, kind: str) -> None:
        if kind != self._kind:
            self._held.clear()
            self._kind = kind
        held = sum(x.nbytes for one in (*self._held.values(), inputs) for x in one.values())
        if held <= self._room_bytes:
            self._held[key] = inputs

    def _joined(self, samples: Sequence[Sample], kind: Literal["prompt", "full"], side: Side) -> Inputs:
        found = [self._inputs(s, kind) for s in samples]
        return joined(found, side, tokenizer_of(self.processor).pad_token_id)


def _shape_of(inputs: Inputs) -> tuple:
    """What decides how many rows a sample's images have in the model: their shapes as they were processed.

    Where images of several sizes are padded to the largest of their sample (Pixtral), their sizes as well.
    """
    shapes = sorted((k, tuple(v.shape)) for k, v in inputs.items() if k not in TEXT_KEYS)
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    if pixels is None or sizes is None or pixels.dim() != 4 or len(pixels) != len(sizes):
        return tuple(shapes)
    return (*shapes, *sizes.flatten().tolist())
