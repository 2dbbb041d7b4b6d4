"""What a command prints: foreign text is inert, and output that is lost is an error."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click import ClickException
from click.testing import Result

from qprobe.cli import main
from qprobe.cli.output import speaking
from qprobe.cli.output.speaking import LONGEST, say
from qprobe.cli.shared import print_json
from qprobe.errors import ModelError
from qprobe.report.terminal import table_width

Run = Callable[..., Result]
HOSTILE = "a\x1b[2J\u202eb\nError: c"


def raising(error: BaseException) -> Callable[..., None]:
    def function(*_arguments: object, **_named: object) -> None:
        raise error

    return function


def test_an_error_is_one_line_whatever_text_it_repeats(qprobe: Run, fake: Callable[..., None]):
    fake("qprobe.scanning.scan", scan=raising(ModelError(f"No model {HOSTILE}. Pass a folder.")))
    said = qprobe("scan", "--model", "x").stderr
    assert said == "Error: No model a\\x1b[2J\\u202eb Error: c. Pass a folder.\n"


def test_an_error_keeps_its_beginning_and_its_advice_when_foreign_text_is_long(
    qprobe: Run, fake: Callable[..., None]
):
    fake("qprobe.scanning.scan", scan=raising(ModelError(f"No model {'x' * 10**6}. Pass a folder.")))
    said = qprobe("scan", "--model", "x").stderr
    assert said.startswith("Error: No model xxx") and said.endswith("xxx. Pass a folder.\n")
    assert len(said) == len("Error: \n") + LONGEST


@pytest.mark.parametrize(
    "words",
    [("\x1b[2J",), ("rank", "run", "\x1b[2J"), ("rank", "--\x1b[2J"), ("rank", "run", "--top", "\x1b[2J")],
)
def test_wrong_usage_repeats_no_control_characters(qprobe: Run, words: tuple[str, ...]):
    done = qprobe(*words)
    assert done.exit_code == 2 and "\x1b" not in done.stderr and "x1b[2J" in done.stderr


def test_text_is_escaped_and_its_lines_stay(capsys: pytest.CaptureFixture[str]):
    say(HOSTILE)
    assert capsys.readouterr().out == "a\\x1b[2J\\u202eb\nError: c\n"


def test_json_says_the_same_without_one_character_that_is_not_seen(capsys: pytest.CaptureFixture[str]):
    value = {HOSTILE: ["\x9b", "\U000e0001", "\udcff", "é一"]}
    print_json(value)
    out = capsys.readouterr().out
    assert json.loads(out) == value and out.replace("\n", "").isprintable() and "é一" in out


def test_an_encoding_that_lacks_a_character_shows_its_code(monkeypatch: pytest.MonkeyPatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    say("é▁")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9\\u2581\n"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_full_output_is_an_error(monkeypatch: pytest.MonkeyPatch):
    full = open("/dev/full", "w", buffering=1)  # its own end would be an error again
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(ClickException, match=r"cannot be written \(No space left on device\)"):
        say("text")
    say("more")  # so that no second error arises at the end
    sys.stdout.close()
    with suppress(OSError):
        full.close()


def test_a_closed_output_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ClickException, match="stdout is closed"):
        say("text")
    monkeypatch.setattr(sys, "stderr", None)
    say("text", err=True)
    assert table_width() > 1000  # nobody looks at it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        ("qprobe models >/dev/full", 1, "Error: The output cannot be written (No space left on device)."),
        ("qprobe models --json >&-", 1, "Error: The output cannot be written (stdout is closed)."),
        ("set -o pipefail; qprobe models --json | true", None, ""),
    ],
)
def test_a_shell_sees_it_too(shell: str, status: int | None, said: str):
    code = f'qprobe() {{ {sys.executable} -m qprobe "$@"; }}; {shell}'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert status in (None, done.returncode)
    assert done.stderr.startswith(said) and len(done.stderr.splitlines()) == bool(said)


@pytest.mark.parametrize("where", ["make_context", "invoke"])
def test_ctrl_c_outside_of_a_command_is_one_line(qprobe: Run, monkeypatch: pytest.MonkeyPatch, where: str):
    monkeypatch.setattr(main.commands["models"], where, raising(KeyboardInterrupt()))
    result = qprobe("models")
    assert (result.exit_code, result.stderr) == (130, "\nInterrupted.\n")


def test_ctrl_c_during_imports_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    from qprobe import __main__ as start

    class Slow:
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "qprobe.cli", Slow())
    monkeypatch.setattr(start.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        start.main()
    assert caught.value.code == 130 and capsys.readouterr().err == "\nInterrupted.\n"


def test_the_number_of_interrupted_commands_is_the_same_everywhere():
    from qprobe import __main__ as start
    from qprobe.cli import shared

    assert start.INTERRUPTED == shared.INTERRUPTED and speaking.LONGEST == 2000
