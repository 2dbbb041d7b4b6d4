"""README's Python as it stands there: scan, select, compare, load, train with TRL; on a CPU with the demo."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import qprobe
from qprobe.data import sampling
from qprobe.demo.folder import demo_folder
from qprobe.demo.scenes import TRAINING_SEED, scenes
from qprobe.errors import SampleError
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve

ROOT = Path(__file__).parents[2]
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


def block_with(words: str) -> str:
    """The block of Python in README.md that holds `words`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = (x for x in blocks if words in x)
    return found


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names of README's "From Python", run on a few scenes; its folder is the working directory."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        patch.setitem(sampling.SCAN_SAMPLES, "demo", 4)
        patch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
        exec(block_with("run = qprobe.scan"), names)
        yield names


def test_readmes_python_runs_as_written(scanned: dict[str, Any]):
    run, smaller, last = (scanned[x] for x in ("run", "smaller", "row"))
    assert run.path == Path("runs/demo-outliers") and run.skiplist == run.path / "skiplist.json"
    assert smaller.budget.limit_bytes < qprobe.read_manifest(run.skiplist).budget.limit_bytes
    assert last.name == "dynamic" and last.kl >= 0


def test_the_lines_of_training_run_as_written(scanned: dict[str, Any]):
    from datasets import Dataset

    code = block_with("SFTTrainer(")
    asked = 'SFTConfig("out", max_steps=100,'
    skiplist = "runs/meta-llama--Llama-3.2-11B-Vision-Instruct/skiplist.json"
    assert asked in code and skiplist in code
    code = code.replace(skiplist, "runs/demo-outliers/skiplist.json").replace(
        asked, 'SFTConfig("out", max_steps=2, logging_steps=1, report_to="none", use_cpu=True, bf16=False,'
    )
    names: dict[str, Any] = {"dataset": Dataset.from_list(rows(4))}
    exec(code, names)

    trainer = names["trainer"]
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
        "a list of turns",
        "conversations",
        "an image by its file",
        "an answer in parts with null keys",
    ],
)
def test_every_shape_that_trainers_collators_take_is_learned_alike(shape: str, tmp_path: Path):
    from datasets import Dataset

    processor = load_processor(resolve(str(demo_folder())))
    (row,) = rows(1)
    (image,), (user, assistant) = row["images"], row["messages"]
    question = {"type": "text", "text": user["content"]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": assistant["content"]}]}
    mark, shown = ({"role": "user", "content": [x, question]} for x in (
        {"type": "image"}, {"type": "image", "image": image}
    ))  # fmt: skip
    image.save(tmp_path / "a.png")
    named = {"role": "user", "content": [{"type": "image", "image": f"{tmp_path}/a.png"}, question]}
    given = {
        "placeholder": {"messages": [mark, assistant], "images": [image]},
        "image in parts": {"messages": [shown, answer]},
        "parts of a Dataset": Dataset.from_list([{"messages": [mark, answer], "images": [image]}])[0],
        "answer in parts": {"messages": [mark, answer], "images": [image]},
        "one image": {"messages": [user, assistant], "image": image},
        "prompt and completion": {"prompt": [user], "completion": [assistant], "images": [image]},
        "prompt and completion in parts": {"prompt": [shown], "completion": [answer]},
        "a list of turns": [shown, answer],
        "conversations": {"conversations": [shown, answer]},
        "an image by its file": {"messages": [named, answer]},
        "an answer in parts with null keys": {
            "messages": [mark, {"role": "assistant", "content": [{**answer["content"][0], "image": None}]}],
            "images": [image],
        },
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
    with pytest.raises(SampleError, match=r"are tokens already.*skip_prepare_dataset"):
        collate([{"input_ids": [1, 2], "labels": [1, 2]}])
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
