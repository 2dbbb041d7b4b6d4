"""A finished run of any size with everything a scan leaves, made up.

Values are like those of a real scan: errors of half a decade around a level, a few layers far above it,
sensitivities of both signs that sum to the measured KL.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from qprobe import __version__
from qprobe.loading.config import catalogue_config
from qprobe.loading.inventory import list_layers
from qprobe.loading.skeleton import meta_model
from qprobe.manifest.records import Compared, Quality
from qprobe.manifest.write import write_manifest
from qprobe.models.catalogue import find
from qprobe.models.grid import Grid
from qprobe.records import CodesFile, FormatSpec, Inventory, Linear, ModelIdentity, Score
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import VERSION, Key, Measures, SampleKey, Spec
from qprobe.runs.layers.ranks import write_ranks
from qprobe.runs.layers.table import write_table
from qprobe.runs.notes import Ended, Remarks
from qprobe.runs.scored import scored
from qprobe.runs.shown import ShownSample, write_shown
from qprobe.runs.units import candidate_stage
from qprobe.selection.select import select
from tests.report.tables import layer_names

SPIKES = {3: 60.0, 14: 25.0, 17: 90.0, 25: 40.0}  # index -> factor, at any size
ANSWER = ("The", " dial", " shows", " 7", ".")
GRID = Grid(1, 10, 10)
VISION_ROWS = 104  # 100 patches and a class token, padded to a multiple of 8
HELD_OUT = 8


def write_full_run(
    folder: Path,
    layers: int = 30,
    samples: int = 6,
    names: dict[int, str] | None = None,
    model: str = "owner/model",
    codes: CodesFile | None = None,
) -> Path:
    """`folder`, holding a run of `layers` linears on `samples` samples. names: index -> other layer name.

    codes: of a run in calibrated NF4, where there is such a file.
    """
    linears = _linears(layers, names or {})
    inventory = Inventory(linears, (), 100_000)
    ids = [f"sample-{i}" for i in range(samples)]
    key = _key(ModelIdentity(model, None, "MllamaForConditionalGeneration", "f" * 64), inventory, ids)
    if codes is not None:
        key = replace(key, format=FormatSpec("nf4-calibrated"))
    return _measured(folder, key, SPIKES, codes)


def write_llama_11b(folder: Path, samples: int = 6) -> Path:
    """`folder`, holding such a run of the 522 linears of Llama-3.2-11B-Vision.

    Layers that a published list keeps are the ones that stand out.
    """
    entry = find("llama-3.2-11b-vision")
    assert entry is not None and entry.hub_id is not None
    found = list_layers(meta_model(catalogue_config(entry), "bfloat16"), FormatSpec())
    order = {"vision": 0, "projector": 1}  # as it runs, where modules are in another order
    linears = tuple(sorted(found.layers, key=lambda x: order.get(x.tower, 2)))
    published = entry.published[0].kept(found)
    high = [i for i, x in enumerate(linears) if x.name in published]
    factors = np.random.default_rng(0).uniform(8, 80, len(high))
    ids = [f"sample-{i}" for i in range(samples)]
    model = ModelIdentity(entry.hub_id, None, entry.architecture, "f" * 64)
    key = _key(model, replace(found, layers=linears), ids)
    return _measured(folder, key, dict(zip(high, factors.tolist(), strict=True)))


def _measured(folder: Path, key: Key, spikes: dict[int, float], codes: CodesFile | None = None) -> Path:
    """`folder` with all that a finished scan leaves. spikes: index -> factor of its errors."""
    ids = [sample.id for batch in key.spec.calibration for sample in batch]
    run = RunFolder(folder)
    run.open(key)
    run.notes.put("start", Remarks(("x.txt: skipped, it is no image",)))
    run.notes.put("end", Ended({}, None, (), ""))
    if codes is not None:
        run.notes.put("codes", codes)
    _write_units(folder, key.inventory.layers, ids, spikes)
    write_table(run)
    write_ranks(run)
    write_shown(run, [_shown(name, i) for i, name in enumerate(ids)])
    _choose(folder, key.inventory)
    return folder


_right, _wrong, _silent = Score(1.0, 1), Score(0.0, 1), Score()


def write_comparison(folder: Path, prompt: str = "What does the dial show?") -> None:
    """RUN/compare.json as `qprobe compare` leaves it: nf4 answers one of two samples in another way."""
    manifest = json.loads((folder / "skiplist.json").read_text())
    row = {"parameter_bytes": 1_000, "total_bytes": 1_100, "top1_agreement": 0.9}
    found = {
        "skip_modules": manifest["skip_modules"],
        "rows": [
            {"name": "16-bit", "kl": 0.0, "kl_se": 0.0, "answer_agreement": 1.0, **row},
            {"name": "nf4", "kl": 0.25, "kl_se": 0.02, "answer_agreement": 0.5, **row},
            {"name": "dynamic", "kl": 0.01, "kl_se": 0.002, "answer_agreement": 1.0, **row},
        ],
        "metrics": [
            scored(
                "exact",
                True,
                {
                    "16-bit": [_right, _right, _silent],
                    "nf4": [_wrong, _right, _silent],
                    "dynamic": [_right, _right, _silent],
                },
            ).to_json()
        ],
        "samples": [
            {"id": "a", "prompt": prompt, "answers": {"16-bit": "7 bar", "nf4": "9 bar", "dynamic": "7 bar"}},
            {"id": "b", "prompt": prompt, "answers": {"16-bit": "2", "nf4": "2", "dynamic": "2"}},
        ],
    }
    (folder / "compare.json").write_text(json.dumps(found))


def share_name(share: float) -> str:
    return f"{share:.0%} of the bytes that 4-bit saves"


def _linears(count: int, names: dict[int, str]) -> tuple[Linear, ...]:
    """`layer_names` with shapes that repeat as in a transformer; lm_head stays in 16-bit."""
    shapes = [(1024, 1024), (1024, 1024), (256, 1024), (1024, 256), (4096, 1024)]
    found = []
    for i, (plain, tower) in enumerate(layer_names(count)):
        name, shape = names.get(i, plain), shapes[i % len(shapes)]
        n = shape[0] * shape[1]
        blocks = n // 64
        found.append(
            Linear(
                name, f"old.{name}", tower, name, shape, n // 2 + blocks + 4 * -(-blocks // 256), 2 * n,
                fixed="lm_head" if plain == "lm_head" else None,
                reads="vision" if tower == "vision" else "text",
            )
        )  # fmt: skip
    return tuple(found)


def _key(model: ModelIdentity, inventory: Inventory, ids: list[str]) -> Key:
    held = tuple(SampleKey(f"held-{i}", str(i), True) for i in range(HELD_OUT))
    spec = Spec(
        weights="weights",
        device="cpu",
        measures=Measures(True, True),
        calibration=(tuple(SampleKey(name, name, True) for name in ids),),
        held_out=(held,),
        seed=0,
        versions={"qprobe": __version__, "torch": "2.13.0"},
    )
    return Key(VERSION, model, FormatSpec(), inventory, spec)


def _write_units(folder: Path, linears: tuple[Linear, ...], ids: list[str], spikes: dict[int, float]) -> None:
    rng = np.random.default_rng(len(linears))
    factor = np.array([spikes.get(i, 1.0) for i in range(len(linears))]) * np.exp(
        0.3 * rng.normal(size=len(linears))
    )
    weights = [
        (x.name, x.shape[0] * x.shape[1], 1.0, 8e-3 * np.sqrt(f), 0, 0.01)
        for x, f in zip(linears, factor, strict=True)
    ]
    frame = pd.DataFrame(weights, columns="layer n signal noise nonfinite peak".split())
    RunFolder(folder).write_unit("weights", 0, frame.assign(expert=None))
    outputs, parts = [], []
    for sample in ids:
        for x, f in zip(linears, factor, strict=True):
            is_vision = x.reads == "vision"
            tokens = VISION_ROWS if is_vision else 3 + len(ANSWER)
            peak = 0.2 * f * (1 + 0.1 * rng.random())
            at, kind = (int(rng.integers(101)), "vision") if is_vision else (6, "answer")  # " 7"
            outputs.append(
                (sample, x.name, tokens, 64, 1.0, 5e-3 * f, 0, peak, at, kind, 64, 1.0, 2e-2 * f, 0, 0)
            )
            if not x.fixed:
                parts.append((sample, x.name, 5, 1e-3 * f * (0.8 + 0.4 * rng.random()) - 4e-4 * (f < 0.8)))
    columns = (
        "sample layer tokens activation_n activation_signal activation_noise activation_nonfinite "
        "activation_peak peak_token peak_kind propagated_n propagated_signal propagated_noise "
        "propagated_nonfinite propagated_rerouted"
    ).split()
    RunFolder(folder).write_unit("outputs", 0, pd.DataFrame(outputs, columns=columns).assign(expert=None))
    sensitivity = pd.DataFrame(parts, columns=["sample", "layer", "answer_tokens", "kl_sum"])
    RunFolder(folder).write_unit("sensitivity", 0, sensitivity)
    RunFolder(folder).write_unit("isolated", 0, sensitivity.assign(kl_sum=0.4 * sensitivity["kl_sum"].abs()))
    total = sensitivity.groupby("sample", sort=False)["kl_sum"].sum()
    _write_kl(folder, "kl", list(total.index), list(total), "standard")


def _write_kl(folder: Path, stage: str, ids: list[str], sums: list[float], candidate: str) -> None:
    rows = [(name, candidate, 5, value, 4) for name, value in zip(ids, sums, strict=True)]
    columns = ["sample", "candidate", "answer_tokens", "kl_sum", "top1_agree"]
    RunFolder(folder).write_unit(stage, 0, pd.DataFrame(rows, columns=columns))


def _shown(name: str, index: int) -> ShownSample:
    drawn = io.BytesIO()
    Image.new("RGB", (140, 140), (40 * index % 256, 90, 160)).save(drawn, format="JPEG")
    picture = f"data:image/jpeg;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    tokens = ("<s>", None, "What?", *ANSWER)
    return ShownSample(
        name, "What does the dial show?", "The dial shows 7.", picture, (140, 140), tokens, GRID
    )


def _choose(folder: Path, inventory: Inventory) -> None:
    """Held-out measurements of the lists at two budgets, frontier.csv, and the manifest of +10 %."""
    held = [f"held-{i}" for i in range(HELD_OUT)]
    noise = 1 + 0.1 * np.random.default_rng(1).normal(size=HELD_OUT)
    standard = inventory.standard_4bit_bytes
    saved = inventory.total_bytes(frozenset(x.name for x in inventory.layers)) - standard
    _write_kl(folder, candidate_stage(frozenset()), held, list(1.0 * noise), "nothing kept")
    lines = []
    for share, kl in ((0.05, 0.25), (0.2, 0.1)):
        manifest = select(folder, str(standard + int(share * saved)))
        kept = frozenset(manifest.skip_modules) - {"lm_head"}
        _write_kl(folder, candidate_stage(kept), held, list(kl * noise), share_name(share))
        numbers = (manifest.budget.total_bytes, manifest.quality.kl_predicted, kl / 5, kl / 50)
        lines.append(",".join([*map(str, numbers), share_name(share)]))
    header = "budget_bytes,predicted_kl,measured_kl,measured_kl_se,candidate"
    (folder / "frontier.csv").write_text("\n".join([header, *lines]) + "\n")
    chosen = select(folder, "+10%")
    total = chosen.budget.total_bytes
    compared = (
        Compared("nothing kept", standard, 0.2, 0.01, False),
        Compared("by sensitivity_kl", total, 0.04, 0.004, True),
        Compared("a published list", total - 1, 0.12, 0.01, False),
    )
    quality = Quality(HELD_OUT, 0.2, 0.04, chosen.quality.kl_predicted)
    made_by = replace(chosen.made_by, command="qprobe scan --model owner/model --budget +10%")
    write_manifest(
        folder / "skiplist.json", replace(chosen, quality=quality, compared=compared, made_by=made_by)
    )
