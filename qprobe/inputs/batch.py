"""Samples -> processor inputs, in batches in which every sample owns equal shares of the vision rows.

Samples of one batch have images of one processed shape. Vision tensors are sample-major, so that
rows can be told apart by sample; texts are padded on the right and pads are marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qprobe.data.images import decode
from qprobe.data.reasons import Refused, shown
from qprobe.data.rendering import Template
from qprobe.data.videos import PER_SECOND
from qprobe.errors import SampleError, is_out_of_memory
from qprobe.inputs.counting import counting_each
from qprobe.loading.processor import pad_tokenizer
from qprobe.records import Part, Sample, Video

PAD, VISION, TEXT, ANSWER = 0, 1, 2, 3
KIND_NAMES = {VISION: "vision", TEXT: "text", ANSWER: "answer"}

# What processors raise at images and texts that they do not take.
PROCESSOR_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, OSError, RuntimeError)

# Processors that write bos and a line break around the text themselves, and take the answer apart from it:
# the answer follows that line break, and the model reads it causally by its token types.
SUFFIXED = ("PaliGemmaProcessor",)

# Processors whose videos were tried: they take them as arrays of frames, and tell how often these were taken.
TAKING_VIDEOS = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor", "LlavaOnevisionProcessor")

# Processors that write the tokens of an image ahead of the text themselves, and what else stands around it.
WRITING_IMAGES = ("Florence2Processor", "Blip2Processor", "InstructBlipProcessor")


class UnreadableError(SampleError):
    """Samples that the model's template or processor refuses; `why` is a clause without a full stop."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


@dataclass(frozen=True)
class Batch:
    """Model inputs of B samples.

    inputs: keyword arguments of the model's forward, sample-major along dimension 0.
    kinds: (B, T) uint8 on the CPU: PAD, VISION, TEXT or ANSWER of each token. Of an encoder that reads an
    image alone: of its patches, or (B, 0) where only the model knows how many there are.
    answers: for each sample (start, end), its answer tokens in the sequence; start == end if it has none.
    decoder_kinds: (B, U) as `kinds`, of what a decoder behind an encoder reads: PAD, ANSWER, or TEXT of a
    prompt; U is never T. None for a model that reads one sequence. With it `kinds` are the encoder's, and
    `answers` count the tokens that the decoder reads and, behind them, the last one that it puts out.
    weight: how often each of its tokens counts where calibrated codes are fitted to it.
    """

    samples: tuple[Sample, ...]
    inputs: dict[str, Tensor]
    kinds: Tensor
    answers: tuple[tuple[int, int], ...]
    decoder_kinds: Tensor | None = None
    weight: float = 1.0

    @property
    def size(self) -> int:
        return len(self.samples)

    @property
    def answering_kinds(self) -> Tensor:
        """The kinds of the sequence whose tokens predict the answers."""
        return self.kinds if self.decoder_kinds is None else self.decoder_kinds

    def kinds_of(self, rows: int, reads: Literal["text", "vision"] = "text") -> Tensor | None:
        """The kinds of the sequence with `rows` tokens; None if none has so many.

        reads: of the layer that reads it, see `qprobe.records.Linear`. What reads vision tokens alone reads a
        sequence of the batch only if its encoder does.
        """
        encoders = self.kinds if reads == "text" or "input_ids" not in self.inputs else None
        sequences = (encoders, self.decoder_kinds if reads == "text" else None)
        return next((x for x in sequences if x is not None and x.shape[1] == rows), None)

    @property
    def answer_tokens(self) -> int:
        return sum(end - start for start, end in self.answers)

    @property
    def elements(self) -> int:
        """Of all inputs together, a measure of what running the batch takes."""
        return sum(tensor.numel() for tensor in self.inputs.values())

    def to(self, device: torch.device) -> Batch:
        """The same batch with its inputs on `device`."""
        return replace(self, inputs={k: v.to(device, non_blocking=True) for k, v in self.inputs.items()})

    def in_dtype(self, dtype: torch.dtype) -> Batch:
        """The same batch with its floating inputs in `dtype`."""
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        return replace(self, inputs=inputs)

    def repeated(self, times: int) -> Batch:
        """The batch `times` times after itself: samples a, b become a, b, a, b."""
        return Batch(
            self.samples * times,
            {k: torch.cat([v] * times) for k, v in self.inputs.items()},
            torch.cat([self.kinds] * times),
            self.answers * times,
            None if self.decoder_kinds is None else torch.cat([self.decoder_kinds] * times),
            self.weight,
        )


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor, or the processor itself if it is one."""
    return getattr(processor, "tokenizer", processor)


def reads_images(processor: Any) -> bool:
    """True if the model's processor takes images."""
    return hasattr(processor, "image_processor")


