"""`qprobe finetune`: QLoRA on the dynamic model, or on one of the two it is compared with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from qprobe.cli import shared
from qprobe.cli.options.declared import NOT_NEGATIVE, PATH, POSITIVE, option, options
from qprobe.cli.options.model import adapt_option, device_option, dtype_option, trust_option
from qprobe.cli.options.samples import data_help, data_options
from qprobe.cli.output.speaking import say
from qprobe.options import FOR, FinetuneOptions
from qprobe.system.processes import shard_from
from qprobe.system.wording import counted, lasting

_OPTIONS = options(
    option(FinetuneOptions, "data", type=PATH, metavar="FILE", help=data_help("Conversations")),
    option(FinetuneOptions, "out", metavar="DIR", help="Folder for the adapter."),
    option(
        FinetuneOptions,
        "base",
        help="What the adapter goes on: the model in 16-bit, in standard 4-bit, or as F lists it.",
    ),
    option(
        FinetuneOptions,
        "model",
        metavar="M",
        help="Where the 16-bit weights are: known name, hub id or folder.  [default: the model F names]",
    ),
    option(
        FinetuneOptions,
        "eval_data",
        type=PATH,
        metavar="FILE",
        help="Lines to evaluate on, never trained on.",
    ),
    option(
        FinetuneOptions,
        "held_out",
        type=click.FloatRange(0, 1, max_open=True),
        metavar="SHARE",
        help="Without --eval-data: share of the lines that is evaluated and not trained on.",
    ),
    data_options,
    option(
        FinetuneOptions,
        "steps",
        type=POSITIVE,
        metavar="N",
        help="Optimizer steps.  [default: as many as --epochs takes]",
    ),
    option(FinetuneOptions, "epochs", metavar="X", help="Passes over the data; instead of --steps."),
    option(FinetuneOptions, "rank", type=POSITIVE, metavar="N", help="Of what is trained in each layer."),
    option(
        FinetuneOptions,
        "learning_rate",
        metavar="X",
        help="Highest one; it rises for 5 % of the steps and then falls to 0.",
    ),
    option(FinetuneOptions, "batch_size", type=POSITIVE, metavar="N", help="Lines that run at once."),
    option(FinetuneOptions, "accumulation", type=POSITIVE, metavar="N", help="Batches per step."),
    option(
        FinetuneOptions,
        "max_length",
        type=POSITIVE,
        metavar="N",
        help="Longest line in tokens, image included; a longer one is bad data, never cut.",
    ),
    option(
        FinetuneOptions,
        "optimizer",
        help="[default: adamw_8bit on CUDA; adamw_torch on a CPU, for which there is no 8-bit one]",
    ),
    adapt_option("Where adapters go"),
    option(
        FinetuneOptions,
        "start",
        help="Begin at nothing, or at what calibrated 4-bit leaves of each weight (scan --keep-correction), "
        "which the adapter then holds, unchanged, beside what is trained.  "
        "[default: corrected where F's run keeps that; else zero]",
    ),
    option(
        FinetuneOptions,
        "distill",
        type=NOT_NEGATIVE,
        metavar="N",
        help="Steps before the first one in which the adapter, of a corrected one the correction, learns to "
        "answer as the 16-bit model does.",
    ),
    option(
        FinetuneOptions,
        "for_tool",
        type=click.Choice(FOR),
        help="Tool that will serve the adapter: what it serves none on is left out and named.",
    ),
    option(
        FinetuneOptions,
        "workers",
        type=NOT_NEGATIVE,
        metavar="N",
        help="Processes that make batches ahead of the steps, the same ones; at most one per core.  "
        "[default: 2 on CUDA where lines have images, if cores and shared memory suffice; else 0]",
    ),
    option(
        FinetuneOptions,
        "save_every",
        type=POSITIVE,
        metavar="N",
        help="Steps between two checkpoints, each with an evaluation.",
    ),
    option(
        FinetuneOptions,
        "seed",
        type=NOT_NEGATIVE,
        metavar="N",
        help="Of the adapters, the order of the lines and the held-out ones.",
    ),
)


@shared.command(
    "finetune",
    interrupted="The last checkpoint, if there is one, is kept in {out}; the same command goes on from it.",
    out_of_memory="Pass a smaller --batch-size or --max-length, or another --device.",
    short_help="QLoRA on the dynamic model.",
)
@click.argument("manifest", type=PATH, metavar="F")
@_OPTIONS
@device_option
@dtype_option("the manifest's")
@trust_option
def finetune(as_json: bool, **asked: Any) -> None:
    """Fine-tune adapters (QLoRA) on the model that the skiplist.json F describes, with the Trainer of
    transformers.

    \b
    A line of the data is one of
      {"image": "a.png", "conversations": [{"from": "human", "value": "..."},
                                           {"from": "gpt", "value": "..."}]}
      {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                                 {"type": "text", "text": "..."}]}, ...]}
      {"image": "a.png", "prompt": "...", "answer": "..."}

    The loss is on the tokens of the answers only. Every line and image is checked first. The same command
    goes on from the last checkpoint after an interruption. DIR gets the adapter as peft reads it, the
    processor, F, and finetune.json with every option and F's fingerprint.

    `torchrun --nproc-per-node N -m qprobe finetune ...` trains on N GPUs, --accumulation batches of a step on
    each; the same command with another N goes on from the last checkpoint in steps of the same lines.

    \b
    --json prints: out, base, start, fingerprint, steps, resumed_from, trained_lines, held_out_lines, skipped
    [text], notes [text] (fields that were not read, and how others were), left_out [text] (layers that have
    to do without an adapter), other_batches [text] (where memory did not suffice for --batch-size, or another
    number of processes went on), processes, distilled {steps, before, after} (KL on lines kept back from it,
    nats per answer token), trainable_parameters, optimizer, eval_loss_before, eval_loss (nats per answer
    token, mean over lines), history [{step, loss}], eval_history [{step, loss}], seconds, peak_bytes (of
    device memory, of one process).
    """
    from qprobe.training.finetune import finetune as train

    refuse_two_splits(asked)
    refuse_two_lengths(asked)
    with shared.progress_bars() as progress:
        done = train(**asked, progress=progress).to_json()
    if shard_from(os.environ).rank:
        return  # the first process speaks for all
    if as_json:
        shared.print_json(done)
        return
    for sentence in done["skipped"]:
        say(f"Skipped: {sentence}", err=True)
    for sentence in (*done["notes"], *done["left_out"], *done["other_batches"]):
        say(f"Note: {sentence}", err=True)
    say(_verdict(done))


def refuse_two_splits(asked: Mapping[str, Any]) -> None:
    """Raises UsageError where --held-out was passed beside --eval-data."""
    source = click.get_current_context().get_parameter_source("held_out")
    if asked["eval_data"] is not None and source == click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--eval-data and --held-out both say what to evaluate on; pass one of them.")


def refuse_two_lengths(asked: Mapping[str, Any]) -> None:
    """Raises UsageError where --epochs was passed beside --steps."""
    source = click.get_current_context().get_parameter_source("epochs")
    if asked["steps"] is not None and source == click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--steps and --epochs both say how long to train; pass one of them.")


def _verdict(done: Mapping[str, Any]) -> str:
    resumed = f" (from step {done['resumed_from']} on)" if done["resumed_from"] is not None else ""
    text = (
        f"{done['out']}: adapter of {done['trainable_parameters']:,} parameters on the {done['base']} base, "
        f"{'begun at the correction of its weights, ' if done['start'] == 'corrected' else ''}"
        f"{counted(done['steps'], 'step')}{resumed} of {done['optimizer']} on "
        f"{counted(done['trained_lines'], 'line')}, "
        f"{lasting(done['seconds'])}.{_distilled(done['distilled'])}"
    )
    if done["eval_loss"] is None:
        return f"{text} Nothing was held out."
    return (
        f"{text} Loss on {counted(done['held_out_lines'], 'held-out line')}: "
        f"{done['eval_loss_before']:.4g} before, {done['eval_loss']:.4g} after (nats per answer token)."
    )


def _distilled(found: Mapping[str, Any] | None) -> str:
    """What distilling gave, on the lines kept back from it; empty where it was not asked for."""
    if found is None:
        return ""
    if found["steps"] == 0:
        return f" Distilling found nothing better than its start, a KL of {found['before']:.3g} to 16-bit."
    steps = counted(found["steps"], "step")
    return f" Distilling in {steps} took the KL to 16-bit from {found['before']:.3g} to {found['after']:.3g}."
