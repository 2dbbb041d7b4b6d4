"""Calibrated codes and a skip-list together: held-out KL at equal bytes, against either alone.

    python -m tests.benchmarks.rankings.calibrated [--models demo demo-outliers smollm2] [--samples N]

Part of `tests.benchmarks.ranking`; alone it takes minutes in place of hours. The lists are the default's: by
the damage of rounding to nearest, and by the damage that calibration leaves.
"""

from __future__ import annotations

import argparse

import torch

from qprobe.calibration.codes import Readers, calibrate
from qprobe.calibration.gram import gathered, shared_inputs
from qprobe.calibration.token_weights import token_weights
from qprobe.formats.nf4 import Nf4
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject
from qprobe.runs.statistics import ratio_se
from qprobe.selection.search.damage import Damage
from tests.benchmarks.models import NAMES, Case, load_case
from tests.benchmarks.rankings import additive
from tests.benchmarks.rankings.lists import Chooser, Lists
from tests.benchmarks.rankings.measured import NOTHING, Measured

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)  # of the bytes that NF4 saves
BOTH = "**calibrated, list by what it leaves**"


def put_calibrated(subject: Subject, batches: tuple[Batch, ...]) -> None:
    """Put calibrated weights in place as a scan does where tokens are weighed.

    Not while `walking`, which changes the dtype of the weights.
    """
    inputs = shared_inputs(subject, batches)
    given = [batch.in_dtype(subject.path.dtype) for batch in batches]
    with walking(subject.path):
        counts = token_weights(subject, inputs, given)
        gathering = gathered(subject, inputs, given, weights=counts.of)
    for one in inputs:
        weights = [subject.modules[name].weight for name in one.names]
        with torch.no_grad():
            gram = gathering.grams.pop(one.leader)
            sides = [counts.outputs.get(name) for name in one.names]
            found = calibrate(Readers(weights, gram.total, gram.tokens, sides), Nf4())
        for name, rounded in zip(one.names, found, strict=True):
            if rounded.stored is not None:
                subject.dequantized.put(name, rounded.stored.packed())


def damage_of(case: Case) -> Damage:
    """The damage by the 4-bit weights that are in place; open `walking` around it."""
    batches = [batch.in_dtype(case.subject.path.dtype) for batch in case.calibration]
    return additive.default_damage(case.subject.path, batches)


def table(case: Case, nearest: Damage | None = None) -> str:
    """The Markdown table of one model; calibrated weights stay in place. Not while `walking`.

    nearest: the damage of rounding to nearest, where it is known already.
    """
    subject, chooser = case.subject, Chooser(case.subject.inventory)
    rows: dict[str, list[str]] = {}

    def add(title: str, measured: Measured, kept: Lists, shares=SHARES) -> None:
        for share in shares:
            frame = measured.frame(kept(share))
            kl, error = measured.kl(kept(share)), ratio_se(frame["kl_sum"], frame["answer_tokens"])
            rows.setdefault(title, []).append(f"{kl:.4g} ± {error:.1g} ({kl / standard:.1%})")

    with walking(subject.path):
        measured = Measured(subject, case.held_out)
        standard = measured.kl(NOTHING)
        nearest = damage_of(case) if nearest is None else nearest
        add("rounded to nearest, list by its damage", measured, chooser.damage_lists(nearest))
    put_calibrated(subject, case.calibration)
    with walking(subject.path):
        measured = Measured(subject, case.held_out)
        left = damage_of(case)
        add("calibrated, the list of the row above", measured, chooser.damage_lists(nearest))
        add(BOTH, measured, chooser.damage_lists(left))
    head = " | ".join(f"+{share:.0%}".replace("%", " %") for share in SHARES)
    lines = [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()]
    return "\n".join(
        [
            "### Calibrated codes and a skip-list together, fused groups whole\n",
            f"Calibrated on the same {sum(b.size for b in case.calibration)} samples. In brackets the share "
            "of the KL of rounding everything to nearest.\n",
            f"| {case.name} | {head} |",
            f"|---|{'---|' * len(SHARES)}",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Print the table of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--samples", type=int, help="calibration samples, and as many held-out ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models:
        print(table(load_case(name, options.samples, options.device)), flush=True)


if __name__ == "__main__":
    main()
