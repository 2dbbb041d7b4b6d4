"""How many facts a model states right: batched greedy answers, scored phrase by phrase.

`python -m qprobe.demo.evaluate DIR` evaluates a trained folder on held-out scenes and writes the
result to its training.json, as the training recipe does at its end.
"""

from __future__ import annotations

import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from qprobe.demo.scenes import HELD_OUT_SEED, scenes
from qprobe.demo.tokens import chat
from qprobe.records import Sample

RECORD = "training.json"


@dataclass(frozen=True)
class Score:
    """Facts stated right out of all; `+` is the merge."""

    right: int = 0
    facts: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.right + other.right, self.facts + other.facts)

    @property
    def share(self) -> float:
        """right / facts, 0 to 1."""
        return self.right / self.facts


def inputs(processor: Any, samples: Sequence[Sample], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor inputs of a batch of prompts with their images, ready for `generate`."""
    texts = [processor.apply_chat_template(chat(s.prompt), add_generation_prompt=True) for s in samples]
    images = [[Image.open(io.BytesIO(x)) for x in s.images] for s in samples]
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return dict(batch.to(device))


@torch.inference_mode()
def greedy_answers(model: Any, processor: Any, samples: Sequence[Sample], batch: int = 64) -> list[str]:
    """The model's greedy answer to each sample."""
    texts: list[str] = []
    for start in range(0, len(samples), batch):
        batch_inputs = inputs(processor, samples[start : start + batch], model.device)
        tokens = model.generate(**batch_inputs, do_sample=False, max_new_tokens=48)
        fresh = tokens[:, batch_inputs["input_ids"].shape[1] :]
        texts.extend(processor.batch_decode(fresh, skip_special_tokens=True))
    return texts


def score(samples: Sequence[Sample], answers: Sequence[str]) -> Score:
    """Facts stated right over all samples."""
    return sum((right for _, _, right in _scored(samples, answers)), Score())


def score_by_kind(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Score]:
    """Facts stated right for each kind ("medical") and each fact of a kind ("medical/angle")."""
    scores: defaultdict[str, Score] = defaultdict(Score)
    for kind, fact, right in _scored(samples, answers):
        scores[kind] += right
        scores[f"{kind}/{fact}"] += right
    return dict(sorted(scores.items()))


def _scored(samples: Sequence[Sample], answers: Sequence[str]) -> Iterator[tuple[str, str, Score]]:
    for sample, answer in zip(samples, answers, strict=True):
        for fact in sample.facts:
            yield sample.kind or "", fact.name, Score(int(fact.stated_in(answer)), 1)


def evaluate(folder: Path, count: int, device: str) -> dict[str, Any]:
    """Facts right of the saved bf16 model on held-out scenes: over all, by kind, and by fact; 0 to 1."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(device).eval()
    samples = scenes(count, HELD_OUT_SEED)
    answers = greedy_answers(model, AutoProcessor.from_pretrained(folder), samples)
    shares = {name: round(s.share, 4) for name, s in score_by_kind(samples, answers).items()}
    return {"held_out_scenes": count, "facts_right": round(score(samples, answers).share, 4), **shares}


def record_evaluation(folder: Path, count: int, device: str) -> dict[str, Any]:
    """Evaluates the folder's model, and returns its training.json with the result written to it."""
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    record["evaluation"] = evaluate(folder, count, device)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["evaluation"], indent=1), flush=True)
    return record


if __name__ == "__main__":
    record_evaluation(Path(sys.argv[1]), 400, "cuda" if torch.cuda.is_available() else "cpu")
