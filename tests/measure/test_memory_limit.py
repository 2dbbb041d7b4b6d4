"""Scans within a memory limit keep it, on models whose weights are what takes memory."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from qprobe.cli import main
from qprobe.runs.folder import RunFolder
from tests import tiny
from tests.alone import run_alone

pytestmark = pytest.mark.slow

MIB = 2**20
WEIGHTS_MIB = 101  # of the blocks, in 16-bit


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 53 M parameters, nearly all of them in its 6 blocks, and two samples beside it."""
    folder = tmp_path_factory.mktemp("wide")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**tiny.decoder(768, 3072, 6)))
    model.to(torch.bfloat16).save_pretrained(folder)
    for part in tiny.text_tokenizer():
        part.save_pretrained(folder)
    lines = [{"prompt": prompt, "answer": "a red bag"} for prompt in ("what is it?", "name it")]
    (folder / "samples.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


@dataclass(frozen=True)
class Done:
    """A scan that ran in a process of its own. found: its JSON object."""

    status: int | None
    found: dict[str, Any]
    said: str
    peak_bytes: int


def command(wide: Path, device: str, *more: str) -> list[str]:
    asked = ["--data", str(wide / "samples.jsonl"), "--samples", "2", "--device", device]
    return ["scan", "--json", "--model", str(wide), *asked, *more]


def scan_alone(wide: Path, run: Path, device: str, *more: str) -> Done:
    words = [*command(wide, device, *more), "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_alone([sys.executable, "-m", "tests.unreported", *words], environment=environment)
    return Done(done.status, json.loads(done.out) if done.out else {}, done.err, done.peak_bytes)


@pytest.mark.skipif(sys.platform != "linux", reason="pages of mapped files are let go on Linux only")
def test_a_process_stays_below_its_limit_where_it_would_not_without(wide: Path, tmp_path: Path):
    wide = tiny.as_in_the_hub_cache(wide, tmp_path / "cache")
    asked = ("--measures", "activation,propagated")
    plain = scan_alone(wide, tmp_path / "plain", "cpu", *asked)
    assert plain.status == 0, plain.said
    limit = (
        plain.peak_bytes - 2 * WEIGHTS_MIB * MIB
    )  # in float32, as the path is walked, they take twice that
    limited = scan_alone(wide, tmp_path / "limited", "cpu", *asked, "--max-memory", str(limit))
    assert limited.status == 0, limited.said
    assert limited.peak_bytes <= limit
    assert (tmp_path / "limited" / "layers.csv").read_text() == (
        tmp_path / "plain" / "layers.csv"
    ).read_text()
    # What is refused names a limit that would do: above what was taken, and not far above.
    too_small = ("--max-memory", str(limited.peak_bytes // 2), "--out", str(tmp_path / "refused"))
    refused = CliRunner().invoke(main, [*command(wide, "cpu", *asked), *too_small])
    assert refused.exit_code == 1 and "Pass --max-memory" in refused.stderr
    assert not (tmp_path / "refused" / "units").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_holds_no_more_than_the_limit_and_the_table_is_the_same(wide: Path, tmp_path: Path):
    plain = scan_alone(wide, tmp_path / "plain", "cuda")
    assert plain.status == 0, plain.said
    limit = plain.found["peak_bytes"] - 2 * WEIGHTS_MIB * MIB
    limited = scan_alone(wide, tmp_path / "limited", "cuda", "--max-memory", str(limit))
    assert limited.status == 0, limited.said
    assert limited.found["peak_bytes"] <= limit and limited.found["streamed_bytes"] > WEIGHTS_MIB * MIB
    one, other = (RunFolder(tmp_path / name).table for name in ("plain", "limited"))
    assert one["layer"].tolist() == other["layer"].tolist()
    numbers = one.select_dtypes("number").columns
    np.testing.assert_allclose(other[numbers], one[numbers], rtol=1e-3)
