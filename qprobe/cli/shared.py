"""What every command shares: errors as one sentence, --json, progress bars, option groups."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qprobe.cli.output.debug import debugged, stage_times
from qprobe.cli.output.speaking import one_line, say, visible_json
from qprobe.data.source import names_of_files
from qprobe.errors import LeftOutWarning, QprobeError, is_out_of_memory
from qprobe.options import DEFAULT_ADAPT, Progress
from qprobe.registry import metrics
from qprobe.system.bars import progress_bars as bars
from qprobe.system.log_filters import quiet
from qprobe.system.wording import shortened

if TYPE_CHECKING:
    from qprobe.runs.folder import RunFolder

Command = Callable[..., Any]
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
PATH = click.Path(path_type=Path)
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended: 128 + SIGINT


def command(
    name: str, interrupted: str = "", out_of_memory: str = "Pass another --device.", **settings: Any
) -> Callable[[Command], click.Command]:
    """A click command with --json whose `QprobeError`s end as one sentence on stderr and exit code 1.

    interrupted: what is left after Ctrl-C, and what to do, with the command's arguments as {name}; the exit
    code is `INTERRUPTED`. out_of_memory: what to do when memory does not suffice.
    """

    def decorate(function: Command) -> click.Command:
        as_command = click.command(name, **settings)(_explained(function, interrupted, out_of_memory))
        as_command.params.append(
            click.Option(
                ["--json", "as_json"], is_flag=True, help="Print one JSON object on stdout, nothing else."
            )
        )
        return as_command

    return decorate


def _explained(function: Command, interrupted: str, out_of_memory: str) -> Command:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        """`function`, whose errors that a user can fix become one sentence and an exit code."""
        try:
            left = interrupted.format(**{name: str(value) for name, value in kwargs.items()})
            with interruptible(left), quiet(), debugged():
                return function(*args, **kwargs)
        except QprobeError as error:
            raise click.ClickException(one_line(error)) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            what = "This machine" if isinstance(error, MemoryError) else "The device"
            first = shortened("".join(str(error).strip().splitlines()[:1]), 200)
            said = f": {first}" if first else "."
            raise click.ClickException(f"{what} ran out of memory{said} {out_of_memory}") from error

    return run


@contextmanager
def interruptible(said: str = "") -> Iterator[None]:
    """Ends the command with one line and `INTERRUPTED` when Ctrl-C is pressed; `said` goes behind it."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nInterrupted. {said}".rstrip(), err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None


def data_help(of: str) -> str:
    """The help of an option that takes data: what the rows are, and all files that can be read."""
    return f"{of}: {names_of_files()}."


DATA_OPTIONS = (
    click.option(
        "--turns",
        type=click.Choice(["first", "last", "each"]),
        default="each",
        show_default=True,
        help="Which answers of a conversation count.",
    ),
    click.option("--split", metavar="NAME", help="Of a data set that has several."),
    click.option(
        "--bad-data",
        type=click.Choice(["refuse", "skip"]),
        default="refuse",
        show_default=True,
        help="Rows that cannot be used are named and left out; more than 10 % of them, and at "
        "least 10: stop, or go on without them.",
    ),
    click.option("--allow-downloads", is_flag=True, help="Fetch images that rows name by an address."),
)
"""How --data is read: the options that `scan`, `compare` and `finetune` share."""
_SAMPLE_OPTIONS = (
    click.option(
        "--images", type=PATH, metavar="DIR", help="Folder of images to look at.  [default: built-in samples]"
    ),
    click.option(
        "--data",
        type=PATH,
        metavar="FILE",
        help=data_help("Samples"),
    ),
    click.option(
        "--prompt", metavar="TEXT", help="What to ask where the sample brings no prompt of its own."
    ),
    *DATA_OPTIONS,
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        metavar="N",
        help="Number of samples.  [default: 192 scenes for the demo models, else up to 32]",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="N",
        help="Which scenes are drawn for the demo models, 0 to 999.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=4,
        show_default=True,
        metavar="N",
        help="Samples that run at once; lower it when memory runs out.",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        metavar="N",
        help="Longest answer the model gives, in tokens, where a sample brings none.",
    ),
)


