"""Which rows are trained on: those with answers that count, and that the model's processor can encode."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qprobe.data.conversation import Conversation, Conversations, Skipped
from qprobe.data.reading import Reading, check_left_out, read_conversations
from qprobe.data.reasons import Refused
from qprobe.data.turns import held, learning
from qprobe.errors import SampleError
from qprobe.inputs.decoder import Layout
from qprobe.inputs.encoding import encode_conversations, encoding_problem, rows_to_learn
from qprobe.options import FinetuneOptions, Progress
from qprobe.records import Video
from qprobe.system.wording import named


@dataclass(frozen=True)
class Lines:
    """What a run trains on and evaluates. spec: everything that decides the adapter; skipped: one sentence
    per row that was left out; notes: on what of the others was not read, and as of `kept_whole`.
    """

    spec: Mapping[str, Any]
    train: tuple[Conversation, ...]
    held_out: tuple[Conversation, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


def learnable(data: Any, options: FinetuneOptions, progress: Progress) -> Conversations:
    """The conversations of `data` with the answers that --turns names; before a model is loaded.

    Raises SampleError if the data cannot be read, or too many rows are left out.
    """
    how = Reading(options.split, options.allow_downloads)
    found = read_conversations(data, how, progress=progress)
    good: list[Conversation] = []
    skipped = list(found.skipped)
    for one in found.good:
        try:
            good.append(learning(one, options.turns))
        except Refused as reason:
            skipped.append(Skipped(one.row, str(reason)))
    left = replace(found, good=tuple(good), skipped=_in_order(skipped))
    check_left_out(left, options.bad_data, "train on")
    return left


def encodable(
    found: Conversations,
    processor: Any,
    dtype: torch.dtype,
    max_length: int,
    progress: Progress,
    layout: Layout = Layout(),  # noqa: B008  # frozen
) -> Conversations:
    """`found` as rows that can be learned; those that the model's processor cannot encode are skipped.

    layout: of the model. Those with more tokens than it has positions are skipped too.
    """
    good: list[Conversation] = []
    skipped = list(found.skipped)
    for done, one in enumerate(found.good, start=1):
        try:
            rows = rows_to_learn(processor, one, layout.decoder)
            problems = (encoding_problem(processor, x, dtype, max_length, layout) for x in rows)
            problem = next(filter(None, problems), None)
        except Refused as reason:
            rows, problem = (), str(reason)
        if problem is None:
            good += rows
        else:
            skipped.append(Skipped(one.row, problem))
        progress("check data", done, len(found.good))
    return replace(found, good=tuple(good), skipped=_in_order(skipped))


def check_batches(lines: Sequence[Conversation], batch_size: int, processor: Any, dtype: torch.dtype) -> None:
    """Raises SampleError if a batch could mix lines that the model does not take in one.

    Those with and without an image, or videos of several numbers of frames.
    """
    _check_frames(lines, batch_size, processor, dtype)
    with_image = [x for x in lines if x.seen]
    if batch_size == 1 or len(with_image) in (0, len(lines)):
        return
    without = next(x for x in lines if not x.seen)
    try:
        encode_conversations(processor, [with_image[0], without], dtype)
    except SampleError:
        raise SampleError(
            f"{len(with_image)} of {len(lines)} lines have an image, and a batch cannot mix both kinds: this "
            "model takes none. "
            f"Pass --batch-size 1 with --accumulation {batch_size} times as large."
        ) from None


def _check_frames(lines: Sequence[Conversation], batch_size: int, processor: Any, dtype: torch.dtype) -> None:
    with_video = [x for x in lines if any(isinstance(one, Video) for one in x.seen)]
    if batch_size == 1 or len(with_video) < 2:
        return
    seen = [[one for turn in held(x.turns) for one in turn.seen] for x in with_video]
    frames = [[len(one.frames) for one in some if isinstance(one, Video)] for some in seen]
    shortest, longest = (choose(range(len(frames)), key=frames.__getitem__) for choose in (min, max))
    if frames[shortest] == frames[longest]:
        return
    try:
        encode_conversations(processor, [with_video[shortest], with_video[longest]], dtype)
    except SampleError:
        counts = named([str(x) for x in sorted({x for some in frames for x in some})])
        raise SampleError(
            f"Videos of {counts} frames are in the data, and a batch cannot mix several numbers: this model "
            "takes none. Give all as many, or pass "
            f"--batch-size 1 with --accumulation {batch_size} times as large."
        ) from None


def split(
    files: Sequence[tuple[Conversation, ...]], options: FinetuneOptions
) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
    """(to train on, held out): the two files, or a share of the one that the seed draws."""
    lines = files[0]
    if len(files) > 1:
        return lines, files[1]
    count = round(options.held_out * len(lines))
    if options.held_out > 0 and len(lines) > 1:
        count = min(max(count, 1), len(lines) - 1)
    chosen = set(random.Random(options.seed).sample(range(len(lines)), count))
    train = tuple(x for i, x in enumerate(lines) if i not in chosen)
    if not train:
        raise SampleError(f"--held-out {options.held_out} leaves nothing to train on. Pass a smaller share.")
    return train, tuple(lines[i] for i in sorted(chosen))


def _in_order(skipped: list[Skipped]) -> tuple[Skipped, ...]:
    return tuple(sorted(skipped, key=lambda x: x.row))
