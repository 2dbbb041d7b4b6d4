"""What a command prints: nothing that a terminal would obey, and never lost in silence."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from qprobe.system.wording import is_hidden, shortened, visible

LONGEST = 2000
"""Characters of an error; what goes beyond is somebody else's text, and its middle tells the least."""


def say(text: str = "", err: bool = False, nl: bool = True) -> None:
    """Print `text` on stdout, or stderr; characters that are not seen, or not in its encoding, escaped.

    Raises ClickException where stdout is closed or full, since the rest of the output would be missing.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # closed by the shell; where stderr is, nobody can be told
        if not err:
            raise click.ClickException("The output cannot be written (stdout is closed). Leave stdout open.")
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = visible(text, kept="\n").encode(encoding, "backslashreplace").decode(encoding)
    if err:
        click.echo(shown, err=True, nl=nl)
        return
    with whole_output():
        click.echo(shown, nl=nl)


@contextmanager
def whole_output() -> Iterator[None]:
    """Turns what a full stdout raises in the block into one sentence, as the rest would be missing."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:  # a reader that has seen enough, `| head`: click ends quietly
            raise
        sys.stdout = open(os.devnull, "w")  # Python would try to write the rest at its end
        raise click.ClickException(
            f"The output cannot be written ({error.strerror}). Make room, or send it elsewhere."
        ) from None


def one_line(error: BaseException | str) -> str:
    """The message `error` on one line that a terminal shows as it stands, not longer than `LONGEST`."""
    return shortened(visible(" ".join(str(error).splitlines())), LONGEST)


@contextmanager
def visible_usage() -> Iterator[None]:
    """Errors of wrong usage that leave the block repeat a user's words without what a terminal would obey."""
    try:
        yield
    except click.UsageError as error:
        said = shortened(visible(error.format_message(), kept="\n"), LONGEST)
        error.format_message = lambda: said
        raise


def visible_json(text: str) -> str:
    """The JSON `text` with escapes of JSON in the place of characters that are not seen."""
    if text.isprintable():
        return text
    return "".join(json.dumps(x)[1:-1] if x != "\n" and is_hidden(x) else x for x in text)