def sample_options(function: Command) -> Command:
    """Which samples, and how they run: the options that `scan` and `compare` share."""
    for option in reversed(_SAMPLE_OPTIONS):
        function = option(function)
    return function


def metric_option(models: str) -> Callable[[Command], Command]:
    """--metric, for commands that score the answers of `models`."""
    said = "; ".join(f"{x.name}: {x.what}" for x in metrics.DECLARED)
    return click.option(
        "--metric",
        type=click.Choice(list(metrics.names())),
        help=f"Also score the greedy answers of {models}, beside KL. {said}. A sample without what it needs "
        "does not count. From Python it can be any function of (sample, answer).",
    )


def device_option(function: Command) -> Command:
    """--device."""
    return click.option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...  [default: the first CUDA device, or else the CPU]",
    )(function)


def devices_option(function: Command) -> Command:
    """--device, of commands that can spread the 16-bit model over several GPUs."""
    return click.option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ..., or auto to spread the 16-bit model over all GPUs.  [default: the first "
        "CUDA device, auto where the model is too large for it; the CPU without one]",
    )(function)


experts_option = click.option(
    "--experts",
    type=click.Choice(["4-bit", "16-bit"]),
    default="4-bit",
    show_default=True,
    help="What fused weights of experts may be in. In 4-bit, load_dynamic_4bit alone reads them; in 16-bit "
    "plain from_pretrained loads the checkpoint.",
)
"""--experts, of the commands that choose a format."""


def kept_experts_option(what: str) -> Callable[[Command], Command]:
    """--experts, of the commands that begin with a scan or its list; `what` is its help."""
    return click.option("--experts", type=click.Choice(["16-bit"]), help=what)


def adapt_option(what: str, default: str | None = DEFAULT_ADAPT) -> Callable[[Command], Command]:
    """--adapt; `what` begins its help."""
    return click.option(
        "--adapt",
        metavar="PARTS",
        default=default,
        help=f"{what}: language, projector, vision, all, or names of modules, with commas between them. "
        f"Output head and tied weights never have one.  [default: {DEFAULT_ADAPT}]",
    )


def dtype_option(default: str | None, shown: str) -> Callable[[Command], Command]:
    """--dtype, handed on as torch's name of it; `shown` says the default in words."""
    return click.option(
        "--dtype",
        type=click.Choice(list(DTYPES)),
        default=default,
        callback=lambda _context, _option, value: DTYPES.get(value),
        help="16-bit type of what is not in 4-bit; fp16 for cards without bf16, such as V100.  "
        f"[default: {shown}]",
    )


def trust_option(function: Command) -> Command:
    """--trust-remote-code, of every command that loads a model or its config."""
    return click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run Python code that the checkpoint brings, for models that exist only as such code. It can do "
        "on this machine whatever you can: read it first.",
    )(function)


def refuse_two_sources(asked: Mapping[str, Any]) -> None:
    """Raises UsageError where both --images and --data were passed."""
    if asked["images"] is not None and asked["data"] is not None:
        raise click.UsageError("--images and --data are two sources of samples; pass one of them.")


@contextmanager
def opened_run(path: Path) -> Iterator[RunFolder]:
    """The run in the folder `path`; what was made again in it is said on stderr."""
    from qprobe.selection.derived.again import opened

    with opened(path, lambda sentence: say(sentence, err=True)) as run:
        yield run


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A `Progress` that draws bars, see `qprobe.system.bars`; under QPROBE_DEBUG stages are timed, too."""
    with bars() as show, stage_times(show) as timed, warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)  # commands print the notes themselves
        yield timed


def print_json(value: Any) -> None:
    """`value` as JSON on stdout; what does not apply (NaN, infinity) is null."""
    say(visible_json(json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)))


def plain(value: Any) -> Any:
    """`value` made of what JSON has: dataclasses become objects, paths strings, NaN and infinity null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    scalar = getattr(value, "item", None)
    if callable(scalar):  # numpy's, which are not imported here
        return plain(scalar())
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
