"""What all commands share: exit codes, one-sentence errors, pure JSON, silence about known remarks."""

import inspect
import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import Result

import qprobe as package
from qprobe.cli import main, shared
from qprobe.errors import ModelError
from qprobe.loading.log_filters import quiet_models
from qprobe.options import CompareOptions, FinetuneOptions, MergeOptions, ScanOptions
from qprobe.system.log_filters import REMARKS, quiet

Run = Callable[..., Result]
Fake = Callable[..., None]


def raising(error: Exception) -> Callable[..., None]:
    def function(*_arguments: object, **_named: object) -> None:
        raise error

    return function


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help_and_json(qprobe: Run, command: str):
    result = qprobe(command, "--help")
    assert result.exit_code == 0 and "--json" in result.stdout and "prints" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("scan",),
        ("scan", "--model", "demo", "--no-such-option"),
        ("scan", "--model", "demo", "--dtype", "int8"),
        ("scan", "--model", "demo", "--samples", "0"),
        ("scan", "--model", "demo", "--batch-size", "many"),
        ("scan", "--model", "demo", "--images", "a", "--data", "b"),
        ("compare",),
        ("compare", "--manifest", "f", "--images", "a", "--data", "b"),
        ("rank",),
        ("select", "run"),
        ("select", "run", "--budget", "+5%", "--max-kl", "0.1"),
        ("scan", "--model", "demo", "--budget", "+5%", "--max-kl", "0.1"),
        ("scan", "--model", "demo", "--max-kl", "much"),
    ],
)
def test_wrong_usage_exits_2(qprobe: Run, arguments: tuple[str, ...]):
    result = qprobe(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Error: " in result.stderr


@pytest.mark.parametrize("command", sorted(main.commands))
def test_an_option_with_one_value_is_refused_where_it_is_given_twice(qprobe: Run, command: str):
    options = [x for x in main.commands[command].params if isinstance(x, click.Option) and x.name != "help"]
    for option in options:
        given = [*option.opts[:1], *([] if option.is_flag else ["1"])]
        result = qprobe(command, *given, *given)
        is_harmless = option.is_flag and not option.secondary_opts
        said = f"Error: {option.opts[0]} is given more than once; pass it once."
        assert (said in result.stderr) != is_harmless, option.name
        assert is_harmless or result.exit_code == 2
    assert "more than once" not in qprobe(command, "--json", "--json", "--help").stderr


@pytest.mark.parametrize("command", sorted(main.commands))
def test_an_empty_path_is_not_taken_for_the_folder_one_is_in(command: str):
    for option in main.commands[command].params:
        if isinstance(option.type, click.Path):
            with pytest.raises(click.BadParameter, match="The path is empty"):
                option.type_cast_value(
                    click.Context(main.commands[command]), ("",) if option.nargs < 0 else ""
                )


def test_a_line_that_a_shell_completes_is_not_refused():
    given = ["--model", "a", "--model", "b"]
    context = main.commands["scan"].make_context("scan", list(given), resilient_parsing=True)
    assert context.params["model"] == "b"
    with pytest.raises(click.UsageError, match="--model is given more than once"):
        main.commands["scan"].make_context("scan", list(given))


def test_a_mistake_is_one_sentence_and_exit_1(qprobe: Run, fake: Fake):
    fake("qprobe.scanning.scan", scan=raising(ModelError("No model 'x'. Pass a folder.")))
    result = qprobe("scan", "--model", "x")
    assert result.exit_code == 1
    assert (result.stdout, result.stderr) == ("", "Error: No model 'x'. Pass a folder.\n")


@pytest.mark.parametrize(
    ("line", "module", "advised"),
    [
        (
            "scan --model x",
            "qprobe.scanning.scan",
            {"--batch-size", "--max-memory", "--device auto", "--out"},
        ),
        ("compare --manifest f", "qprobe.checkpoint.comparing.compare", {"--batch-size", "--device auto"}),
        ("quantize f --out d", "qprobe.checkpoint.quantize", {"--device"}),
        (
            "finetune f --data d --out o",
            "qprobe.training.finetune",
            {"--batch-size", "--max-length", "--device"},
        ),
    ],
)
def test_running_out_of_memory_is_a_mistake_to_mend_with_options_that_the_command_has(
    qprobe: Run, fake: Fake, line: str, module: str, advised: set[str]
):
    class OutOfMemoryError(RuntimeError):  # as torch.cuda names it
        pass

    command = line.split()[0]
    fake(module, **{command: raising(OutOfMemoryError("CUDA out of memory.\nmore lines"))})
    result = qprobe(*line.split())
    assert result.exit_code == 1 and "more lines" not in result.stderr
    said = result.stderr.removeprefix("Error: The device ran out of memory: CUDA out of memory. Pass ")
    assert set(re.findall(r"--[a-z-]+(?: auto)?", said)) == advised
    options = {name for option in main.commands[command].params for name in option.opts}
    assert {name.removesuffix(" auto") for name in advised} <= options
    fake(module, **{command: raising(MemoryError())})
    assert qprobe(*line.split()).stderr == f"Error: This machine ran out of memory. Pass {said}"
    for error in (
        OSError(12, "no room"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: no room"),
    ):
        fake(module, **{command: raising(error)})
        result = qprobe(*line.split())
        assert result.exit_code == 1
        assert re.fullmatch(
            r"Error: This machine ran out of memory: .*no room\. Pass " + re.escape(said), result.stderr
        )


@pytest.mark.parametrize(
    ("line", "module", "said"),
    [
        (
            "scan --model x",
            "qprobe.scanning.scan",
            "Finished units are kept in the run folder;",
        ),
        ("quantize f --out d", "qprobe.checkpoint.quantize", "d was not made"),
        (
            "finetune f --data d --out o",
            "qprobe.training.finetune",
            "The last checkpoint, if there is one,",
        ),
        ("doctor", "qprobe.loading.doctor", ""),
    ],
)
def test_ctrl_c_says_what_is_left_and_exits_as_shells_expect(
    qprobe: Run, fake: Fake, line: str, module: str, said: str
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command = line.split()[0]
    fake(module, **{command: interrupted})
    result = qprobe(*line.split())
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.startswith(f"\nInterrupted. {said}".rstrip()) and "Aborted" not in result.stderr


def test_a_bug_of_ours_is_not_dressed_up(qprobe: Run, fake: Fake):
    fake("qprobe.scanning.scan", scan=raising(AssertionError("a bug")))
    assert isinstance(qprobe("scan", "--model", "x").exception, AssertionError)


@dataclass(frozen=True)
class FakeResult:
    skiplist = Path("skiplist.json")

    notes: tuple[str, ...] = ()

    def to_json(self) -> dict:
        return {"run": Path("r"), "kl": float("nan"), "share": np.float64(0.5), "notes": self.notes}


def test_json_is_all_there_is_on_stdout(qprobe: Run, fake: Fake):
    def scan(progress: Callable[[str, int, int], None], **_asked: object) -> FakeResult:
        progress("measure", 1, 2)
        logging.getLogger("qprobe.test").warning("a log line")
        print("a library that prints its progress", file=sys.stderr)
        return FakeResult(notes=("a note",))

    fake("qprobe.scanning.scan", scan=scan)
    result = qprobe("scan", "--model", "x", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"run": "r", "kl": None, "share": 0.5, "notes": ["a note"]}


def asked_of(fake: Fake, module: str, function: str, qprobe: Run, *arguments: str) -> dict[str, object]:
    """The keyword arguments that the library function gets for a command line."""
    got: list[dict[str, object]] = []

    def library(progress: object, **asked: object) -> FakeResult:
        got.append(asked)
        return FakeResult()

    fake(module, **{function: library})
    assert qprobe(*arguments, "--json").exit_code == 0
    return got[0]


def typed(options: Any) -> dict[str, Any]:
    """The fields that a command line has options for."""
    return {name: value for name, value in vars(options).items() if name not in ("progress", "processor")}


def test_scan_defaults_are_those_of_the_library(qprobe: Run, fake: Fake):
    assert asked_of(fake, "qprobe.scanning.scan", "scan", qprobe, "scan", "--model", "m") == typed(
        ScanOptions("m")
    )


def test_every_scan_option_arrives(qprobe: Run, fake: Fake):
    line = (
        "scan --model m --images i --prompt p --samples 3 --format nf4 --budget +1GB --out o --device cpu "
        "--dtype fp16 --seed 5 --batch-size 2 --max-new-tokens 7 --by weight_nmse --nodes 4 --ablate 3 "
        "--measures activation,weight"
    )
    asked = ScanOptions(
        "m", images=Path("i"), prompt="p", samples=3, format="nf4", budget="+1GB", out=Path("o"),
        device="cpu", dtype="float16", seed=5, batch_size=2, max_new_tokens=7, by="weight_nmse", nodes=4,
        ablate="3", measures=("weight", "activation"),
    )  # fmt: skip
    assert asked_of(fake, "qprobe.scanning.scan", "scan", qprobe, *line.split()) == typed(asked)
    bound = asked_of(fake, "qprobe.scanning.scan", "scan", qprobe, "scan", "--model", "m", "--max-kl", "0.01")
    assert bound == typed(ScanOptions("m", max_kl=0.01))


def test_compare_defaults_are_those_of_the_library(qprobe: Run, fake: Fake):
    asked = asked_of(
        fake, "qprobe.checkpoint.comparing.compare", "compare", qprobe, "compare", "--manifest", "f"
    )
    assert asked == typed(CompareOptions(Path("f")))


def test_every_compare_option_arrives(qprobe: Run, fake: Fake):
    line = (
        "compare --manifest f --model m --data d --prompt p --samples 3 --device cuda:1 --dtype bf16 "
        "--seed 5 --batch-size 2 --max-new-tokens 7"
    )
    asked = asked_of(fake, "qprobe.checkpoint.comparing.compare", "compare", qprobe, *line.split())
    wanted = CompareOptions(
        Path("f"), model="m", data=Path("d"), prompt="p", samples=3, device="cuda:1", dtype="bfloat16",
        seed=5, batch_size=2, max_new_tokens=7,
    )  # fmt: skip
    assert asked == typed(wanted)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (package.scan, ScanOptions),
        (package.compare, CompareOptions),
        (package.merge, MergeOptions),
        (package.finetune, FinetuneOptions),
    ],
)
def test_functions_take_their_options_by_keyword_with_the_same_defaults(function: Any, options: Any):
    first, *rest = inspect.signature(function).parameters.values()
    only_python = ("progress", "processor")
    keywords = {x.name: x.default for x in rest if x.name not in only_python}
    required = inspect.Parameter.empty
    wanted = {x.name: required if x.default is MISSING else x.default for x in fields(options)}
    wanted = {name: default for name, default in wanted.items() if name not in only_python}
    assert first.name in ("model", "manifest", "adapter") and wanted.pop(first.name) is required
    assert keywords == wanted and all(x.kind is x.KEYWORD_ONLY for x in rest)


def test_what_json_cannot_hold_becomes_null_or_text():
    value = {"a": (np.int64(1), float("inf"), np.float32("nan")), "p": Path("x"), "r": FakeResult(("n",))}
    assert shared.plain(value) == {"a": [1, None, None], "p": "x", "r": {"notes": ["n"]}}


def test_progress_is_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]):
    with shared.progress_bars() as progress:
        progress("measure", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_draws_a_bar_a_stage_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shared.progress_bars() as progress:
        progress("weights", 1, 2)
        progress("measure", 5, 5)
    out, err = capsys.readouterr()
    assert out == "" and "weights" in err and "measure" in err


def test_known_remarks_are_dropped_and_nothing_else(caplog: pytest.LogCaptureFixture):
    remark = REMARKS[0]
    logger = logging.getLogger(remark.logger)
    with quiet():
        logger.warning("%s: no module", remark.text)
        logger.warning("another warning")
        logger.error("%s", remark.text)
    logger.warning("%s afterwards", remark.text)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["another warning", remark.text, f"{remark.text} afterwards"]


def test_filters_go_even_after_an_error():
    loggers = [logging.getLogger(remark.logger) for remark in REMARKS]
    before = [list(logger.filters) for logger in loggers]
    with pytest.raises(click.Abort), quiet():
        raise click.Abort
    assert [list(logger.filters) for logger in loggers] == before


def test_loading_from_python_draws_no_bar_where_stderr_is_no_terminal_and_leaves_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
):
    from transformers.utils import logging as bars

    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    was = bars.is_progress_bar_enabled()
    try:
        for is_terminal in (False, True):
            monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer)
            bars.enable_progress_bar()
            with pytest.raises(click.Abort), quiet_models():
                assert bars.is_progress_bar_enabled() is is_terminal
                raise click.Abort
            assert bars.is_progress_bar_enabled()
    finally:
        if not was:
            bars.disable_progress_bar()
