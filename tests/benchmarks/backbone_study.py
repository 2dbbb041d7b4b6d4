"""What 4-bit breaks in the model of `tests.benchmarks.backbone`, and what a skip-list and calibration leave.

    python -m tests.benchmarks.backbone_study --model FOLDER --out reports/backbone [--device cuda]
        [--samples 64] [--calibration 256] [--held-out 384] [--ablate all] [--work runs/backbone]

Scans the model twice (plain and calibrated NF4), the plain one with the KL of every layer alone (ablation),
compares every model on other scenes with their facts, sets the published rule of thumb (all of the vision
tower's linears and the cross-attention output projections stay in 16-bit) beside the list of the same bytes,
and writes README.md and results.json into --out. Each step is written to --work/FORMAT.json as it ends.
`--parts nf4` and `--parts nf4-calibrated` may run side by side on one machine; `--parts` alone writes the
report of what lies in --work.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import fsum
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

import qprobe
from qprobe.checkpoint.comparing.rows import Comparison
from qprobe.demo.evaluate import RECORD, score, score_by_kind
from qprobe.demo.scenes import CALIBRATION_SEED, HELD_OUT_SEED, KINDS, scenes
from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject, subject_of
from qprobe.options import no_progress
from qprobe.records import FormatSpec, Sample
from qprobe.runs.statistics import ratio_se
from qprobe.system.files import write_atomic
from tests.benchmarks.hardware import made_with
from tests.benchmarks.rankings.measured import NOTHING, Measured

FORMATS = ("nf4", "nf4-calibrated")
SCORES = ("weight_nmse", "activation_nmse", "propagated_nmse", "sensitivity_kl", "isolated_kl")
SELECTED = "list of select, +10 %"
BATCH, ANSWER_BATCH = 16, 64


def rows_of(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Rows as a user brings them: an image, a question and its answer."""
    return [
        {"id": s.id, "image": Image.open(io.BytesIO(s.images[0])), "prompt": s.prompt, "answer": s.answer}
        for s in samples
    ]


def facts_metric(samples: Sequence[Sample]) -> Any:
    """The share of a scene's facts that an answer states, as a metric of `qprobe.compare`."""
    known = {s.id: s for s in samples}

    def facts(sample: Sample, answer: str) -> float:
        """0 to 1."""
        return score([known[sample.id]], [answer]).share

    return facts


@dataclass(frozen=True)
class Asked:
    """samples, calibration, held_out: scenes of the scan of plain NF4, of the calibrated one, and of the
    comparisons. ablate: of the scan of plain NF4, see `qprobe.scan`."""

    model: str
    work: Path
    device: str
    samples: int
    calibration: int
    held_out: int
    ablate: str

    @property
    def counts(self) -> dict[str, Any]:
        """The options that decide the numbers."""
        names = ("samples", "calibration", "held_out", "ablate")
        return {name: getattr(self, name) for name in names}

    @property
    def judged(self) -> list[Sample]:
        """Scenes that no scan saw."""
        return scenes(self.held_out, HELD_OUT_SEED)


def scanned(asked: Asked, name: str) -> qprobe.Run:
    """The scan of the format `name`: of plain NF4 with ablation."""
    is_plain = name == "nf4"
    count = asked.samples if is_plain else asked.calibration
    return qprobe.scan(
        asked.model, data=rows_of(scenes(count, CALIBRATION_SEED)), samples=count, device=asked.device,
        batch_size=BATCH, format=name, out=asked.work / name, progress=no_progress,
        ablate=asked.ablate if is_plain else None,
    )  # fmt: skip


def compared(run: qprobe.Run, model: str, samples: Sequence[Sample], device: str) -> Comparison:
    """The models of a run's manifest on scenes that no scan saw."""
    assert run.skiplist is not None
    return qprobe.compare(
        run.skiplist, model=model, data=rows_of(samples), samples=len(samples), device=device,
        batch_size=ANSWER_BATCH, metric=facts_metric(samples),
    )  # fmt: skip


