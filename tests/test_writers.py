"""Somebody else's text does no harm wherever it is written: it is shown with escapes, or is not taken."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from qprobe.checkpoint.card import model_card
from qprobe.cli.output.speaking import say
from qprobe.errors import QprobeError
from qprobe.exports.export import export_manifest, export_targets
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Compared
from qprobe.manifest.write import write_manifest
from qprobe.report import terminal
from qprobe.report.page import page_html
from qprobe.report.write import page_of, spikes
from qprobe.runs.derived import csv_bytes
from qprobe.runs.folder import RunFolder
from qprobe.runs.shown import write_shown
from qprobe.system.wording import is_hidden
from tests.exports.manifests import manifest_of
from tests.report.full_run import write_full_run

# Moves the cursor, turns the direction, ends the line, is not seen, begins markup, a formula, a format.
HOSTILE = "a\x1b[2J\u202eb\x07\u200b\x9b\r\nc: [d](e)`</script>$\\frac$ {0} %s #\U000e0041"


def is_clean(text: str) -> bool:
    """Whether a terminal, an editor and a browser show `text` as it stands."""
    return not any(is_hidden(x) for x in text if x not in "\n\t")


@pytest.mark.parametrize("tool", sorted(export_targets()))
def test_every_export_is_clean_and_has_the_same_lines(tool: str):
    plain = manifest_of({"model.a": True, "model.b": False, "lm_head": True}, "LlamaForCausalLM")
    layers = tuple(replace(x, reason=HOSTILE) for x in plain.layers)
    made = replace(plain.made_by, command=HOSTILE, qprobe=HOSTILE)
    budget = replace(plain.budget, requested=HOSTILE)
    model = replace(plain.model, id=HOSTILE)
    hostile = replace(plain, layers=layers, made_by=made, budget=budget, model=model)
    try:
        wanted = export_manifest(plain, tool)
    except QprobeError as error:
        with pytest.raises(QprobeError) as refused:  # which this tool cannot be told
            export_manifest(hostile, tool)
        assert str(refused.value) == str(error)
        return
    found = export_manifest(hostile, tool)
    assert is_clean(found.text) and len(found.text.splitlines()) == len(wanted.text.splitlines())


def test_the_card_a_table_and_the_terminal_are_clean(capsys: pytest.CaptureFixture[str]):
    plain = manifest_of({"model.a": False, "lm_head": True})
    hostile = replace(plain, compared=(Compared(HOSTILE, 9, 0.1, 0.01, True),))
    assert is_clean(model_card(hostile, "LlamaForCausalLM"))
    say(terminal.paragraphs([HOSTILE], 80))
    say(HOSTILE, err=True)
    said = capsys.readouterr()
    assert is_clean(said.out) and is_clean(said.err)


@pytest.mark.slow
def test_the_page_shows_texts_of_samples_and_answers_with_escapes(tmp_path: Path):
    folder = write_full_run(tmp_path / "run", model="a $\\frac$ {0} %s </script>")
    run = RunFolder(folder)
    write_shown(run, [replace(x, prompt=HOSTILE, answer=HOSTILE) for x in run.samples.values()])
    row = {"parameter_bytes": 1, "total_bytes": 1, "top1_agreement": 1.0, "kl": 0.0, "kl_se": 0.0}
    found = {
        "rows": [{"name": x, "answer_agreement": 1.0, **row} for x in ("16-bit", "nf4", "dynamic")],
        "metrics": [],
        "samples": [{"id": HOSTILE, "prompt": HOSTILE, "answers": {"16-bit": HOSTILE}}],
        "skip_modules": [],
    }
    (folder / "compare.json").write_text(json.dumps(found))
    page = page_of(RunFolder(folder)).decode()
    assert "\\\\x1b[2J\\\\u202e" in page and page.count("</script>") == page_html({}, "").count("</script>")
    assert is_clean(page)
    drawn = io.StringIO()
    spikes(RunFolder(folder)).savefig(drawn, format="svg", dpi=20)  # the model's name is in its title
    assert is_clean(drawn.getvalue()) and "<script" not in drawn.getvalue()


def test_names_that_are_not_seen_are_refused_where_they_are_read(tmp_path: Path):
    plain = manifest_of({"model.a": True, "model.b": False, "lm_head": True})
    write_manifest(tmp_path / "good.json", plain)
    text = (tmp_path / "good.json").read_text().replace("model.a", "model.a" + json.dumps(HOSTILE)[1:-1])
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(QprobeError) as found:
        read_manifest(tmp_path / "bad.json")
    assert is_clean(str(found.value)) and "\n" not in str(found.value)


def test_a_cell_of_a_table_is_no_formula():
    import pandas as pd

    assert csv_bytes(pd.DataFrame({"sample": ["=1+1", "@a", "b"]})).splitlines()[1:3] == [b"'=1+1", b"'@a"]


@pytest.mark.parametrize(("columns", "wanted"), [("60", 60), ("7", 40), ("0", 120), ("", 120), ("no", 120)])
def test_the_width_is_what_columns_says(columns: str, wanted: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal.terminal_width() == wanted
    assert terminal.table_width() == (wanted if columns else terminal.UNLIMITED)
    text = terminal.paragraphs(["a sentence of some length that needs more than one line, " * 3], 40)
    assert max(map(len, text.splitlines())) <= 40
