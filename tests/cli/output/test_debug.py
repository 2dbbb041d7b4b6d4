"""QPROBE_DEBUG=1: what a command otherwise keeps to itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from qprobe.cli import shared
from qprobe.cli.output import debug
from qprobe.errors import ModelError

Run = Callable[..., Result]


def broken(*_: Any, **__: Any) -> None:
    raise ModelError("No model 'x'. Pass a folder.")


def test_an_error_shows_its_traceback_and_still_ends_as_one_sentence(
    qprobe: Run, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    fake("qprobe.scanning.scan", scan=broken)
    monkeypatch.setenv("QPROBE_DEBUG", "1")
    result = qprobe("scan", "--model", "x")
    assert result.exit_code == 1 and result.stdout == ""
    assert "Traceback" in result.stderr and "in broken" in result.stderr
    assert re.search(r"^QPROBE_DEBUG: +[0-9.]+ s  all of it$", result.stderr, re.MULTILINE)
    assert result.stderr.endswith("Error: No model 'x'. Pass a folder.\n")


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_it_nothing_more_is_said(
    qprobe: Run, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch, value: str | None
):
    fake("qprobe.scanning.scan", scan=broken)
    monkeypatch.delenv("QPROBE_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("QPROBE_DEBUG", value)
    assert qprobe("scan", "--model", "x").stderr == "Error: No model 'x'. Pass a folder.\n"


def test_the_seconds_of_each_stage_are_added_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = iter([10.0, 11.5, 11.5, 13.5, 13.5, 13.75])
    monkeypatch.setattr(debug, "perf_counter", lambda: next(clock))
    monkeypatch.setenv("QPROBE_DEBUG", "1")
    seen: list[tuple[str, int, int]] = []
    calls = [("load", 0, 1), ("load", 1, 1), ("measure", 0, 2), ("measure", 2, 2), ("load", 1, 1)]
    with debug.stage_times(lambda *call: seen.append(call)) as progress:
        for call in calls:
            progress(*call)
    # load from 10.0 to 11.5 and from 13.5 to 13.75, measure between
    assert seen == calls
    assert capsys.readouterr().err.split("\n")[:-1] == [
        "QPROBE_DEBUG:      1.750 s  load",
        "QPROBE_DEBUG:      2.000 s  measure",
    ]


def test_every_command_with_bars_times_its_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("QPROBE_DEBUG", "1")
    with shared.progress_bars() as progress:
        progress("load", 1, 1)
    assert re.fullmatch(r"QPROBE_DEBUG: +[0-9.]+ s  load\n", capsys.readouterr().err)