def video_problem(processor: Any, seen: Sequence[bytes | Path | Video]) -> str | None:
    """Why the model's processor does not take the videos in `seen`, a clause; None if it does."""
    if not any(isinstance(x, Video) for x in seen):
        return None
    if tokenizer_of(processor) is processor:
        return "it has a video, but the model reads text only"
    if not _is_one_of(processor, TAKING_VIDEOS):
        return f"it has a video, which a {type(processor).__name__} is not given; give its frames as images"
    if getattr(processor, "video_processor", None) is None:
        return "it has a video, and the model's processor needs torchvision for it: pip install torchvision"
    return None


def has_template(processor: Any) -> bool:
    """True if a chat template writes the text; else it is the plain one of `prompt_text`."""
    return bool(getattr(processor, "chat_template", None)) and not _takes_suffix(processor)


def _takes_suffix(processor: Any) -> bool:
    return _is_one_of(processor, SUFFIXED)


def _is_one_of(processor: Any, names: tuple[str, ...]) -> bool:
    return any(x.__name__ in names for x in type(processor).__mro__)


def prompt_text(processor: Any, sample: Sample) -> str:
    """The text a model reads before its answer: the chat template's, or else plain image tokens and texts.

    Plain, each turn stands on a line of its own; the answer follows behind a space, or white space that is
    there.
    Raises UnreadableError where the template does not keep the texts of the sample, and for a video that the
    processor does not take.
    """
    problem = video_problem(processor, sample.seen)
    if problem is not None:
        raise UnreadableError(f"Sample {sample.id!r} cannot be read: {problem}.", problem)
    if has_template(processor):
        try:
            return Template(processor).prompt(sample.turns)
        except Refused as reason:
            said = f"Sample {sample.id!r} cannot be read: {reason}. Leave it out."
            raise UnreadableError(said, str(reason)) from None
    lines = ["".join(_plain(processor, x) for x in turn.parts) for turn in sample.turns]
    return "\n".join([*lines, ""] if _takes_suffix(processor) else lines)


def _plain(processor: Any, part: Part) -> str:
    """`part` in a text without a template."""
    if isinstance(part, str):
        return part
    if _is_one_of(processor, WRITING_IMAGES):
        return ""
    return getattr(processor, "video_token" if isinstance(part, Video) else "image_token", "")


def full_text(processor: Any, sample: Sample) -> str:
    """Prompt, answer and end token (where the answer ends); the prompt alone without an answer."""
    prompt = prompt_text(processor, sample)
    if sample.answer is None:
        return prompt
    separator = "" if has_template(processor) or prompt[-1:].isspace() else " "
    end = (tokenizer_of(processor).eos_token or "") if sample.ends else ""
    return f"{prompt}{separator}{sample.answer}{end}"


