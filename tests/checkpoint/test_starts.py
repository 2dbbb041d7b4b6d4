"""Where adapters begin: refusals, and corrections put into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import save_file
from torch import nn

from qprobe.calibration.correction import FILE_NAME as CORRECTION
from qprobe.checkpoint.codes import _check_same_weight
from qprobe.checkpoint.starts.attached import _REWRITES, AskedAdapter, check_asked, names_as_written
from qprobe.checkpoint.starts.corrected import correction_of, start_corrected
from qprobe.errors import ManifestError, QprobeError, RunError
from qprobe.formats.codes_file import FILE_NAME, sha256_of
from qprobe.formats.nf4 import Nf4
from qprobe.records import CodesFile
from qprobe.runs.folder import RunFolder
from qprobe.runs.notes import CorrectionFile
from tests.checkpoint.manifests import manifest_for
from tests.runs.runs import make_run

TinyFolder = Callable[[str], Path]
WEIGHTS = CodesFile(FILE_NAME, "c" * 64)


@pytest.fixture(scope="module")
def manifest(tiny_folder: TinyFolder) -> Any:
    return manifest_for(tiny_folder("llama"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (AskedAdapter("zero", 16), None),
        (AskedAdapter("zero", 1), None),
        (AskedAdapter("zero", 64), None),
        (AskedAdapter("middle", 16), "'middle' is no start of an adapter"),  # type: ignore[arg-type]
        (AskedAdapter("zero", 0), "--rank 0 makes no adapter"),
        (AskedAdapter("zero", 65), "--rank 65 is higher than that of any layer of .*, which is 64 at most"),
        (AskedAdapter("corrected", 16), "needs calibrated weights"),
    ],
)
def test_an_adapter_that_the_model_cannot_get_is_refused(
    asked: AskedAdapter, said: str | None, manifest: Any, tmp_path: Path
):
    if said is None:
        check_asked(asked, manifest, tmp_path)
        return
    with pytest.raises(QprobeError, match=said):
        check_asked(asked, manifest, tmp_path)


def kept(folder: Path, noted: CorrectionFile | None, tensors: dict[str, Any] | None) -> Path:
    """A run that has noted a correction, and its file."""
    run = make_run(folder)
    if tensors is not None:
        save_file(tensors, run / CORRECTION)
    if noted is not None:
        sha = noted.sha256 and sha256_of(run / CORRECTION)
        RunFolder(run).notes.put("correction", replace(noted, sha256=sha))
    return run


LEFT, RIGHT = torch.arange(8.0).reshape(4, 2), torch.arange(6.0).reshape(2, 3)
FACTORS = {"up.left": LEFT.bfloat16(), "up.right": RIGHT.bfloat16(), "down.left": LEFT, "down.right": RIGHT}
NOTED = CorrectionFile("written", WEIGHTS.sha256, 2, ())


@pytest.mark.parametrize(
    ("noted", "tensors", "said"),
    [
        (None, FACTORS, "keeps no correction"),
        (NOTED, None, "which the scan wrote, is missing"),
        (replace(NOTED, sha256=None), None, "no better than none on the samples"),
        (replace(NOTED, codes="d" * 64), FACTORS, "of other calibrated weights than the manifest"),
        (replace(NOTED, codes="d" * 64, sha256=None), FACTORS, "of other calibrated weights"),
    ],
)
def test_corrections_that_are_not_those_of_the_weights_are_refused(
    noted: Any, tensors: Any, said: str, manifest: Any, tmp_path: Path
):
    if tensors is None and noted is not None and noted.sha256:
        noted = replace(noted, sha256=None, codes=WEIGHTS.sha256)
        run = kept(tmp_path / "run", None, None)
        RunFolder(run).notes.put("correction", replace(noted, sha256="e" * 64))
    else:
        run = kept(tmp_path / "run", noted, tensors)
    with (
        pytest.raises(ManifestError, match=said),
        correction_of(replace(manifest, codes=WEIGHTS), run),
    ):
        pass


def test_a_correction_that_was_changed_or_is_no_file_of_tensors_is_named(manifest: Any, tmp_path: Path):
    calibrated = replace(manifest, codes=WEIGHTS)
    run = kept(tmp_path / "run", NOTED, FACTORS)
    (run / CORRECTION).write_bytes(b"x")
    with pytest.raises(ManifestError, match="is damaged"), correction_of(calibrated, run):
        pass
    RunFolder(run).notes.put("correction", replace(NOTED, sha256=sha256_of(run / CORRECTION)))
    with pytest.raises(RunError, match="cannot be read"), correction_of(calibrated, run):
        pass


class Adapted(nn.Module):
    """What peft makes of a linear, of rank `rank`."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(3, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 4, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.scaling = {"default": 0.5}

    def get_base_layer(self) -> nn.Module:
        return self.base


@pytest.mark.parametrize(("rank", "spare"), [(1, 0), (2, 1)])
def test_an_adapter_holds_the_correction_behind_what_begins_at_zero(
    rank: int, spare: int, manifest: Any, tmp_path: Path
):
    run = kept(tmp_path / "run", NOTED, FACTORS)
    four_bit: Any = Linear4bit(3, 4, bias=False)
    model = nn.ModuleDict(
        {
            "up": Adapted(four_bit, rank + 2 + spare),
            "down": Adapted(nn.Linear(3, 4), rank + 2 + spare),
            "gate": Adapted(four_bit, rank + 2 + spare),
        }
    )
    with correction_of(replace(manifest, codes=WEIGHTS), run) as factors:
        assert (factors.layers, factors.rank) == ({"up", "down"}, 2)
        assert start_corrected(SimpleNamespace(get_base_model=lambda: model), factors, rank) == ("up",)
    a, b = (x["default"].weight for x in (model["up"].lora_A, model["up"].lora_B))
    assert torch.equal(0.5 * b @ a, LEFT @ RIGHT)
    assert torch.equal(a[rank : rank + 2], RIGHT)
    assert not b[:, :rank].any() and a[:rank].all()
    for name in ("down", "gate"):  # in 16-bit nothing is missing; of the other nothing is known
        assert not model[name].lora_B["default"].weight.any()


def test_peft_takes_names_as_they_stand_while_an_adapter_is_attached():
    before = getattr(conversion, _REWRITES)
    with pytest.raises(ValueError), names_as_written():
        assert getattr(conversion, _REWRITES) is not before
        assert getattr(conversion, _REWRITES)(1, x=2) is None
        raise ValueError
    assert getattr(conversion, _REWRITES) is before


def test_calibrated_weights_are_of_the_same_weight_or_refused(tmp_path: Path):
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    stored = Nf4().stored(weight)
    path = tmp_path / "x.safetensors"
    near = Nf4().stored(weight + 0.3 * torch.randn(64, 64))  # a change of 9 % of its energy
    _check_same_weight("l", stored, near, path)
    with pytest.raises(ManifestError, match=r"of l in .* differs from the model's own by \d+%"):
        _check_same_weight("l", stored, Nf4().stored(torch.randn(64, 64)), path)
    with pytest.raises(ManifestError, match=r"has shape \(32, 128\), not \(64, 64\)"):
        _check_same_weight("l", stored, Nf4().stored(torch.randn(32, 128)), path)
    nothing = Nf4().stored(torch.zeros(64, 64))
    _check_same_weight("l", nothing, nothing, path)  # nothing can be told of zeros
    with pytest.raises(ManifestError):
        _check_same_weight("l", nothing, stored, path)
