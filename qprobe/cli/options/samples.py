"""Which samples a command uses and how data is read: --images, --data and what goes with them; --metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from qprobe.cli.options.declared import NOT_NEGATIVE, PATH, POSITIVE, Command, option, options
from qprobe.data.source import names_of_files
from qprobe.options import DataOptions, SampleOptions
from qprobe.registry import metrics


def data_help(of: str) -> str:
    """The help of an option that takes data: what the rows are, and all files that can be read."""
    return f"{of}: {names_of_files()}."


data_options = options(
    option(DataOptions, "turns", help="Which answers of a conversation count."),
    option(DataOptions, "split", metavar="NAME", help="Of a data set that has several."),
    option(
        DataOptions,
        "bad_data",
        help="Rows that cannot be used are named and left out; more than 10 % of them, and at "
        "least 10: stop, or go on without them.",
    ),
    option(
        DataOptions,
        "allow_downloads",
        help="Fetch what is not here: images that rows name by an address, files of a manifest's hub id.",
    ),
)
"""How --data is read: the options that `scan`, `compare`, `merge` and `finetune` share."""

sample_options = options(
    option(
        SampleOptions,
        "images",
        type=PATH,
        metavar="DIR",
        help="Folder of images to look at.  [default: built-in samples]",
    ),
    option(SampleOptions, "data", type=PATH, metavar="FILE", help=data_help("Samples")),
    option(
        SampleOptions,
        "prompt",
        metavar="TEXT",
        help="What to ask where the sample brings no prompt of its own.",
    ),
    data_options,
    option(
        SampleOptions,
        "samples",
        type=POSITIVE,
        metavar="N",
        help="Number of samples.  [default: 192 scenes for the demo models, else up to 32]",
    ),
    option(
        SampleOptions,
        "seed",
        type=NOT_NEGATIVE,
        metavar="N",
        help="Which scenes are drawn for the demo models, 0 to 999.",
    ),
    option(
        SampleOptions,
        "batch_size",
        type=POSITIVE,
        metavar="N",
        help="Samples that run at once; lower it when memory runs out.",
    ),
    option(
        SampleOptions,
        "max_new_tokens",
        type=POSITIVE,
        metavar="N",
        help="Longest answer the model gives, in tokens, where a sample brings none.",
    ),
)
"""Which samples, and how they run: the options that `scan`, `compare` and `merge` share."""


def metric_option(models: str) -> Callable[[Command], Command]:
    """--metric, for commands that score the answers of `models`."""
    said = "; ".join(f"{x.name}: {x.what}" for x in metrics.DECLARED)
    return option(
        SampleOptions,
        "metric",
        type=click.Choice(list(metrics.names())),
        help=f"Also score the greedy answers of {models}, beside KL. {said}. A sample without what it needs "
        "does not count. From Python it can be any function of (sample, answer).",
    )


def refuse_two_sources(asked: Mapping[str, Any]) -> None:
    """Raises UsageError where both --images and --data were passed."""
    if asked["images"] is not None and asked["data"] is not None:
        raise click.UsageError("--images and --data are two sources of samples; pass one of them.")
