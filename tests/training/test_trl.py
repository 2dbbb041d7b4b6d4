"""README's three lines: scan, load_dynamic_4bit, TRL's SFTTrainer; on a CPU with the demo."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

import qprobe
from qprobe.demo import demo_folder
from qprobe.demo.scenes import TRAINING_SEED, scenes
from qprobe.errors import SampleError
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from tests.emulation import compute_bf16_by_float32

pytestmark = [
    pytest.mark.slow,
    # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # trl 1.16.0 hands transformers the options by their old names; can go with the first that does not.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning"),
]


def rows(count: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": x.prompt},
                {"role": "assistant", "content": x.answer},
            ],
            "images": [Image.open(io.BytesIO(x.images[0]))],
        }
        for x in scenes(count, TRAINING_SEED + 9)
    ]


def test_the_three_lines_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    monkeypatch.chdir(tmp_path)
    compute_bf16_by_float32(monkeypatch.setattr)
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    dataset = Dataset.from_list(rows(4))

    found = qprobe.scan("demo", samples=6, device="cpu")
    assert found.skiplist is not None
    model, processor = qprobe.load_dynamic_4bit(found.skiplist, device="cpu", for_training=True)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig("out", max_steps=2, per_device_train_batch_size=1, logging_steps=1, report_to="none",
                       use_cpu=True, bf16=False),
        train_dataset=dataset,
        processing_class=processor,
        data_collator=qprobe.answer_collator(processor),
        peft_config=LoraConfig(r=16, target_modules=qprobe.lora_targets(model)),
    )  # fmt: skip
    trainer.train()

    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert len(losses) == 2 and all(0 < x < 5 for x in losses)
    frozen = {n: p.dtype for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert set(frozen.values()) == {torch.bfloat16, torch.uint8}
    assert all("lora_" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert all(p.abs().sum() > 0 for p in moved)


@pytest.mark.parametrize(
    "shape",
    [
        "placeholder",
        "image in parts",
        "parts of a Dataset",
        "answer in parts",
        "one image",
        "prompt and completion",
        "prompt and completion in parts",
        "texts",
    ],
)
def test_every_shape_that_trainers_collators_take_is_learned_alike(shape: str):
    from datasets import Dataset

    processor = load_processor(resolve(str(demo_folder())))
    (row,) = rows(1)
    (image,), (user, assistant) = row["images"], row["messages"]
    question = {"type": "text", "text": user["content"]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": assistant["content"]}]}
    mark, shown = ({"role": "user", "content": [x, question]} for x in (
        {"type": "image"}, {"type": "image", "image": image}
    ))  # fmt: skip
    given = {
        "placeholder": {"messages": [mark, assistant], "images": [image]},
        "image in parts": {"messages": [shown, answer]},
        "parts of a Dataset": Dataset.from_list([{"messages": [mark, answer], "images": [image]}])[0],
        "answer in parts": {"messages": [mark, answer], "images": [image]},
        "one image": {"messages": [user, assistant], "image": image},
        "prompt and completion": {"prompt": [user], "completion": [assistant], "images": [image]},
        "prompt and completion in parts": {"prompt": [shown], "completion": [answer]},
        "texts": {"prompt": user["content"], "completion": assistant["content"], "images": [image]},
    }[shape]
    collate = qprobe.answer_collator(processor)
    wanted, found = collate([row, row]), collate([given, row])
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    learned = wanted["input_ids"][0][wanted["labels"][0] != -100]
    assert processor.tokenizer.decode(learned).startswith(assistant["content"])


def test_rows_of_both_kinds_are_learned_alike_and_bad_ones_are_named():
    processor = load_processor(resolve(str(demo_folder())))
    (row,) = rows(1)
    collate = qprobe.answer_collator(processor)
    user, assistant = row["messages"]
    split = {"prompt": [user], "completion": [assistant], "image": row["images"][0]}
    one, other = collate([row]), collate([split])
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert 0 < (one["labels"] != -100).sum() < one["labels"].numel() / 2
    with pytest.raises(SampleError, match="no answer to learn"):
        collate([{"messages": [user], "images": row["images"]}])
    with pytest.raises(SampleError, match="1 place for images and 2 images"):
        collate(
            [
                {
                    **row,
                    "messages": [{**user, "content": f"<image>{user['content']}"}, assistant],
                    "images": [row["images"][0], row["images"][0].rotate(180)],
                }
            ]
        )