def mark_in(processor: Any, texts: Sequence[str]) -> str | None:
    """Why `texts` are not read as they are written: one spells out a mark of the model's; None if none does.

    A special token would end an answer or open a turn in its middle. Without a chat template the text is the
    whole prompt, and only what stands for an image cannot be meant.
    """
    for kind in ("an image", "a video"):
        token = str(getattr(processor, f"{kind.split()[1]}_token", None) or "")
        if token and any(token in x for x in texts):
            return f"its text contains {token}, which stands for {kind} in this model"
    if not has_template(processor):
        return None
    # Of one character are a few models' padding tokens, such as CLIP's "!".
    specials = [x for x in tokenizer_of(processor).all_special_tokens if len(x) > 1]
    found = next((x for x in specials if any(x in text for text in texts)), None)
    if found is None:
        return None
    return f"its text contains {found}, which the model reads as a mark of its own, not as text"


def process(
    processor: Any, samples: Sequence[Sample], texts: list[str], side: Literal["left", "right"]
) -> dict:
    """What `processor` makes of the samples' images and videos and of `texts`, padded on `side`.

    Raises UnreadableError if a sample shows what the model does not take, or the processor refuses it.
    """
    with _refusals_explained(samples):
        return _processed(processor, samples, texts, side)


def process_image(processor: Any, sample: Sample, text: str | None) -> dict:
    """What an encoder that reads one image and no text reads of `sample`; text: drawn onto the image.

    Raises UnreadableError if the sample has not one image, or the processor refuses it.
    """
    if len(sample.images) != 1:
        has = f"it has {len(sample.images)} images" if sample.images else "it has no image"
        why = f"{has}, and the model's encoder reads one image per row"
        raise UnreadableError(f"Sample {sample.id!r} cannot be read: {why}. Leave it out.", why)
    with _refusals_explained([sample]):
        image = decode(sample.images[0]).image
        if text is None:
            return dict(processor.image_processor([image], return_tensors="pt"))
        return dict(processor(images=[image], text=[text], return_tensors="pt"))


@contextmanager
def _refusals_explained(samples: Sequence[Sample]) -> Iterator[None]:
    """Turns what a processor raises into an UnreadableError."""
    try:
        yield
    except PROCESSOR_ERRORS as error:
        if is_out_of_memory(error):  # which halves of the batch may not need
            raise
        names = ", ".join(repr(s.id) for s in samples)
        said = shown(str(error).strip().partition("\n")[0], 200) or type(error).__name__
        raise UnreadableError(
            f"The model's processor cannot read {names} ({said}). Leave such a sample out, or take special "
            "tokens out of its texts.",
            f"the model's processor cannot read it ({said})",
        ) from error


def _processed(
    processor: Any, samples: Sequence[Sample], texts: list[str], side: Literal["left", "right"]
) -> dict:
    tokenizer = tokenizer_of(processor)
    pad_tokenizer(tokenizer)
    bos = tokenizer.bos_token
    options: dict[str, Any] = dict(return_tensors="pt", padding=True, padding_side=side)
    options["add_special_tokens"] = not (bos and all(t.startswith(bos) for t in texts))
    with_image = [s for s in samples if s.images]
    if _takes_suffix(processor):
        return _suffixed(processor, samples, texts, options)
    if tokenizer is processor:
        if with_image:
            said = f"Sample {with_image[0].id!r} has an image, but the model reads text only."
            raise UnreadableError(said, "it has an image, but the model reads text only")
        return dict(processor(texts, **options))
    if _is_one_of(processor, WRITING_IMAGES):
        options.pop("add_special_tokens")
    videos = [x for s in samples for x in s.videos]
    if videos:
        options |= _of_videos(videos)
    if with_image:
        options["images"] = [[decode(x).image for x in s.images] for s in with_image]
    return dict(counting_each(processor)(text=texts, **options))


def _of_videos(videos: Sequence[Video]) -> dict[str, Any]:
    """What a processor is told of `videos`: all frames as they are, (frames, height, width, 3) of uint8."""
    arrays = [
        np.stack([np.asarray(decode(x).image) for x in video.frames if isinstance(x, bytes)])
        for video in videos
    ]
    told = [
        {
            "total_num_frames": len(x),
            "fps": PER_SECOND,
            "duration": len(x) / PER_SECOND,
            "frames_indices": list(range(len(x))),
            "height": x.shape[1],
            "width": x.shape[2],
        }
        for x in arrays
    ]
    return {"videos": arrays, "videos_kwargs": {"video_metadata": told, "do_sample_frames": False}}


