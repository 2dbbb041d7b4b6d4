"""Lines with videos share a batch where a model takes them so, and are refused before it loads elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qprobe.data.conversation import Conversation, Conversations
from qprobe.data.images import png
from qprobe.errors import SampleError
from qprobe.records import Turn, Video
from qprobe.training.rows import check_batches
from qprobe.training.spec import images_digest
from tests import tiny
from tests.inputs.videos import FramesOnly, video_processor


class WholeFrames(FramesOnly):
    """Leaves the frames whole, as LLaVA-OneVision's does."""

    def __call__(self, videos: list[Any], **options: Any) -> dict[str, torch.Tensor]:
        return super().__call__(videos, **options) | {"pixel_values_videos": torch.zeros(1, *videos[0].shape)}


def line(*video: int | bytes) -> Conversation:
    is_file = isinstance(video[0], bytes)
    shown = Video(tuple(x if isinstance(x, bytes) else png(tiny.frames(x)[0]) for x in video), is_file)
    return Conversation(1, "1", (Turn("user", (shown, "what?")), Turn("assistant", ("a cat",))))


def test_videos_of_several_numbers_of_frames_are_named_where_a_batch_cannot_mix_them():
    processor = video_processor()
    lines = [line(0, 1), line(tiny.animation(0, 1)), line(tiny.animation(0, 1, 2))]
    check_batches(lines, 2, processor, torch.float32)
    processor.video_processor = WholeFrames()
    check_batches(lines, 1, processor, torch.float32)
    check_batches(lines[:2], 2, processor, torch.float32)
    with pytest.raises(
        SampleError, match=r"Videos of 2, 3 frames are in the data, .* --accumulation 2 times"
    ):
        check_batches(lines, 2, processor, torch.float32)


def test_a_run_is_told_from_one_on_other_videos_or_their_frames_in_another_order():
    def digest(*lines: Conversation) -> str:
        return images_digest([Conversations("rows", "line", lines)])

    both = Conversation(1, "1", (Turn("user", (*line(0, 1).seen, *line(1, 0).seen)),))
    frames = Conversation(1, "1", (Turn("user", tuple(png(x) for x in tiny.frames(0, 1))),))
    assert len({digest(x) for x in (line(0, 1), line(1, 0), line(0), both, frames)}) == 5
    assert digest(line(0, 1), line(0, 1)) == digest(line(0, 1))
