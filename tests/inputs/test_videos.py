"""Videos reach the model as frames, where its processor takes them, and are refused by name elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qprobe.data.conversation import Conversation
from qprobe.data.images import png
from qprobe.data.reasons import Refused
from qprobe.errors import SampleError
from qprobe.inputs.batch import ANSWER, VISION, vision_token_ids
from qprobe.inputs.decoder import Layout
from qprobe.inputs.encoding import IGNORED, encode_conversations, encoding_problem, rows_to_learn
from qprobe.inputs.joining import joined
from qprobe.inputs.processed import ProcessedSamples
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from qprobe.records import Part, Sample, Turn, Video
from tests import tiny
from tests.families import processor_of
from tests.inputs.videos import video_processor

PATCHES_PER_TOKEN = 4


def video(*seeds: int) -> Video:
    return Video(tuple(png(x.convert("RGB")) for x in tiny.frames(*seeds)))


def shown(*parts: Part) -> Sample:
    return Sample(str(hash(parts)), (Turn("user", (*parts, "what moves?")),), "a cat")


def processed(processor: Any) -> ProcessedSamples:
    return ProcessedSamples(processor, torch.float32, Layout(vision_token_ids(tiny.qwen2_vl_config())))


def test_a_processor_is_given_all_frames_and_samples_none_of_them():
    processor = video_processor()
    batch = processed(processor).batch([shown(video(0, 1, 2))])
    ((frames, told),) = processor.video_processor.given
    assert frames.shape == (3, 40, 56, 3) and [int(x[0, 0, 0]) for x in frames] == [10, 50, 90]
    assert told["do_sample_frames"] is False
    assert told["video_metadata"]["fps"] == 2 and list(told["video_metadata"]["frames_indices"]) == [0, 1, 2]
    # Two pairs of frames, the last one filled up, of 2 x 4 patches each.
    assert batch.inputs["video_grid_thw"].tolist() == [[2, 2, 4]]
    assert batch.inputs["pixel_values_videos"].shape[0] == 16
    kinds = batch.kinds[0]
    assert int((kinds == VISION).sum()) == 16 // PATCHES_PER_TOKEN
    answer = processor.tokenizer.decode(batch.inputs["input_ids"][0][kinds == ANSWER])
    assert answer == "a cat<|end|>"


def test_samples_of_one_batch_have_equally_many_frames():
    images, two, also_two, four = shown(tiny.picture(0)), video(0, 1), video(2, 3), video(0, 1, 2, 3)
    samples = [shown(two), shown(four), images, shown(also_two)]
    groups = processed(video_processor()).batches(samples, 4)
    assert groups == [(samples[0], samples[3]), (samples[1],), (samples[2],)]


def test_the_frames_of_a_video_and_their_order_tell_samples_apart():
    one, turned = shown(video(0, 1)), shown(video(1, 0))
    both_frames = shown(*video(0, 1).frames)
    assert len({x.digest for x in (one, turned, both_frames, shown(video(0), video(1)))}) == 4
    found = processed(video_processor())
    pixels = [found.batch([x]).inputs["pixel_values_videos"] for x in (one, turned)]
    assert not np.array_equal(*pixels)


def test_rows_with_videos_images_and_text_alone_are_learned_in_one_batch():
    processor = video_processor()
    rows = [
        Conversation(
            i, str(i), (Turn("user", (*parts, f"question {i}?")), Turn("assistant", (f"answer {i}",)))
        )
        for i, parts in enumerate([(video(0, 1),), (), (tiny.picture(0),), (video(0, 1, 2),)])
    ]
    inputs = encode_conversations(processor, rows, torch.float32)
    assert inputs["pixel_values_videos"].shape[0] == 8 + 16 and len(inputs["image_grid_thw"]) == 1
    for i, (ids, labels) in enumerate(zip(inputs["input_ids"], inputs["labels"], strict=True)):
        assert processor.tokenizer.decode(ids[labels != IGNORED]) == f"answer {i}<|end|>"


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("mllama", "which a MllamaProcessor is not given; give its frames as images"),
        ("gemma3", "which a Gemma3Processor is not given; give its frames as images"),
        ("qwen2_5_vl", "needs torchvision for it: pip install torchvision"),
        ("llava_onevision", "needs torchvision for it: pip install torchvision"),
    ],
)
def test_a_processor_that_takes_no_videos_is_named(family: str, why: str):
    processor, sample = processor_of(family), shown(video(0, 1))
    row = Conversation(1, "1", (*sample.turns, Turn("assistant", ("a cat",))))
    assert why in (ProcessedSamples(processor, torch.float32).refusal(sample) or "")
    with pytest.raises(Refused, match=why):
        rows_to_learn(processor, row)


def test_a_model_of_text_reads_no_video(tiny_folder: Callable[[str], Path]):
    processor = load_processor(resolve(str(tiny_folder("llama"))))
    why = "it has a video, but the model reads text only"
    assert ProcessedSamples(processor, torch.float32).refusal(shown(video(0, 1))) == why


def test_a_text_that_spells_out_a_video_is_refused():
    processor, sample = video_processor(), Sample("a", (Turn("user", ("<|video_pad|>?",)),), "b")
    why = "its text contains <|video_pad|>, which stands for a video in this model"
    assert processed(processor).refusal(sample) == why
    row = Conversation(1, "1", (*sample.turns, Turn("assistant", ("b",))))
    assert encoding_problem(processor, row, torch.float32, 100) == why


def test_a_batch_of_videos_whose_frames_are_an_axis_takes_one_number_of_them():
    whole = {"input_ids": torch.ones(1, 2, dtype=torch.long)}  # as LLaVA-OneVision's processor gives them
    rows = [{**whole, "pixel_values_videos": torch.ones(1, frames, 3, 4, 4)} for frames in (2, 2, 3)]
    assert joined(rows[:2], "right", 0)["pixel_values_videos"].shape == (2, 2, 3, 4, 4)
    with pytest.raises(SampleError, match="videos of several numbers of frames"):
        joined(rows, "right", 0)
