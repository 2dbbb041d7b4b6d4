"""Seconds per step of `qprobe finetune` beside plain transformers and peft, in one run.

    python -m tests.benchmarks.training_speed [--geometry tiny] [--device cuda] [--work DIR] [--out FILE]

Writes a checkpoint with seeded random weights (--geometry 11b: the exact one of Llama-3.2-11B-Vision, 20 GiB)
and lines of one image of 4 tiles and text that make 2,048 tokens. Trains on them, one line per step, adapters
of rank 16 on the same layers, recomputed blocks, AdamW in 8 bit on CUDA:

- plain: `from_pretrained` with a BitsAndBytesConfig, peft's `prepare_model_for_kbit_training`, LoraConfig and
  the Trainer with bf16 autocast, as peft's documentation shows it; its collator calls the processor;
- qprobe, on the same layers in 4-bit (standard) and with the published list kept in 16-bit (dynamic).

Plain runs first and last, so that drift of the machine shows. The mark is 1.05 times plain. A step is the
median of those after the warm-up, from the end of one to the end of the next: reading, collation and the loss
that is logged are in it. `tiny` checks the script on a CPU.

With `--processes N`: instead, `qprobe finetune` by one process and by N under torchrun, a GPU each, in steps
of the same lines: images per second over the whole training, and how far the loss curves are apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    MllamaProcessor,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from qprobe.checkpoint.ready import lora_targets
from qprobe.checkpoint.starts.attached import peft_library
from qprobe.inputs.encoding import encode_conversations
from qprobe.loading.processor import load_processor
from qprobe.loading.source import resolve
from qprobe.manifest.write import write_manifest
from qprobe.training.finetune import finetune
from tests import tiny
from tests.benchmarks.cost import build, full_config, tiny_config
from tests.benchmarks.hardware import made_with
from tests.benchmarks.training_memory import published_kept
from tests.checkpoint.manifests import inventory_of, manifest_for

MARK = 1.05
WARM_UP, RANK, TILES = 4, 16, 4
GIB = 1 << 30
WORDS = "please answer with the name of the colour, the number and the unit "


@dataclass(frozen=True)
class Timed:
    """One training. steps: seconds of each after the warm-up; peak_bytes: of device memory."""

    name: str
    steps: tuple[float, ...]
    peak_bytes: int

    @property
    def median(self) -> float:
        return statistics.median(self.steps)


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        self.tick("train", state.global_step, state.max_steps)

    def tick(self, stage: str, _done: int, _total: int) -> None:
        """A `Progress` as well."""
        if stage == "train":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    def steps(self) -> tuple[float, ...]:
        """Seconds from the end of one step to that of the next, after the warm-up."""
        return tuple(b - a for a, b in zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:], strict=False))


@dataclass(frozen=True)
class Bench:
    """The checkpoint, its lines, and how many steps of which are timed."""

    folder: Path
    data: Path
    work: Path
    device: str
    tokens: int
    steps: int
    kept: frozenset[str]

    @property
    def optimizer(self) -> str:
        return "adamw_8bit" if self.device.startswith("cuda") else "adamw_torch"


# The checkpoint and its lines -----------------------------------------------------------------------------


def write_checkpoint(folder: Path, is_full: bool, device: str) -> None:
    """A whole folder: random weights, and a processor whose words are few and whose tiles are the model's."""
    config = full_config() if is_full else tiny_config()
    model = build(config, torch.device(device)).model
    model.save_pretrained(folder)
    del model
    gc.collect()
    tokenizer = tiny.make_tokenizer(())
    tokenizer.model_max_length = 1 << 20
    side = config.vision_config.image_size
    images = MllamaImageProcessorPil(
        size={"height": side, "width": side}, max_image_tiles=TILES, do_convert_rgb=True
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    MllamaProcessor(images, tokenizer, chat_template=tiny.chat_template("<|image|>")).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["image_token_index"] = tokenizer.convert_tokens_to_ids("<|image|>")
    (folder / "config.json").write_text(json.dumps(written))


def write_lines(bench: Bench, side: int) -> None:
    """As many lines as steps, each of one image of 2 x 2 tiles, and as near to `tokens` as words come."""
    processor: Any = AutoProcessor.from_pretrained(bench.folder)
    per_word = len(processor.tokenizer(WORDS * 64, add_special_tokens=False)["input_ids"]) / 64
    rng, lines = np.random.default_rng(0), []
    for number in range(bench.steps):
        pixels = rng.integers(0, 256, (2 * side, 2 * side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(bench.data.parent / f"{number}.png")
        answer = WORDS * int((bench.tokens - 24) / per_word)
        lines.append(json.dumps({"image": f"{number}.png", "prompt": "what?", "answer": answer.strip()}))
    bench.data.write_text("\n".join(lines))


# The trainings --------------------------------------------------------------------------------------------


def plain(bench: Bench) -> Timed:
    """transformers and peft as their documentation shows them, every linear but the head in 4-bit."""
    peft = peft_library()
    reset(bench)
    processor: Any = AutoProcessor.from_pretrained(bench.folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model: Any = AutoModelForImageTextToText.from_pretrained(
        bench.folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": bench.device}
    )
    targets = lora_targets(model)
    model = peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    rows = [json.loads(x) for x in bench.data.read_text().splitlines()]

    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        texts, images = [], []
        for row in batch:
            parts = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
            turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": row["answer"]}]
            texts.append(processor.apply_chat_template(turns, tokenize=False))
            images.append([Image.open(bench.data.parent / row["image"]).convert("RGB")])
        made = processor(images=images, text=texts, padding=True, return_tensors="pt")
        labels = made["input_ids"].clone()
        image_token = processor.tokenizer.convert_tokens_to_ids("<|image|>")
        labels[(labels == processor.tokenizer.pad_token_id) | (labels == image_token)] = -100
        return {**made, "labels": labels}

    clock, on_cpu = Clock(), bench.device == "cpu"
    arguments = TrainingArguments(
        output_dir=str(bench.work / "plain"), per_device_train_batch_size=1, gradient_accumulation_steps=1,
        max_steps=bench.steps, learning_rate=2e-4, optim=bench.optimizer, bf16=not on_cpu, use_cpu=on_cpu,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(model, arguments, collate, train_dataset=rows, callbacks=[clock])  # pyright: ignore
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Timed("plain transformers and peft, standard 4-bit", clock.steps(), peak(bench))


def ours(bench: Bench, name: str, kept: frozenset[str]) -> Timed:
    """`qprobe finetune` on the dynamic base that keeps `kept`."""
    reset(bench)
    path = bench.work / "skiplist.json"
    write_manifest(path, manifest_for(bench.folder, kept))
    out, clock = bench.work / "adapter", Clock()
    shutil.rmtree(out, ignore_errors=True)
    finetune(
        path, data=bench.data, out=out, model=str(bench.folder), device=bench.device, held_out=0.0,
        steps=bench.steps, batch_size=1, accumulation=1, max_length=2 * bench.tokens, rank=RANK,
        save_every=10 * bench.steps, progress=clock.tick,
    )  # fmt: skip
    return Timed(name, clock.steps(), peak(bench))


def by_processes(bench: Bench, count: int, batches: int) -> dict[str, Any]:
    """The object of `finetune --json` of `count` processes that share `batches` lines in a step."""
    path = bench.work / "skiplist.json"
    write_manifest(path, manifest_for(bench.folder, bench.kept))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "qprobe"]
    command += ["finetune", str(path), "--data", str(bench.data), "--out", str(bench.work / f"by-{count}")]
    command += ["--model", str(bench.folder), "--held-out", "0", "--steps", str(bench.steps), "--json"]
    command += ["--accumulation", str(batches // count), "--max-length", str(2 * bench.tokens)]
    command += ["--save-every", str(10 * bench.steps), *(["--device", "cpu"] * (bench.device == "cpu"))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def report_processes(bench: Bench, count: int) -> str:
    """Markdown of one process beside `count`."""
    one, many = (by_processes(bench, x, count) for x in (1, count))
    lines = [
        f"# Training by {count} processes\n",
        f"{bench.steps} steps of {count} lines of about {bench.tokens} tokens and {TILES} tiles, the first "
        f"steps counted. {made_with(bench.device)}.\n",
        "| processes | seconds per step | images per second | times one process | peak GiB of one |",
        "|---|---|---|---|---|",
    ]
    for x in (one, many):
        per_second = x["steps"] * count / x["seconds"]
        times = one["seconds"] / x["seconds"]
        peak_gib = (x["peak_bytes"] or 0) / GIB
        lines.append(
            f"| {x['processes']} | {x['seconds'] / x['steps']:.3f} | {per_second:.3f} | {times:.2f} | "
            f"{peak_gib:.2f} |"
        )
    apart = max(
        abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one["history"], many["history"], strict=True)
    )
    return (
        "\n".join([*lines, "", f"Losses of the steps are apart by {apart:.2g} of themselves at most."]) + "\n"
    )


def reset(bench: Bench) -> None:
    """Frees what is gone, and counts memory from here."""
    gc.collect()
    random.seed(0)
    if bench.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(bench: Bench) -> int:
    return torch.cuda.max_memory_allocated() if bench.device.startswith("cuda") else 0


def collation(bench: Bench) -> float:
    """Seconds in which one line becomes a batch, in this process."""
    from qprobe.data.reading import read_conversations

    processor = load_processor(resolve(str(bench.folder)))
    rows = read_conversations(bench.data).good[:3]
    encode_conversations(processor, rows[:1], torch.bfloat16)
    start = time.perf_counter()
    for row in rows:
        encode_conversations(processor, [row], torch.bfloat16)
    return (time.perf_counter() - start) / len(rows)


def report(found: Sequence[Timed], bench: Bench, geometry: str, collate_s: float) -> str:
    """Markdown of all trainings, and whether the mark is kept."""
    base = min(x.median for x in found if x.name.startswith("plain"))
    which = "Geometry of Llama-3.2-11B-Vision" if geometry == "11b" else "A tiny Mllama"
    lines = [
        "# Seconds per training step\n",
        f"{which}, random weights, one line per step of about {bench.tokens} tokens and {TILES} tiles, rank "
        f"{RANK}, {bench.optimizer}, {len(found[0].steps)} steps after {WARM_UP}. {made_with(bench.device)}. "
        f"Command: `python -m tests.benchmarks.training_speed --geometry {geometry} --device "
        f"{bench.device} --steps {bench.steps}`.\n",
        "| training | seconds per step, median (range) | times plain | peak GiB |",
        "|---|---|---|---|",
    ]
    for x in found:
        span = f"{x.median:.3f} ({min(x.steps):.3f} to {max(x.steps):.3f})"
        lines.append(f"| {x.name} | {span} | {x.median / base:.3f} | {x.peak_bytes / GIB:.2f} |")
    same = next(x.median for x in found if "standard" in x.name and x.name.startswith("qprobe"))
    kept = "kept" if same <= MARK * base else "missed"
    lines += [
        "",
        f"Plain is the faster of its two runs. Mark, at most {MARK} times plain on the same layers: "
        f"{same / base:.3f}, {kept}. A line takes {collate_s:.3f} s to become a batch, in each of them.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time every training and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--geometry", choices=("tiny", "11b"), default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="[default: 2048, or 128 at the tiny size]")
    parser.add_argument("--work", type=Path, help="where the checkpoint goes  [default: a temporary folder]")
    parser.add_argument("--out", type=Path, help="Markdown file to write as well")
    options = parser.parse_args()
    is_full = options.geometry == "11b"
    tokens = options.tokens or (2048 if is_full else 128)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        start = time.perf_counter()
        write_checkpoint(work / "model", is_full, options.device)
        kept = published_kept(inventory_of(work / "model"), is_full)
        bench = Bench(work / "model", work / "train.jsonl", work, options.device, tokens, options.steps, kept)
        write_lines(bench, (full_config() if is_full else tiny_config()).vision_config.image_size)
        if options.processes > 1:
            text = report_processes(bench, options.processes)
            written(text, options.out)
            return
        found: list[Timed] = []
        trainings = (
            lambda: plain(bench),
            lambda: ours(bench, "qprobe finetune, standard 4-bit", frozenset()),
            lambda: ours(bench, "qprobe finetune, dynamic 4-bit", bench.kept),
            lambda: plain(bench),
        )
        print(f"{time.perf_counter() - start:.0f} s: checkpoint", file=sys.stderr, flush=True)
        for training in trainings:
            found.append(training())
            said = f"{time.perf_counter() - start:.0f} s: {found[-1].name} {found[-1].median:.3f} s per step"
            print(said, file=sys.stderr, flush=True)  # so that a later failure loses nothing
        text = report(found, bench, options.geometry, collation(bench))
    written(text, options.out)


def written(text: str, out: Path | None) -> None:
    """Prints the report, and leaves it in `out` where that is named."""
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