def _suffixed(processor: Any, samples: Sequence[Sample], texts: list[str], options: dict) -> dict:
    """The inputs where the processor writes what stands around a prompt and takes the answer behind it."""
    prompts = [prompt_text(processor, s) for s in samples]
    answers = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    images = [[decode(x).image for x in s.images] for s in samples if s.images]
    given = [x.removesuffix("\n") for x in prompts]
    if any(answers):  # the processor would add an end to each, also to one that was cut
        options = {**options, "text_pair": answers}
    made = dict(processor(images=images or None, text=given, **options))
    made.pop("labels", None)
    return made


def marked(
    processor: Any, samples: Sequence[Sample], inputs: dict[str, Tensor], vision_token_ids: Sequence[int]
) -> Batch:
    """The batch of `inputs`, padded on the right, with the kind of each token and where the answers are.

    vision_token_ids mark vision tokens in the sequence (the model config's).
    """
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    answers = tuple(
        (length - _answer_length(processor, sample, inputs["input_ids"][i, :length].tolist()), length)
        for i, (sample, length) in enumerate(zip(samples, lengths, strict=True))
    )
    kinds = torch.full(inputs["input_ids"].shape, TEXT, dtype=torch.uint8)
    kinds[torch.isin(inputs["input_ids"], torch.tensor(vision_token_ids, dtype=torch.long))] = VISION
    for i, (start, end) in enumerate(answers):
        kinds[i, start:end] = ANSWER
        kinds[i, end:] = PAD
    return Batch(tuple(samples), inputs, kinds, answers)


def seen(samples: Sequence[Sample], inputs: dict[str, Tensor]) -> Batch:
    """The batch of `inputs` of images alone, whose patches are known where the processor cuts them."""
    mask = inputs.get("attention_mask", torch.zeros(len(samples), 0))
    kinds = torch.where(mask > 0, VISION, PAD).to(torch.uint8)
    return Batch(tuple(samples), inputs, kinds, ((0, 0),) * len(samples))


def _answer_length(processor: Any, sample: Sample, ids: list[int]) -> int:
    """How many of the last `ids` are the answer's (and its end token's)."""
    if not sample.answer:
        return 0
    tail = full_text(processor, sample)[len(prompt_text(processor, sample)) :]
    alone = tokenizer_of(processor)(tail, add_special_tokens=False)["input_ids"]
    if ids[len(ids) - len(alone) :] == alone:
        return len(alone)
    # The tokenizer joins prompt and answer at the seam: count what follows the longest common prefix. Images
    # stand before it, so the texts tell it as they are.
    prompt, whole = (
        text_ids(processor, x) for x in (prompt_text(processor, sample), full_text(processor, sample))
    )
    same = (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
    return len(whole) - next(same, min(len(prompt), len(whole)))


def text_ids(processor: Any, text: str) -> list[int]:
    """The tokens of `text`, each image as the one token that the text has for it."""
    tokenizer = tokenizer_of(processor)
    adds = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return tokenizer(text, add_special_tokens=adds)["input_ids"]


def vision_token_ids(config: Any) -> tuple[int, ...]:
    """Ids of the tokens that stand for (a patch of) an image and of a video, of which there may be none."""
    found = []
    for kind in ("image", "video"):
        values = (getattr(config, f"{kind}_token_{x}", None) for x in ("id", "index"))
        found += [x for x in values if isinstance(x, int)][:1]
    return tuple(found)


def cut(groups: Iterable[Sequence[Sample]], size: int) -> list[tuple[Sample, ...]]:
    """Each of `groups` cut into parts of at most `size`, in order."""
    return [tuple(group[i : i + size]) for group in groups for i in range(0, len(group), size)]
