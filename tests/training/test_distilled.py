"""An adapter that is distilled answers more as the 16-bit model does, or begins where it would have begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe.checkpoint.ready import lora_targets
from qprobe.errors import QprobeError
from qprobe.manifest.write import write_manifest
from qprobe.training import distilled
from qprobe.training.bases import load_base
from qprobe.training.finetune import finetune
from tests.checkpoint.manifests import manifest_for

pytestmark = [
    pytest.mark.slow,
    # peft 0.21.2 asks transformers by the old name; can go with the first peft that asks by the new one.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def asked(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on the tiny Llama in plain NF4."""
    work, folder = tmp_path_factory.mktemp("distilled"), tiny_folder("llama")
    write_manifest(work / "skiplist.json", manifest_for(folder))
    rows = [{"prompt": f"what is {n}?", "answer": f"the number {n} of a coastal train"} for n in range(20)]
    (work / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "manifest": work / "skiplist.json", "data": work / "train.jsonl", "model": str(folder),
        "device": "cpu", "base": "nf4", "rank": 4, "accumulation": 2, "max_length": 128, "steps": 1,
    }  # fmt: skip


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Two lines of 12 tokens, of which the last 5 and 4 are learned, the second one padded."""
    ids = torch.randint(20, 300, (2, 12), generator=torch.Generator().manual_seed(seed))
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    labels[0, 7:], labels[1, 6:10], mask[1, 10:] = ids[0, 7:], ids[1, 6:10], 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def lessons(asked: dict[str, Any]) -> list[distilled.Lesson]:
    reference, _ = load_base(asked["manifest"], "16-bit", asked["model"], "cpu")
    return distilled.lessons_of(reference, map(batch, range(3)))


@pytest.fixture
def tuned(asked: dict[str, Any]) -> Any:
    import peft

    model, _ = load_base(asked["manifest"], "nf4", asked["model"], "cpu")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=lora_targets(model))
    return peft.get_peft_model(model, config)


@torch.no_grad()
def by_hand(model: Any, lessons: list[distilled.Lesson]) -> float:
    """sum p (log p - log q) over the places before the learned tokens, over their number."""
    total, tokens = 0.0, 0
    for lesson in lessons:
        logits = model(**{k: x for k, x in lesson.inputs.items() if k != "labels"}).logits.double()
        for row, kept in enumerate(lesson.logits):
            for place, wanted in zip((lesson.inputs["labels"][row] != -100).nonzero(), kept, strict=True):
                p, q = wanted.double().log_softmax(-1), logits[row, int(place) - 1].log_softmax(-1)
                total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + 1
    return total / tokens


def test_distilling_lowers_the_kl_on_what_is_kept_back(tuned: Any, lessons: list[distilled.Lesson]):
    before = by_hand(tuned, lessons[-1:])
    found = distilled.distil(tuned, [lessons[2]] * 16, 8, at_once=2)  # all the same: it must fall
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after < 0.99 * before and found.steps > 0
    assert by_hand(tuned, lessons[-1:]) == pytest.approx(found.after, rel=1e-4)


def test_an_adapter_that_gets_worse_stays_as_it_was(
    tuned: Any, lessons: list[distilled.Lesson], monkeypatch: Any
):
    monkeypatch.setattr(distilled, "RATE", 1e3)
    before = {n: x.detach().clone() for n, x in tuned.named_parameters() if x.requires_grad}
    found = distilled.distil(tuned, lessons, 2)
    assert (found.steps, found.after) == (0, found.before)
    assert all(
        torch.equal(x, before[n]) and x.grad is None for n, x in tuned.named_parameters() if n in before
    )


def test_what_memory_does_not_hold_is_not_learned_from(asked: dict[str, Any], monkeypatch: Any):
    reference, _ = load_base(asked["manifest"], "16-bit", asked["model"], "cpu")
    monkeypatch.setattr(distilled, "MOST_BYTES", 1)
    assert len(distilled.lessons_of(reference, map(batch, range(3)))) == 1


def test_a_gain_that_two_lines_disagree_on_is_none(
    tuned: Any, lessons: list[distilled.Lesson], monkeypatch: Any
):
    # From 4 and 4 to 1 and 5: a gain of 1 of 8, but its error over the two lines is larger.
    looks = iter([[4.0, 4.0], [1.0, 5.0]])
    monkeypatch.setattr(distilled, "by_line", lambda *_: next(looks))
    found = distilled.distil(tuned, lessons, 1)
    assert (found.steps, found.after) == (0, found.before)


def test_finetune_begins_at_the_distilled_adapter(asked: dict[str, Any], tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(distilled, "RATE", 5e-3)  # four steps of the usual rate are too few to tell
    plain = finetune(**asked, out=tmp_path / "plain")
    done = finetune(**asked, out=tmp_path / "distilled", distill=4)
    assert plain.distilled is None and done.distilled is not None
    assert done.distilled.after < done.distilled.before
    assert done.eval_loss_before != plain.eval_loss_before
    assert json.loads((tmp_path / "distilled" / "finetune.json").read_text())["result"]["distilled"] == {
        "steps": done.distilled.steps, "before": done.distilled.before, "after": done.distilled.after,
    }  # fmt: skip
    with pytest.raises(QprobeError, match=r"--distill 4 on --base 16-bit"):
        finetune(**{**asked, "base": "16-bit"}, out=tmp_path / "none", distill=4)
