"""How a model is loaded and what it is put in: --device, --dtype, --trust-remote-code, --experts, --adapt."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import click

from qprobe.cli.options.declared import Command, option
from qprobe.options import DEFAULT_ADAPT, KeptExperts, ModelOptions, ScanOptions

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}

device_option = option(
    ModelOptions,
    "device",
    metavar="NAME",
    help="cpu, cuda, cuda:1, ...  [default: the first CUDA device, or else the CPU]",
)
"""--device."""

devices_option = option(
    ModelOptions,
    "device",
    metavar="NAME",
    help="cpu, cuda, cuda:1, ..., or auto to spread the 16-bit model over all GPUs.  [default: the first "
    "CUDA device, auto where the model is too large for it; the CPU without one]",
)
"""--device, of commands that can spread the 16-bit model over several GPUs."""

trust_option = option(
    ModelOptions,
    "trust_remote_code",
    help="Run Python code that the checkpoint brings, for models that exist only as such code. It can do "
    "on this machine whatever you can: read it first.",
)
"""--trust-remote-code, of every command that loads a model or its config."""

experts_option = option(
    ScanOptions,
    "experts",
    help="What fused weights of experts may be in. In 4-bit, load_dynamic_4bit alone reads them; in 16-bit "
    "plain from_pretrained loads the checkpoint.",
)
"""--experts, of the commands that choose a format."""


def kept_experts_option(what: str) -> Callable[[Command], Command]:
    """--experts, of the commands that begin with a scan or its list; `what` is its help."""
    return click.option("--experts", type=click.Choice(get_args(KeptExperts)), help=what)


def dtype_option(shown: str) -> Callable[[Command], Command]:
    """--dtype, handed on as torch's name of it; `shown` says the default in words."""
    return option(
        ModelOptions,
        "dtype",
        type=click.Choice(list(DTYPES)),
        callback=lambda _context, _option, value: DTYPES.get(value),
        help="16-bit type of what is not in 4-bit; fp16 for cards without bf16, such as V100.  "
        f"[default: {shown}]",
    )


def adapt_option(what: str, default: str | None = DEFAULT_ADAPT) -> Callable[[Command], Command]:
    """--adapt; `what` begins its help."""
    return click.option(
        "--adapt",
        metavar="PARTS",
        default=default,
        help=f"{what}: language, projector, vision, all, or names of modules, with commas between them. "
        f"Output head and tied weights never have one.  [default: {DEFAULT_ADAPT}]",
    )
