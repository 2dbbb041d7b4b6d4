"""transformers' Trainer, set up for one fine-tuning run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from qprobe.data.conversation import Conversation
from qprobe.errors import QprobeError, RunError
from qprobe.options import FinetuneOptions, Progress
from qprobe.training.collate import workers_for
from qprobe.training.rows import Lines

WARMUP = 0.05  # share of the steps in which the learning rate rises, so that the first ones do no harm


class LossError(QprobeError):
    """The loss, or the adapter, is no number any more."""


class Watch(TrainerCallback):
    """Reports steps to a `Progress`, keeps (step, loss) of evaluations, stops at a loss that is no number."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.evaluations: list[tuple[int, float]] = []
        self.last_good: tuple[int, float] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        self.progress("train", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None:
            self._check("The loss", loss, state.global_step)
            self.last_good = (state.global_step, loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_kwargs: Any) -> None:
        if "eval_loss" in (metrics or {}):
            self._check("The loss on the held-out lines", metrics["eval_loss"], state.global_step)
            self.evaluations.append((state.global_step, metrics["eval_loss"]))

    def _check(self, what: str, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise LossError(f"{what} became {loss} at step {step}{self.advice()}")

    def advice(self) -> str:
        """What goes behind "... at step N": the last good loss, and what to do."""
        if self.last_good is None:
            return (
                ", before any step was taken well, so nothing was learned. Pass --dtype bf16 if it is fp16, "
                "a lower --learning-rate, or other lines; the same --out will do."
            )
        step, loss = self.last_good
        return (
            f", so the adapter is lost; the last good loss was {loss:.4g}, at step {step}. Start again with "
            "a lower --learning-rate, or with lines that were looked over; the same --out will do."
        )


def check_adapter(model: Any, watch: Watch) -> None:
    """Raises LossError if a trained parameter is not finite: the last step is behind the last loss."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            raise LossError(f"The adapter's {name} is not finite after the last step{watch.advice()}")


def make_trainer(
    model: Any,
    options: FinetuneOptions,
    lines: Lines,
    checkpoints: Path,
    encode: Callable[[list[Conversation]], dict[str, Tensor]],
    callbacks: list[TrainerCallback],
    processes: int,
) -> Trainer:
    """The Trainer of one run: nothing is reported anywhere, checkpoints go to `checkpoints`."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    trainer = Trainer(
        model=model,
        args=_arguments(options, lines, checkpoints, on_cpu, processes),
        train_dataset=list(lines.train),  # pyright: ignore[reportArgumentType]  # any sized sequence will do
        eval_dataset=list(lines.held_out) or None,  # pyright: ignore[reportArgumentType]
        data_collator=encode,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to --json
    return trainer


def _arguments(
    options: FinetuneOptions, lines: Lines, checkpoints: Path, on_cpu: bool, processes: int
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=1,  # so that the loss is a mean over lines, whatever the batch
        gradient_accumulation_steps=options.accumulation,
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(WARMUP * _steps(options, len(lines.train), processes)),
        optim=lines.spec["optimizer"],
        # Weights keep their dtypes: adapters are float32 and cast by themselves, so there is no autocast.
        bf16=False,
        fp16=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if lines.held_out else "no",
        eval_steps=options.save_every,
        eval_on_start=bool(lines.held_out),
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=workers_for(options, lines.train, on_cpu, processes),
        use_cpu=on_cpu,
        seed=options.seed,
        data_seed=options.seed,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the Trainer would spread the model over all GPUs it sees
    return arguments


def has_last_loss(trainer: Trainer) -> bool:
    """True if the held-out lines were evaluated at the step where training ended."""
    state = trainer.state
    return any("eval_loss" in x and x["step"] == state.global_step for x in state.log_history)


def losses_of(trainer: Trainer) -> dict[str, Any]:
    """The fields of `Finetuned` that tell the steps and their losses."""
    log = trainer.state.log_history
    evaluations = tuple((x["step"], x["eval_loss"]) for x in log if "eval_loss" in x)
    return {
        "steps": trainer.state.global_step,
        "eval_loss_before": evaluations[0][1] if evaluations else None,
        "eval_loss": evaluations[-1][1] if evaluations else None,
        "history": tuple((x["step"], x["loss"]) for x in log if "loss" in x),
        "eval_history": evaluations,
    }


def with_its_steps(
    options: FinetuneOptions, began_with: int, processes: int
) -> tuple[FinetuneOptions, tuple[str, ...]]:
    """(options with which `processes` make the steps of a run that began with others, a sentence if so)."""
    if processes == began_with:
        return options, ()
    batches = options.accumulation * began_with
    if batches % processes:
        raise RunError(
            f"The run in {options.out} began with {_processes(began_with)} and {batches} batches per "
            f"step, which do not divide among {processes}. Go on with a number of processes that does."
        )
    each = batches // processes
    said = (
        f"The run began with {_processes(began_with)} and went on with {processes}: each took "
        f"{each} {'batch' if each == 1 else 'batches'} of a step, so that steps kept their lines."
    )
    return replace(options, accumulation=each), (said,)


def _steps(options: FinetuneOptions, lines: int, processes: int) -> int:
    """Optimizer steps of the whole run."""
    batches = math.ceil(lines / options.batch_size / processes)
    return options.steps or math.ceil(options.epochs * math.ceil(batches / options.accumulation))


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