def facts_by_kind(comparison: Comparison, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Facts stated right of each model: over all, and of each kind."""
    known = {s.id: s for s in samples}
    ordered = [known[s.id] for s in comparison.samples]
    found = {}
    for row in comparison.rows:
        answers = [s.answers[row.name] for s in comparison.samples]
        kinds = score_by_kind(ordered, answers)
        found[row.name] = {"all": score(ordered, answers).share} | {k: kinds[k].share for k in KINDS}
    return found


def rule_of_thumb(subject: Subject) -> frozenset[str]:
    """The vision tower's linears and the cross-attention output projections."""
    return frozenset(
        x.name
        for x in subject.inventory.layers
        if x.fixed is None and ("vision_model" in x.name or x.name.endswith("cross_attn.o_proj"))
    )


def lists_at_equal_bytes(run: qprobe.Run, model: str, samples: Sequence[Sample], device: str) -> Any:
    """KL on `samples` of the published rule and of the list that a run gives for the same bytes."""
    subject = subject_of(load_reference(model, device), FormatSpec())
    batches = [subject.encode(part) for part in subject.groups(tuple(samples), BATCH)]
    rule = rule_of_thumb(subject)
    size = subject.inventory.total_bytes(rule)
    everything = frozenset(x.name for x in subject.inventory.layers if x.fixed is None)
    vision = frozenset(x for x in everything if "vision_model" in x)
    ours = frozenset(run.select(f"{size}").skip_modules) & everything
    lists = {
        "nothing kept": NOTHING,
        "published rule: vision linears and cross-attention outputs": rule,
        "list of select at the same bytes": ours,
        SELECTED: frozenset(run.select().skip_modules) & everything,
        "only the vision tower in 4-bit": everything - vision,
        "only the language model and the projector in 4-bit": vision,
    }
    with walking(subject.path):
        measured = Measured(subject, batches)
        frames = {name: measured.frame(kept) for name, kept in lists.items()}
    whole = frames["nothing kept"]["kl_sum"]
    return [
        {
            "name": name,
            "kept": len(lists[name]),
            "bytes": subject.inventory.total_bytes(lists[name]),
            **_kl_and_saved(frame, whole),
        }
        for name, frame in frames.items()
    ]


def _kl_and_saved(frame: pd.DataFrame, whole: pd.Series) -> dict[str, float]:
    """The KL of a list, and what it saves of the KL sums `whole`, which are of the same scenes."""
    tokens = frame["answer_tokens"]
    saved = whole - frame["kl_sum"]
    return {
        "kl": fsum(frame["kl_sum"]) / fsum(tokens),
        "kl_se": ratio_se(frame["kl_sum"], tokens),
        "saved": fsum(saved) / fsum(tokens),
        "saved_se": ratio_se(saved, tokens),
    }


def correlations(run: qprobe.Run) -> dict[str, dict[str, float]]:
    """Spearman of each score with what ablation measured of each layer: alone in 4-bit, alone in 16-bit."""
    table = run.layers.merge(pd.read_csv(run.path / "ablation.csv"), on="layer")
    return {
        score: {
            measured: table[score].corr(table[measured], method="spearman")
            for measured in ("kl_isolated", "kl_saved")
        }
        for score in SCORES
    }


def leaders(table: pd.DataFrame, count: int = 10) -> Sequence[Mapping[Any, Any]]:
    """The layers with the greatest sensitivity."""
    top = table.sort_values("sensitivity_kl", ascending=False).head(count)
    return top[["layer", "tower", "weight_nmse", "activation_nmse", "sensitivity_kl"]].to_dict("records")


def towers(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Each tower's share of the sensitivity, and of the 16-bit bytes of its linears."""
    total, size = table["sensitivity_kl"].sum(), table["bytes_16bit"].sum()
    return {
        str(name): {
            "sensitivity": float(part["sensitivity_kl"].sum() / total),
            "bytes": float(part["bytes_16bit"].sum() / size),
        }
        for name, part in table.groupby("tower")
    }


def study(asked: Asked, name: str) -> None:
    """Measures the format `name`, and writes what is known to its file in `asked.work` as each step ends."""
    found: dict[str, Any] = {"made_with": made_with(asked.device), "seconds": {}}
    start = time.monotonic()

    def note(step: str, **values: Any) -> None:
        nonlocal start
        found["seconds"][step], start = round(time.monotonic() - start, 1), time.monotonic()
        found.update(values)
        write_atomic(asked.work / f"{name}.json", json.dumps(found, indent=1, default=str).encode())
        print(f"{name}: {step} {found['seconds'][step]} s", flush=True)

    run = scanned(asked, name)
    told = {key: value for key, value in run.to_json().items() if key not in ("run", "skiplist")}
    note("scan", scan=told, kept=len(run.select().skip_modules))
    judged = asked.judged
    comparison = compared(run, asked.model, judged, asked.device)
    note(
        "compare",
        rows=[asdict(row) for row in comparison.rows],
        facts=facts_by_kind(comparison, judged),
        metric=[metric.to_json() for metric in comparison.metrics],
    )
    if name == "nf4":
        note("layers", correlations=correlations(run), leaders=leaders(run.layers), towers=towers(run.layers))
        with torch.no_grad() if asked.device == "cpu" else nullcontext():
            lists = lists_at_equal_bytes(run, asked.model, judged[: len(judged) // 2], asked.device)
        note("lists", lists=lists)


def gathered(asked: Asked) -> dict[str, Any]:
    """What both parts left in `asked.work`."""
    parts = {name: json.loads((asked.work / f"{name}.json").read_text()) for name in FORMATS}
    shared = {key: parts["nf4"].pop(key) for key in ("correlations", "leaders", "towers", "lists")}
    training = json.loads((Path(asked.model) / RECORD).read_text())
    made = parts["nf4"]["made_with"]
    return {"made_with": made, "training": training, **asked.counts, **parts, **shared}


def markdown(found: Mapping[str, Any], told: str) -> str:
    """README.md of the report, `told` being the options that decide its numbers."""
    training, evaluation = found["training"], found["training"]["evaluation"]
    took, text = training["training"], training["text"]
    right = 100 * evaluation["facts_right"]
    parts = [
        "# A vision-language model with a natural language backbone\n",
        f"SmolLM2-135M with its real weights, {training['parameters']:,} parameters with the inserted "
        f"cross-attention layers and the demo's vision tower; {took['steps']} steps of {training['batch']} "
        f"scenes in {took['seconds']:.0f} s, the language model frozen in the first {took['alone']}. In "
        f"16-bit it states {right:.1f} % of the facts of {evaluation['held_out_scenes']} held-out scenes; on "
        f"ordinary text its KL to SmolLM2 is {text['kl']:.4f} nats per token (whose own loss there is "
        f"{text['loss_of_smollm2']:.2f}). Its weights come from a file in Q4_1, which [flatters some formats]"
        "(../peers/README.md#where-these-weights-come-from) but not NF4. "
        f"{found['made_with']}.\n",
        "    python -m tests.benchmarks.backbone --out FOLDER\n"
        f"    python -m tests.benchmarks.backbone_study --model FOLDER --out reports/backbone {told}\n",
        f"{found['samples']} scenes for the plain scan, {found['calibration']} for the calibrated one, "
        f"{found['held_out']} others for the comparisons. The training is "
        f"repeated by `--steps {took['steps']}`; its weights are not kept.\n",
    ]
    parts += [_short(found), *(_models(name, found[name]) for name in FORMATS)]
    parts += [_lists(found["lists"], found["held_out"] // 2), _layers(found)]
    return "\n".join(parts)


def _short(found: Mapping[str, Any]) -> str:
    """The answers in a few lines."""
    (facts,) = (
        x for x in found["nf4"]["metric"][0]["differences"] if (x["model"], x["against"]) == ("nf4", "16-bit")
    )
    listed = next(x for x in found["lists"] if x["name"] == SELECTED)
    kl = {row["name"]: row["kl"] for row in found["nf4-calibrated"]["rows"]}
    return "\n".join(
        [
            "- Facts right in a scene, standard 4-bit against 16-bit: "
            f"{100 * facts['value']:+.1f} ± {100 * facts['se']:.1f} points.",
            f"- With the list of `select` at +10 % the KL is {listed['saved']:.4f} ± "
            f"{listed['saved_se']:.4f} lower than standard 4-bit's (paired), "
            f"{listed['saved'] / listed['saved_se']:.1f} errors.",
            f"- Calibrated 4-bit leaves {kl['nf4-calibrated'] / kl['nf4']:.3f} of standard 4-bit's KL, with "
            f"its list {kl['dynamic'] / kl['nf4']:.3f}.\n",
        ]
    )


def _models(name: str, one: Mapping[str, Any]) -> str:
    rows = [
        f"## The scan in {name}\n\n{one['scan']['verdict']}\n",
        "| model | MB | KL, nats per answer token | share of the first 4-bit row | facts right | "
        + " | ".join(KINDS)
        + " |",
        "|---" * (5 + len(KINDS)) + "|",
    ]
    first = next(row["kl"] for row in one["rows"] if row["name"] != "16-bit")
    for row in one["rows"]:
        facts = one["facts"][row["name"]]
        share = "" if row["name"] == "16-bit" else f"{row['kl'] / first:.3f}"
        cells = " | ".join(f"{100 * facts[kind]:.1f} %" for kind in ("all", *KINDS))
        rows.append(
            f"| {row['name']} | {row['total_bytes'] / 1e6:.1f} | {row['kl']:.5f} ± {row['kl_se'] or 0:.5f} | "
            f"{share} | {cells} |"
        )
    for difference in one["metric"][0]["differences"]:
        rows.append("") if difference is one["metric"][0]["differences"][0] else None
        if difference["against"] == "16-bit":
            value, se = difference["value"], difference["se"]
            verdict = "found" if abs(value) > 2 * se else "no difference found"
            rows.append(
                f"- {difference['model']} against 16-bit, facts right in a scene: "
                f"{100 * value:+.1f} ± {100 * se:.1f} points ({verdict})"
            )
    return "\n".join([*rows, ""])


def _lists(lists: Sequence[Mapping[str, Any]], samples: int) -> str:
    rows = [
        f"## Lists on plain NF4, {samples} scenes\n",
        "Lists of `select` follow from the scan's table alone, without the measuring that ends a scan.\n",
        "| list | layers kept | MB | KL | less than with nothing kept (paired) |",
        "|---|---|---|---|---|",
    ]
    rows += [
        f"| {x['name']} | {x['kept']} | {x['bytes'] / 1e6:.1f} | {x['kl']:.5f} ± {x['kl_se']:.5f} | "
        f"{x['saved']:.5f} ± {x['saved_se']:.5f} |"
        for x in lists
    ]
    return "\n".join([*rows, ""])


def _layers(found: Mapping[str, Any]) -> str:
    rows = ["## Which layers\n", "| tower | share of the sensitivity | share of the bytes |", "|---|---|---|"]
    rows += [
        f"| {name} | {100 * x['sensitivity']:.1f} % | {100 * x['bytes']:.1f} % |"
        for name, x in found["towers"].items()
    ]
    rows += [
        "",
        "Spearman correlation of each score with measured KL: of the layer alone in 4-bit, and what "
        "the layer alone in 16-bit saves.\n",
        "| score | alone in 4-bit | alone in 16-bit |",
        "|---|---|---|",
    ]
    rows += [
        f"| {name} | {x['kl_isolated']:.2f} | {x['kl_saved']:.2f} |"
        for name, x in found["correlations"].items()
    ]
    rows += ["", "| layer | weight nmse | activation nmse | sensitivity |", "|---|---|---|---|"]
    rows += [
        f"| {x['layer']} | {x['weight_nmse']:.4g} | {x['activation_nmse']:.4g} | {x['sensitivity_kl']:.3g} |"
        for x in found["leaders"]
    ]
    return "\n".join([*rows, "", "![What 4-bit costs each layer](spikes.png)"])


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder that tests.benchmarks.backbone wrote")
    parser.add_argument("--out", type=Path, help="of the report; without it the parts are measured alone")
    parser.add_argument("--work", type=Path, default=Path("runs/backbone"), help="the run folders")
    parser.add_argument("--samples", type=int, default=64, help="scenes of the scan of plain NF4")
    parser.add_argument("--calibration", type=int, default=256, help="scenes of the calibrated scan")
    parser.add_argument("--held-out", type=int, default=384)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ablate", default="all", help="layers to measure alone: all, or how many")
    parser.add_argument("--parts", nargs="*", choices=FORMATS, default=FORMATS)
    options = parser.parse_args()
    asked = Asked(
        options.model, options.work, options.device, options.samples, options.calibration,
        options.held_out, options.ablate,
    )  # fmt: skip
    for name in options.parts:
        study(asked, name)
    if options.out is None:
        return
    found = gathered(asked)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    told = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asked.counts.items())
    shutil.copy(options.work / "nf4" / "report" / "spikes.png", options.out)
    (options.out / "README.md").write_text(markdown(found, told) + "\n")
    print(markdown(found, told))


if __name__ == "__main__":
    main()
