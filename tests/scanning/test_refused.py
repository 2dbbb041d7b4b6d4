"""What can never be asked is refused before weights are read, and leaves no run folder."""

from __future__ import annotations

import fcntl
import json
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from PIL import Image

from qprobe.errors import QprobeError, RunError, SampleError
from qprobe.loading.reference import reference_of
from qprobe.runs.folder import RunFolder
from tests.scanning.asked import Scanned, TinyFolder, options, scan, write_lines


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("qprobe.scanning.opening.reference_of", loaded)
    monkeypatch.setattr("qprobe.scanning.weights.checkpoint_folder", loaded)


# Which takes no option of samples, so that those of `options` have their defaults.
WEIGHTS_ALONE: dict[str, Any] = {"measures": ("weight",), "samples": None, "max_new_tokens": 64}


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("llama", {"budget": "much"}, "cannot be read"),
        ("llama", {"budget": "+690"}, r"has no unit\. Write \+690MiB"),
        ("llama", {"budget": "1KiB"}, "below standard 4-bit"),
        ("llama", {"budget": "1KiB", **WEIGHTS_ALONE}, "below standard 4-bit"),
        ("llama", {"budget": "+5%", "max_kl": 0.1}, "Pass one of them"),
        ("llama", {"max_kl": -1.0}, "no positive number"),
        ("llama", {"max_kl": float("nan")}, "no positive number"),
        ("llama", {"by": "beauty"}, "'beauty' is no measure"),
        ("llama", {"by": "weight_sqnr_db"}, "decibels, which do not add up"),
        ("llama", {"by": "weight_nmse", "max_kl": 0.1}, "predicts no KL"),
        ("llama", {"by": "propagated_nmse", "measures": ("weight", "activation")}, "needs propagated"),
        ("llama", {"by": "isolated_kl", "nodes": 1}, "two or more nodes"),
        ("llama", {"measures": ("beauty",)}, "which is no measure"),
        ("llama", {"ablate": "model.layers.9"}, "no linear layer"),
        ("llama", {"ablate": "lm_head"}, "never in 4-bit"),
        ("llama", {"ablate": "0"}, "measures no layer"),
        ("llama", {"ablate": "-2"}, "measures no layer"),
        ("llama", {"ablate": " , "}, "names no layer"),
        ("llama", {"ablate": "3", "measures": ("activation",)}, "leaves sensitivity out"),
        ("llama", {"max_memory": "6 Gigs", "format": "nf4-calibrated"}, "cannot be read"),
        ("llama", {"device": "quantum"}, "is not a device name"),
        ("llama", {"samples": 0}, "asks for no sample"),
        ("llama", {"images": Path("nowhere")}, "nowhere does not exist"),
        ("llama", {"data": Path("nowhere.jsonl")}, "nowhere.jsonl does not exist"),
    ],
)
def test_what_can_never_be_asked(
    no_weights: None, tiny_folder: TinyFolder, tmp_path: Path, model: str, changes: dict[str, Any], said: str
):
    with pytest.raises(QprobeError, match=said):
        scan(**options(tiny_folder(model), tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"ablate": "all"}, "--ablate"), ({"max_kl": 0.1}, "--max-kl"), ({"by": "sensitivity_kl"}, "--by")],
)
def test_a_kl_of_a_model_whose_output_is_of_no_known_kind(
    no_weights: None, tiny_folder: TinyFolder, tmp_path: Path, changes: dict[str, Any], said: str
):
    folder = Path(copytree(tiny_folder("bert"), tmp_path / "choice"))
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**given, "architectures": ["BertForMultipleChoice"]}))
    with pytest.raises(QprobeError, match=f"no language head, and its output .* no KL for {said}"):
        scan(**options(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_seed_that_built_in_scenes_do_not_have(no_weights: None, tmp_path: Path):
    with pytest.raises(SampleError, match="--seed 1000 is out of range"):
        scan("demo", seed=1000, out=tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 5}, r"its prompt is 5, which is no text"),
        ({"prompt": "what?", "image": "gone.png"}, r"image .*gone\.png does not exist"),
        ({"prompt": "what?", "image": "long.png"}, r"processor cannot read it \(absolute aspect ratio"),
    ],
)
def test_samples_of_which_none_can_be_read(
    no_weights: None, tiny_folder: TinyFolder, tmp_path: Path, row: dict[str, Any], said: str
):
    Image.new("RGB", (1, 300)).save(tmp_path / "long.png")
    data = write_lines(tmp_path / "rows.jsonl", row)
    with pytest.raises(SampleError, match=said):
        scan(**options(tiny_folder("qwen2_vl"), tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_the_run_folder(no_weights: None, tiny_folder: TinyFolder, tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    for out, said in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "run", "cannot be written")):
        with pytest.raises(RunError, match=rf"{said}.*--out"):
            scan(**options(tiny_folder("llama"), out))
    if sys.platform == "linux":  # where not even root makes a folder
        with pytest.raises(RunError, match=r"/proc/x/run cannot be written: /proc cannot be written \("):
            scan(**options(tiny_folder("llama"), Path("/proc/x/run")))
    with open(tmp_path / ".lock", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="Another process is scanning"):
            scan(**options(tiny_folder("llama"), tmp_path))


@pytest.fixture
def llama_run(scanned: Scanned, tmp_path: Path) -> Path:
    """The folder of a scan of the tiny Llama, without its units."""
    run = tmp_path / "run"
    RunFolder(run).open(RunFolder(scanned("llama").run).key)
    return run


@pytest.mark.slow
def test_the_folder_of_another_model_or_format(llama_run: Path, no_weights: None, tiny_folder: TinyFolder):
    for model, changes, said in (
        ("bert", {}, r"model\.architecture: LlamaForCausalLM -> BertModel"),
        ("llama", {"format": "nf4-calibrated"}, r"format\.name: nf4 -> nf4-calibrated"),
    ):
        with pytest.raises(RunError, match=rf"holds another scan.*{said}"):
            scan(**options(tiny_folder(model), llama_run, **changes))


def test_a_model_that_cannot_be_built_without_weights_is_checked_once_it_is_loaded(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unbuildable(*_: Any) -> None:
        raise NotImplementedError("cannot copy out of a meta tensor")

    monkeypatch.setattr("qprobe.loading.skeleton.meta_model", unbuildable)
    reads: list[str] = []
    monkeypatch.setattr(
        "qprobe.scanning.opening.reference_of",
        lambda *asked, **more: (reads.append(asked[0].source.location), reference_of(*asked, **more))[1],
    )
    with pytest.raises(QprobeError, match="below standard 4-bit"):
        scan(**options(tiny_folder("llama"), tmp_path / "run", budget="1KiB"))
    assert reads == [str(tiny_folder("llama"))]
