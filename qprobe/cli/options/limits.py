"""--budget and --max-kl: what a skip-list may cost, or what it must reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from qprobe.cli.options.declared import Command, option
from qprobe.options import FOR, ScanOptions


def limit_options(default: str | None) -> Callable[[Command], Command]:
    """--budget and --max-kl; `default` says what serves where neither is passed, None if one must be."""

    def decorate(function: Command) -> Command:
        bound = option(
            ScanOptions,
            "max_kl",
            metavar="X",
            help="In place of a budget: the fewest bytes with a KL to the 16-bit model of at most X nats per "
            "answer token.",
        )(function)
        return option(
            ScanOptions,
            "budget",
            metavar="B",
            help="What the skip-list may cost: +10% of the standard 4-bit model, +690MiB, or a total such as "
            f"7.3GiB.{f'  [default: {default}]' if default else ''}",
        )(bound)

    return decorate


def for_option(function: Command) -> Command:
    """--for."""
    return option(
        ScanOptions,
        "for_tool",
        type=click.Choice(FOR),
        help="Keep the layers that this engine fuses into one matrix (q, k and v; gate and up; in cross-"
        "attention too) together or not at all, so that `qprobe export` can write the list. With less to "
        "choose from, a list may leave more KL.",
    )(function)


def refuse_two_limits(asked: Mapping[str, Any]) -> None:
    """Raises UsageError where both --budget and --max-kl were passed."""
    if asked["budget"] is not None and asked["max_kl"] is not None:
        raise click.UsageError("--budget and --max-kl ask for two different things; pass one of them.")


def require_a_limit(asked: Mapping[str, Any]) -> None:
    """Raises UsageError unless exactly one of --budget and --max-kl was passed."""
    refuse_two_limits(asked)
    if asked["budget"] is None and asked["max_kl"] is None:
        raise click.UsageError("Neither --budget nor --max-kl says how to choose; pass one of them.")
