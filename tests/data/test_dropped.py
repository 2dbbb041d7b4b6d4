"""A data source is one file, found by looking into the folder, and read by every command that takes data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qprobe.cli import main
from qprobe.cli.options.samples import data_help
from qprobe.data.reading import read_conversations
from qprobe.errors import SampleError
from qprobe.options import FinetuneOptions, no_progress
from qprobe.training.rows import learnable
from tests.dropped import dropped

COLON_LINES = '''
    """Lines of a prompt and an answer with a colon between them."""

    from pathlib import Path

    from qprobe.data.source import Source

    def rows(data, split):
        for number, line in enumerate(Path(data).read_text().splitlines(), start=1):
            yield number, dict(zip(("prompt", "answer"), line.split(":"), strict=True))

    SOURCE = Source(
        what="a .colon file",
        row="line",
        order=1,
        takes=lambda data: str(data).endswith(".colon"),
        name=lambda data: Path(data).name,
        folder=lambda data: Path(data).parent,
        rows=rows,
    )
'''
ASKED = [("what is it?", "a cat"), ("name it", "a dial"), ("which one?", "a plot")]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A file for the source, which is there as long as the test runs."""
    path = tmp_path / "x.colon"
    path.write_text("".join(f"{prompt}:{answer}\n" for prompt, answer in ASKED))
    with dropped("qprobe.data.sources", "colon_lines", COLON_LINES, tmp_path / "dropped"):
        yield path


def qprobe(*words: object) -> Result:
    done = CliRunner().invoke(main, [*map(str, words)], prog_name="qprobe")
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.slow
def test_scan_and_compare_read_a_source_that_is_dropped_into_the_folder(
    file: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])
    run, model = tmp_path / "run", ("--model", tiny_folder("llama"), "--device", "cpu")
    qprobe("scan", *model, "--data", file, "--out", run)
    shown = json.loads((run / "samples.json").read_text())
    assert {(x["prompt"], x["answer"]) for x in shown} < set(ASKED) and len(shown) == 2  # one is held out
    manifest = json.loads((run / "skiplist.json").read_text())
    assert "--data x.colon" in manifest["made_by"]["command"]
    asked = ("--data", file, "--max-new-tokens", 2, "--json")
    found = json.loads(qprobe("compare", "--manifest", run / "skiplist.json", *model, *asked).stdout)
    assert {x["prompt"] for x in found["samples"]} == {prompt for prompt, _ in ASKED}


def test_finetune_learns_from_it(file: Path, tmp_path: Path):
    options = FinetuneOptions(manifest=tmp_path / "m.json", data=file, out=tmp_path / "out")
    found = learnable(file, options, no_progress)
    assert [(x.turns[0].text, x.turns[-1].text) for x in found.good] == ASKED


def test_help_and_messages_name_it(file: Path, tmp_path: Path):
    assert data_help("Samples").startswith("Samples: a .colon file, ")
    with pytest.raises(SampleError, match=r"is none of these\. Data is read from a \.colon file, "):
        read_conversations(tmp_path)


def test_without_its_file_it_is_neither_named_nor_read(tmp_path: Path):
    said = " ".join(qprobe("scan", "--help").stdout.split())
    assert "Samples: a folder of datasets.save_to_disk" in said and "colon" not in said
    (tmp_path / "x.colon").write_text("what is it?:a cat\n")
    assert read_conversations(tmp_path / "x.colon").good == ()
