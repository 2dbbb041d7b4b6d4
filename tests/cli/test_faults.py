"""Every command under every fault of the machine: an exit code and one line, whatever it was doing."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from qprobe.cli import main
from qprobe.exports import export_targets

RUN = ("qprobe.selection.derived.again", "opened")
# What is typed, and which function of the library does the work.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "doctor": ("", "qprobe.loading.doctor", "doctor"),
    "models": ("", "qprobe.models.catalogue", "entries"),
    "plan": ("--model m", "qprobe.checkpoint.plan", "plan"),
    "scan": ("--model m", "qprobe.scanning.scan", "scan"),
    "join": ("a --out b", "qprobe.scanning.join", "join"),
    "rank": ("run", *RUN),
    "select": ("run --budget +5%", *RUN),
    "report": ("run", *RUN),
    "compare": ("--manifest f.json", "qprobe.checkpoint.comparing.compare", "compare"),
    "export": ("f.json --to vllm", "qprobe.exports", "export_manifest"),
    "import": ("c.json --model m --out o.json", "qprobe.checkpoint.import_list", "import_list"),
    "quantize": ("f.json --out o", "qprobe.checkpoint.quantize", "quantize"),
    "audit": ("d", "qprobe.checkpoint.auditing.audit", "audit"),
    "finetune": ("f.json --data d --out o", "qprobe.training.finetune", "finetune"),
    "merge": ("a --out o", "qprobe.training.merging.merge", "merge"),
}
FAULTS: dict[str, tuple[BaseException, int, str]] = {
    "Ctrl-C": (KeyboardInterrupt(), 130, "Interrupted."),
    "memory": (MemoryError(), 1, "Error: This machine ran out of memory."),
    "unreadable": (
        PermissionError(errno.EACCES, "Permission denied", "x/y"),
        1,
        "Error: x/y cannot be read or",
    ),
    "full disk": (
        OSError(errno.ENOSPC, "No space left on device"),
        1,
        "Error: The system refuses to go on (No",
    ),
}


def test_every_command_is_here():
    assert COMMANDS.keys() == main.commands.keys()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_fault_is_an_exit_code_and_one_line(
    command: str, fault: str, qprobe: Callable[..., Result], fake: Callable[..., None]
):
    words, module, name = COMMANDS[command]
    error, code, said = FAULTS[fault]

    def failing(*_: Any, **__: Any) -> Any:
        raise error

    others = {"export_targets": export_targets} if command == "export" else {}
    fake(module, **{name: failing}, **others)
    done = qprobe(command, *words.split())
    assert (done.exit_code, done.stdout) == (code, "")
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.strip().startswith(said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_on_a_full_output_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    full = open("/dev/full", "w", buffering=1)  # its own end would be an error again
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit) as ended:
        main([*filter(None, [command]), "--help"], prog_name="qprobe")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: The output cannot be written (No space left on device).")
    assert len(said.splitlines()) == 1
    sys.stdout.close()
    with suppress(OSError):
        full.close()
