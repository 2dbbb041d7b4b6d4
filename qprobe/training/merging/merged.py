"""What a merge gives back, which form it keeps, and the model card with the proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import fsum, isfinite
from pathlib import Path
from typing import Any

from qprobe import __version__
from qprobe.checkpoint.adapters.effect import TOO_SMALL
from qprobe.checkpoint.card import auto_class, card_head, plain_usage, task_of
from qprobe.checkpoint.comparing.course import ModelResult
from qprobe.checkpoint.comparing.rows import Comparison, Row
from qprobe.errors import ModelError
from qprobe.loading.skeleton import Skeleton
from qprobe.manifest.records import Manifest
from qprobe.options import Form
from qprobe.runs.statistics import ratio
from qprobe.system.markdown import plain
from qprobe.system.wording import counted
from qprobe.training.merging.forms import CALIBRATED, ROUNDINGS, Candidate


@dataclass(frozen=True)
class Merged:
    """A merged checkpoint. kept: which candidate; why: a sentence on why this one; base: of the adapter.

    layers: that the adapter is on; unchanged: those of them whose lora_B is zero; rounded_away: those
    whose stored weights hold less than half of what it adds, as `audit --adapter` says too. arrived: the
    share of what the adapter adds that is in the stored weights, 1 for all
    (`qprobe.checkpoint.adapters.effect.Arrived`).
    comparison: of base + adapter, its first row, with each form that was made. files: name -> bytes.
    """

    out: Path
    kept: Candidate
    why: str
    base: str
    layers: int
    unchanged: tuple[str, ...]
    rounded_away: tuple[str, ...]
    arrived: float
    comparison: Comparison
    files: Mapping[str, int] | None = None

    def with_files(self, files: Mapping[str, int]) -> Merged:
        return replace(self, files=files)

    @property
    def form(self) -> Form:
        """Of its weights."""
        return "16-bit" if self.kept == "16-bit" else "4-bit"

    @property
    def rounding(self) -> str | None:
        """Of the weights in 4-bit that the adapter changes; None for 16-bit."""
        return ROUNDINGS.get(self.kept)

    @property
    def row(self) -> Row:
        """What was measured of the checkpoint that was kept."""
        return next(x for x in self.comparison.rows if x.name == self.kept)

    def to_json(self) -> dict[str, Any]:
        """The object of `merge --json`."""
        return {
            "out": str(self.out),
            "form": self.form,
            "rounding": self.rounding,
            "why": self.why,
            "base": self.base,
            "layers": self.layers,
            "unchanged": list(self.unchanged),
            "rounded_away": list(self.rounded_away),
            "arrived": self.arrived,
            **self.comparison.to_json(),
            "files": dict(self.files or {}),
        }


def chosen(results: Mapping[Candidate, ModelResult]) -> tuple[Candidate, str]:
    """(the candidate to keep, why): of 4-bit the rounding with the lower KL, then a form by `chosen_form`.

    One whose KL is NaN or infinite is never kept. Raises ModelError where each one's is.
    """
    finite = {name: x for name, x in results.items() if isfinite(fsum(one.kl for one in x.sums))}
    broken = " and ".join(name for name in results if name not in finite)
    if not finite:
        raise ModelError(
            f"The KL of {broken} to base + adapter is NaN or infinite, so nothing tells what the merge "
            "loses, and nothing was kept. Serve the adapter beside its base."
        )
    roundings: list[Candidate] = [x for x in ROUNDINGS if x in finite]
    forms: dict[Form, ModelResult] = {"16-bit": finite["16-bit"]} if "16-bit" in finite else {}
    best = min(roundings, key=lambda x: fsum(one.kl for one in finite[x].sums), default=None)
    if best is not None:
        forms["4-bit"] = finite[best]
    form, why = chosen_form(forms)
    if broken and len(forms) == 1:  # which need not be the one that was asked for
        why = f"{form} was kept."
    if broken:
        why += f" The KL of {broken} is NaN or infinite."
    if best is not None and len(roundings) > 1:
        why += f" Of both roundings to 4-bit, {ROUNDINGS[best]} has the lower KL."
    return (best if best is not None and form == "4-bit" else form), why


def chosen_form(results: Mapping[Form, ModelResult]) -> tuple[Form, str]:
    """(the form to keep, why): the lower KL to base + adapter; 4-bit, the smaller, where none is found lower.

    A difference is found if it is more than twice its standard error, paired by sample.
    """
    if len(results) == 1:
        (form,) = results
        return form, f"{form} was asked for."
    four, sixteen = results["4-bit"].sums, results["16-bit"].sums
    difference, error = ratio(
        [a.kl - b.kl for a, b in zip(four, sixteen, strict=True)], [x.tokens for x in four]
    )
    if difference is None:
        return "4-bit", "4-bit was kept, the smaller one: no sample has an answer to tell them apart by."
    size = f"{abs(difference):.3g}{'' if error is None else f' ± {error:.1g}'} nats per answer token"
    if (error is not None and abs(difference) <= 2 * error) or difference == 0:
        return "4-bit", f"4-bit was kept, the smaller one: no difference in KL was found ({size})."
    better: Form = "16-bit" if difference > 0 else "4-bit"
    return better, f"{better} was kept: its KL to base + adapter is lower by {size}."


def lost(made: Merged) -> str:
    """Two sentences on what the kept checkpoint lost against base + adapter."""
    row, reference = made.row, made.comparison.rows[0]
    told = [
        "no answer token"
        if row.kl is None
        else f"a KL of {_number(row.kl, row.kl_se)} nats per answer token",
        f"{row.answer_agreement:.1%} of {counted(len(made.comparison.samples), 'greedy answer')} unchanged",
    ]
    for metric in (x for x in made.comparison.metrics if x.samples):
        mine, theirs = (_mean(metric.means[x.name].value, metric.is_share) for x in (row, reference))
        told.append(f"{metric.name} {mine} against {theirs}")
    away = len(made.rounded_away)
    fewer = f", less than half of it in {away} of {counted(made.layers, 'layer')}, since {TOO_SMALL}"
    return (
        f"Against base + adapter: {', '.join(told)}. "
        f"{made.arrived:.1%} of what the adapter adds is in the stored weights{fewer if away else ''}."
    )


_IN_4BIT = "The weights that the adapter was trained beside, with the adapter added, in 4-bit"
_WEIGHTS: dict[Candidate, str] = {
    "16-bit": "The 16-bit weights with what the adapter learned added.",
    "4-bit": f"{_IN_4BIT}. What it changes is rounded to nearest.",
    CALIBRATED: f"{_IN_4BIT}. Codes of what it changes were calibrated on samples, none of them among those "
    "below.",
}


def card(made: Merged, manifest: Manifest, skeleton: Skeleton) -> str:
    """README.md of the merged checkpoint: what it is of, what was measured, how to load it."""
    auto, is_four_bit = auto_class(skeleton.architecture), made.form == "4-bit"
    tags = ["qprobe", "merged", "lora", *(["bitsandbytes", "4-bit"] if is_four_bit else [])]
    head = card_head("transformers", manifest.model.id, tags, pipeline_tag=task_of(auto))
    unchanged = f"; {len(made.unchanged)} of them it leaves as they are" if made.unchanged else ""
    parts = [
        f"---\n{head}---",
        f"# {plain(manifest.model.id.rpartition('/')[2])}, merged with an adapter, {made.form}",
        f"{_WEIGHTS[made.kept]} The adapter is on {counted(made.layers, 'linear layer')} of the {made.base} "
        f"base{unchanged}.",
        "## Measured",
        f"{lost(made)} {made.why}",
        _table(made),
        f"On {counted(len(made.comparison.samples), 'sample')}; KL in nats per answer token ± standard "
        "error. Each merged model was loaded as below. Bytes include the quantization state.",
        "## Use",
        plain_usage(auto, is_four_bit),
        f"Made by `qprobe merge` {__version__} from {plain(manifest.model.id)} (fingerprint "
        f"`{manifest.model.fingerprint}`). The licence is that of the model it was made from.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(made: Merged) -> str:
    lines = ["| model | bytes | KL to base + adapter | same greedy answers |", "|---|---|---|---|"]
    for row in made.comparison.rows:
        name = f"**{row.name}** (this model)" if row is made.row else row.name
        kl = _number(row.kl, row.kl_se)
        lines.append(f"| {name} | {row.total_bytes:,} | {kl} | {row.answer_agreement:.1%} |")
    return "\n".join(lines)


def _number(value: float | None, error: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.1g}"


def _mean(value: float | None, is_share: bool) -> str:
    if value is None:
        return "not measured"
    return f"{value:.1%}" if is_share else f"{value:.4g}"
