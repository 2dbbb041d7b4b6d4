"""The command line: parse, one library call, print. Heavy imports wait until a command runs."""

from __future__ import annotations

from typing import Any

import click

from qprobe import __version__
from qprobe.cli.audit import audit
from qprobe.cli.choose import rank, report, select
from qprobe.cli.compare import compare
from qprobe.cli.exchange import export, import_
from qprobe.cli.finetune import finetune
from qprobe.cli.join import join
from qprobe.cli.machine import doctor, models
from qprobe.cli.merge import merge
from qprobe.cli.output.speaking import visible_usage, whole_output
from qprobe.cli.plan import plan
from qprobe.cli.quantize import quantize
from qprobe.cli.scan import scan
from qprobe.cli.shared import interruptible


class Commands(click.Group):
    """The group of all commands.

    Ctrl-C outside of them, too, ends with `INTERRUPTED` and one line; what is said of wrong usage repeats
    words of the command line as a terminal may be shown them.
    """

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        with interruptible(), visible_usage(), whole_output():  # of --help and --version
            return super().make_context(*arguments, **named)

    def invoke(self, ctx: click.Context) -> Any:
        with interruptible(), visible_usage(), whole_output():
            return super().invoke(ctx)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="qprobe")
def main() -> None:
    """Find the linear layers of a vision-language model that must stay in 16-bit when the rest goes to
    4-bit, prove it with numbers, and build that model.

    Start with `qprobe doctor`, then `qprobe scan --model demo-outliers`.

    Exit codes: 0 success, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
    """


for _command in (
    doctor,
    models,
    plan,
    scan,
    join,
    rank,
    select,
    compare,
    report,
    export,
    import_,
    quantize,
    audit,
    finetune,
    merge,
):
    main.add_command(_command)
