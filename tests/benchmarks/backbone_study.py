"""What 4-bit breaks in the model of `tests.benchmarks.backbone`, and what a skip-list and calibration mend.

    python -m tests.benchmarks.backbone_study --model FOLDER --out reports/backbone [--device cuda]
        [--samples 64] [--calibration 256] [--held-out 384] [--work runs/backbone]

Scans the model twice (plain and calibrated NF4), the plain one with the KL of every layer alone (ablation),
compares every model on other scenes with their facts, sets the published rule of thumb (all of the vision
tower's linears and the cross-attention output projections stay in 16-bit) beside the list of the same bytes,
and writes README.md and results.json into --out.
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
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from scipy.stats import spearmanr

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
from tests.benchmarks.hardware import made_with
from tests.benchmarks.rankings.measured import NOTHING, Measured

SCORES = ("weight_nmse", "activation_nmse", "propagated_nmse", "sensitivity_kl", "isolated_kl")
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


def scans(model: str, work: Path, samples: int, calibration: int, device: str) -> dict[str, qprobe.Run]:
    """A scan of each format: of plain NF4 on `samples` scenes with ablation, calibrated on `calibration`."""

    def scan(name: str, count: int, **asked: Any) -> qprobe.Run:
        rows = rows_of(scenes(count, CALIBRATION_SEED))
        return qprobe.scan(
            model, data=rows, samples=count, device=device, batch_size=BATCH, format=name, out=work / name,
            progress=no_progress, **asked,
        )  # fmt: skip

    return {
        "nf4": scan("nf4", samples, ablate="all"),
        "nf4-calibrated": scan("nf4-calibrated", calibration),
    }


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
        "list by sensitivity at the same bytes": ours,
        "only the vision tower in 4-bit": everything - vision,
        "only the language model and the projector in 4-bit": vision,
    }
    with walking(subject.path):
        measured = Measured(subject, batches)
        frames = {name: measured.frame(kept) for name, kept in lists.items()}
    return [_list_row(name, lists[name], frames[name], subject) for name in lists]


def _list_row(name: str, kept: frozenset[str], frame: pd.DataFrame, subject: Subject) -> dict[str, Any]:
    sums, tokens = frame["kl_sum"].tolist(), frame["answer_tokens"].tolist()
    return {
        "name": name,
        "kept": len(kept),
        "bytes": subject.inventory.total_bytes(kept),
        "kl": sum(sums) / sum(tokens),
        "kl_se": ratio_se(sums, tokens),
    }


def correlations(run: qprobe.Run) -> dict[str, dict[str, float]]:
    """Spearman of each score with what ablation measured of each layer: alone in 4-bit, alone in 16-bit."""
    table = run.layers.merge(pd.read_csv(run.path / "ablation.csv"), on="layer")
    return {
        score: {
            measured: float(spearmanr(table[score], table[measured], nan_policy="omit").statistic)
            for measured in ("kl_isolated", "kl_saved")
        }
        for score in SCORES
    }


def leaders(table: pd.DataFrame, count: int = 10) -> list[dict[str, Any]]:
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


@dataclass(frozen=True)
class Counts:
    """Scenes of the scan of plain NF4, of the calibrated one, and of the comparisons."""

    samples: int
    calibration: int
    held_out: int


def study(model: str, work: Path, counts: Counts, device: str) -> dict[str, Any]:
    """All results as JSON values."""
    runs = scans(model, work, counts.samples, counts.calibration, device)
    held_out = counts.held_out
    judged = scenes(held_out, HELD_OUT_SEED)
    found: dict[str, Any] = {
        "made_with": made_with(device),
        "training": json.loads((Path(model) / RECORD).read_text()),
        **asdict(counts),
    }
    for name, run in runs.items():
        start = time.monotonic()
        comparison = compared(run, model, judged, device)
        found[name] = {
            "scan": {key: value for key, value in run.to_json().items() if key not in ("run", "skiplist")},
            "kept": len(run.select().skip_modules),
            "rows": [asdict(row) for row in comparison.rows],
            "facts": facts_by_kind(comparison, judged),
            "metric": [metric.to_json() for metric in comparison.metrics],
            "compare_seconds": time.monotonic() - start,
        }
    table = runs["nf4"].layers
    found["correlations"] = correlations(runs["nf4"])
    found["leaders"] = leaders(table)
    found["towers"] = towers(table)
    with torch.no_grad() if device == "cpu" else nullcontext():
        found["lists"] = lists_at_equal_bytes(runs["nf4"], model, judged[: held_out // 2], device)
    return found


def markdown(found: Mapping[str, Any], command: str) -> str:
    """README.md of the report."""
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
        f"{text['loss_of_smollm2']:.2f}). {found['made_with']}.\n",
        f"    {command}\n",
        f"{found['samples']} scenes for the plain scan, {found['calibration']} for the calibrated one, "
        f"{found['held_out']} others for the comparisons. The training is "
        f"repeated by `--steps {took['steps']}`; its weights are not kept.\n",
    ]
    for name in ("nf4", "nf4-calibrated"):
        parts += [_models(name, found[name])]
    parts += [_lists(found["lists"], found["held_out"] // 2), _layers(found)]
    return "\n".join(parts)


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
        "| list | layers kept | MB | KL |",
        "|---|---|---|---|",
    ]
    rows += [
        f"| {x['name']} | {x['kept']} | {x['bytes'] / 1e6:.1f} | {x['kl']:.5f} ± {x['kl_se']:.5f} |"
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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/backbone"), help="the run folders")
    parser.add_argument("--samples", type=int, default=64, help="scenes of the scan of plain NF4")
    parser.add_argument("--calibration", type=int, default=256, help="scenes of the calibrated scan")
    parser.add_argument("--held-out", type=int, default=384)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    counts = Counts(options.samples, options.calibration, options.held_out)
    found = study(options.model, options.work, counts, options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    asked = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asdict(counts).items())
    command = f"python -m tests.benchmarks.backbone_study --model FOLDER {asked}"
    shutil.copy(options.work / "nf4" / "report" / "spikes.png", options.out)
    (options.out / "README.md").write_text(markdown(found, command) + "\n")
    print(markdown(found, command))


if __name__ == "__main__":
    main()
