"""What a fine-tuning run gives back, and the model card of its adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qprobe import __version__
from qprobe.checkpoint.adapters.record import RECORD, Distilled
from qprobe.checkpoint.card import card_head
from qprobe.manifest.records import Manifest
from qprobe.options import Start
from qprobe.system.markdown import plain


@dataclass(frozen=True)
class Finetuned:
    """A finished run.

    start: where the adapter began, before anything was distilled.
    eval losses are means over lines of the mean loss of their answer tokens, in nats; eval_loss_before is
    that at the start; both are None without held-out lines. history: (step, loss), over the step
    peak_bytes: of device memory, None on a CPU. skipped: one sentence per row that was left out;
    notes: on fields that were not read, what was done to read others, and activations that stay whole;
    left_out: one per reason for which layers have to do without an adapter. other_batches: sentences where
    batches are not those that were asked for: memory did not suffice, or the run went on with another number
    of processes. processes: that trained at last, a device each. distilled: what `distill` gave; None without
    it, or where the run went on from a checkpoint.
    """

    out: Path
    base: str
    start: Start
    fingerprint: str
    steps: int
    resumed_from: int | None
    trained_lines: int
    held_out_lines: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]
    other_batches: tuple[str, ...]
    processes: int
    distilled: Distilled | None
    trainable_parameters: int
    optimizer: str
    eval_loss_before: float | None
    eval_loss: float | None
    history: tuple[tuple[int, float], ...]
    eval_history: tuple[tuple[int, float], ...]
    seconds: float
    peak_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """The object of `finetune --json`."""
        curves = {
            "history": [{"step": step, "loss": loss} for step, loss in self.history],
            "eval_history": [{"step": step, "loss": loss} for step, loss in self.eval_history],
        }
        return {
            **asdict(self),
            "out": str(self.out),
            "skipped": list(self.skipped),
            "notes": list(self.notes),
            "left_out": list(self.left_out),
            "other_batches": list(self.other_batches),
            **curves,
        }


def card(manifest: Manifest, done: Finetuned) -> str:
    """README.md of the adapter: what it is of, how it was trained, how to load it."""
    head = card_head("peft", manifest.model.id, ["qprobe", "lora", "qlora"])
    losses = (
        f"Loss on {done.held_out_lines} held-out lines: {done.eval_loss_before:.4g} before, "
        f"{done.eval_loss:.4g} after (nats per answer token)."
        if done.eval_loss is not None and done.eval_loss_before is not None
        else "Nothing was held out, so nothing was evaluated."
    )
    corrected = (
        " from the correction of its calibrated weights, which it holds beside what it learned (its rank is "
        "the sum of both)"
    )
    begun = corrected if done.start == "corrected" else ""
    return (
        f"---\n{head}---\n\n# Adapter for {plain(manifest.model.id)}\n\n"
        f"LoRA of {done.trainable_parameters:,} parameters, trained for {done.steps} steps of "
        f"{done.optimizer} on the {done.base} base{begun} by qprobe {__version__}. {losses}\n\n"
        f"Fingerprint of the model: `{done.fingerprint}`. Every option is in `{RECORD}`.\n\n"
        f"```python\nimport qprobe\n\n"
        f'model, processor = qprobe.load_finetuned("path/to/this/folder")\n```\n'
    )
