"""The whole road in fp16, as on a card without bf16: from a scan of calibrated weights to an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from transformers import AutoConfig

from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.data.reading import read_conversations
from qprobe.inputs.encoding import encode_conversations
from qprobe.loading.config import model_class
from qprobe.manifest.read import read_manifest
from qprobe.measure.subject import Subject
from qprobe.scanning import scan as road
from qprobe.training.origin import load_finetuned
from tests import tiny
from tests.checkpoint.test_codes import without_repacking
from tests.scanning.asked import write_lines

HALF = torch.float16
TABLES = (".nested_absmax", ".nested_quant_map", ".quant_map")  # of bitsandbytes


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Lines of which 16 are for codes, so that 2 are kept back and scales are tuned."""
    (tmp_path / "a.png").write_bytes(tiny.picture(0))
    lines = [
        {"image": "a.png", "prompt": f"What comes after {i}?", "answer": f"the number {i + 1}"}
        for i in range(24)
    ]
    return write_lines(tmp_path / "rows.jsonl", *lines)


@pytest.fixture
def done(qprobe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`done("scan", ...)`: the JSON object that the command prints."""
    monkeypatch.setattr("qprobe.scanning.finish.write_report", lambda _folder: [])

    def run(*words: object) -> dict[str, Any]:
        result = qprobe(*words, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[set[torch.dtype]]:
    """The dtypes of each 16-bit model that a scan measures."""
    real, found = road.open_model, []

    def opened(*asked: Any) -> Subject:
        subject = real(*asked)
        found.append({p.dtype for p in subject.model.parameters()})
        return subject

    monkeypatch.setattr(road, "open_model", opened)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_fp16_is_scanned_calibrated_tuned_saved_loaded_and_trained_on(
    done: Callable[..., dict[str, Any]],
    measured: list[set[torch.dtype]],
    rows: Path,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
):
    folder, skiplist = tiny_folder("mllama"), tmp_path / "run" / "skiplist.json"
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    here = ("--model", folder, "--device", "cpu")
    few = ("--data", rows, "--samples", "24", "--format", "nf4-calibrated", "--tune", "4")
    scanned = done("scan", *here, *few, "--dtype", "fp16", "--out", skiplist.parent)
    assert any(note.startswith("Scales were tuned for ") for note in scanned["notes"])
    assert measured == [{HALF}]
    assert 0 < scanned["kl_dynamic"] < scanned["kl_standard_4bit"]
    manifest = read_manifest(skiplist)
    assert manifest.format.compute_dtype == "float16" and "--dtype fp16" in manifest.made_by.command

    done("quantize", skiplist, *here, "--out", out)
    stored = load_file(out / "model.safetensors")
    # Beside fp16: codes and states are bytes, tables of 4-bit values and of block scales float32.
    assert {t.dtype for t in stored.values()} == {HALF, torch.uint8, torch.float32}
    assert all(n.endswith(TABLES) for n, t in stored.items() if t.dtype == torch.float32)
    assert done("audit", out, "--manifest", skiplist, "--load", "--device", "cpu")["ok"]
    theirs = model_class(AutoConfig.from_pretrained(out)).from_pretrained(out)
    without_repacking(theirs)
    ours, processor = load_dynamic_4bit(skiplist, str(folder), "cpu")
    batch = encode_conversations(processor, read_conversations(rows).good[:2], HALF)
    before = logits(ours, batch)
    assert torch.equal(logits(theirs, batch), before)

    few = ("--steps", "2", "--accumulation", "2", "--rank", "4", "--learning-rate", "0.02")
    trained = done("finetune", skiplist, *here, "--data", rows, "--out", adapter, *few)
    assert trained["steps"] == 2 and trained["eval_loss"] < trained["eval_loss_before"]
    tuned, _ = load_finetuned(adapter, device="cpu")
    assert {p.dtype for n, p in tuned.named_parameters() if "lora_" not in n} == {HALF, torch.uint8}
    assert not torch.equal(logits(tuned, batch), before)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
@pytest.mark.parametrize(("name", "fmt"), [("llama", "nf4"), ("qwen2_5_vl", "nf4-calibrated")])
def test_a_checkpoint_in_fp16_of_a_scan_in_bf16_is_audited_loaded_and_compared(
    name: str,
    fmt: str,
    done: Callable[..., dict[str, Any]],
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
):
    folder, scanned, out = tiny_folder(name), tmp_path / "run" / "skiplist.json", tmp_path / "out"
    here, few = ("--model", folder, "--device", "cpu"), ("--samples", "4", "--max-new-tokens", "4")
    done("scan", *here, *few, "--format", fmt, "--out", scanned.parent)
    done("quantize", scanned, *here, "--dtype", "fp16", "--out", out)
    written = out / "skiplist.json"
    before, after = read_manifest(scanned), read_manifest(written)
    assert before.model.fingerprint != after.model.fingerprint
    assert done("audit", out, "--manifest", written, "--load", "--device", "cpu")["ok"]
    loaded, _ = load_dynamic_4bit(out, device="cpu")
    assert loaded.dtype == HALF

    there = done("compare", "--manifest", written, *here, *few)["rows"]
    asked = done("compare", "--manifest", scanned, *here, *few, "--dtype", "fp16")["rows"]
    assert there == asked and there[-1]["name"] == "dynamic" and there[-1]["kl"] > 0


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of `batch`, in fp16 and finite."""
    with torch.no_grad():
        found = model(**batch).logits
    assert found.dtype == HALF and found.isfinite().all()
    return found
