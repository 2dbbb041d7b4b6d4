"""What every command shares: errors as one sentence, --json, progress bars."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qprobe.cli.output.debug import debugged, stage_times
from qprobe.cli.output.speaking import one_line, say, visible_json
from qprobe.errors import LeftOutWarning, QprobeError, is_host_out_of_memory, is_out_of_memory
from qprobe.options import Progress
from qprobe.system.bars import progress_bars as bars
from qprobe.system.log_filters import quiet
from qprobe.system.wording import SAID, shortened

if TYPE_CHECKING:
    from qprobe.runs.folder import RunFolder

Command = Callable[..., Any]
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended: 128 + SIGINT


class GivenOnce(click.Command):
    """A command that refuses an option with one value that is given twice; click would take the last."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in () if ctx.resilient_parsing else given:  # a shell that completes a line runs nothing
            if isinstance(option, click.Option) and not _may_be_repeated(option) and given.count(option) > 1:
                raise click.UsageError(f"{option.opts[0]} is given more than once; pass it once.", ctx)
        return super().parse_args(ctx, args)


def _may_be_repeated(option: click.Option) -> bool:
    """Whether `option` takes many values, counts, or says the same however often it is given."""
    return option.multiple or option.count or (option.is_flag and not option.secondary_opts)


def command(
    name: str,
    interrupted: str = "",
    out_of_memory: str = "Pass another --device.",
    kind: type[GivenOnce] = GivenOnce,
    **settings: Any,
) -> Callable[[Command], click.Command]:
    """A click command with --json whose `QprobeError`s end as one sentence on stderr and exit code 1.

    interrupted: what is left after Ctrl-C, and what to do, with the command's arguments as {name}; the exit
    code is `INTERRUPTED`. out_of_memory: what to do when memory does not suffice.
    """

    def decorate(function: Command) -> click.Command:
        explained = _explained(function, interrupted, out_of_memory)
        as_command = click.command(name, cls=kind, **settings)(explained)
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
            if is_out_of_memory(error):
                raise click.ClickException(_of_memory(error, out_of_memory)) from error
            # Of a file that no reader or writer of ours explains; of a closed pipe click ends quietly.
            if not isinstance(error, OSError) or error.errno == errno.EPIPE:
                raise
            raise click.ClickException(one_line(_of_the_system(error))) from error

    return run


def _of_memory(error: Exception, advice: str) -> str:
    what = "This machine" if is_host_out_of_memory(error) else "The device"
    first = shortened("".join(str(error).strip().splitlines()[:1]), 200)
    said = f": {first}" if first else "."
    return f"{what} ran out of memory{said}{'' if said.endswith('.') else '.'} {advice}"


def _of_the_system(error: OSError) -> str:
    said = error.strerror or shortened(str(error), SAID) or type(error).__name__
    if error.filename is None:
        return f"The system refuses to go on ({said}). Make room, and files readable; the same command again."
    return f"{error.filename} cannot be read or written ({said}). Make it so, or name another."


@contextmanager
def interruptible(said: str = "") -> Iterator[None]:
    """Ends the command with one line and `INTERRUPTED` when Ctrl-C is pressed; `said` goes behind it."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nInterrupted. {said}".rstrip(), err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None


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
