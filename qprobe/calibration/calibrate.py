"""Calibrated weights of a model: gather Gram matrices, round, and leave finished units.

A unit is the linears that read one tensor, numbered in execution order: their weights, as a file of 4-bit
weights, and a row each in a unit of the stage "calibration", which is written last. No unit needs another, so
that neither their order nor an interruption changes a weight, and processes can share them. Gram matrices do
not outlive their unit: they are large (0.8 GB for a down_proj of an 11B).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from qprobe.calibration.codes import Rounded
from qprobe.calibration.damage import FEWEST
from qprobe.calibration.decide import decided, tried_in_turn
from qprobe.calibration.experts.turns import fused_experts, rounded_in_turn
from qprobe.calibration.gram import Gathering, SharedInput, shared_inputs
from qprobe.calibration.layers import rounded_layers
from qprobe.calibration.room import gram_room, record_room, rounded_together, shares
from qprobe.calibration.token_weights import TokenWeighing, TokenWeights
from qprobe.calibration.tuning import Given, Tuned, tune, tuned_together
from qprobe.calibration.walk import Walk, can_walk, gathered_in_turn, planned
from qprobe.calibration.work import ALONE, Work
from qprobe.errors import MachineError, is_out_of_memory
from qprobe.formats.codes_file import FILE_NAME, checked, join_codes, open_codes, sha256_of, write_codes
from qprobe.formats.nf4 import StoredNf4
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject
from qprobe.options import Progress
from qprobe.records import CodesFile
from qprobe.registry.measures import CALIBRATION
from qprobe.runs.access import cannot_write
from qprobe.runs.damaged import lost_units
from qprobe.runs.folder import RunFolder
from qprobe.runs.notes import Remarks, TokensCount
from qprobe.runs.shards import waiting
from qprobe.system.background import in_background
from qprobe.system.processes import Shard
from qprobe.system.wording import shortened

UNWRITTEN = 8  # units whose files may still be written while the next are rounded


def calibrate_model(work: Work, shard: Shard = ALONE) -> None:
    """Calibrate every linear that is quantized, and put the weights in place in `work.subject.dequantized`.

    Finished units are not done again; of one that was lost since only what was measured is, while the weights
    that are named stay. Leaves RUN/nf4-calibrated.safetensors, named with its hash in RUN/notes/codes.json.
    shard: of processes that share the units; each begins with its share, and takes over what another one that
    ended has left. One joins and tunes. Raises ManifestError if such a file is named already but is gone or
    changed, or if a new one does not read back; that one is not named, so that the same command joins the
    units again.
    """
    work = replace(work, shard=shard)
    run, joined = work.run, None
    if run.codes and (lost := lost_units(run, CALIBRATION.name)):
        inputs = shared_inputs(work.subject, work.batches)
        calibrate_units(work, inputs, [unit for unit in lost if unit < len(inputs)])
        _calibrate_experts(work, inputs, [unit for unit in lost if unit >= len(inputs)])
    if run.codes is None:
        count = _calibrated(work, shard)
        with waiting(run.path, "codes"):
            run.notes.reread()
            if run.codes is None:
                joined = _joined(run.path, count)
                put_in_place(work.subject, joined, run.path)
                # Only now that the joined file was read whole is it named.
                run.notes.put("codes", _tuned(work, joined) if work.tune_steps else joined)
    assert run.codes is not None
    if run.codes != joined:
        put_in_place(work.subject, run.codes, run.path)
    for left in (run.path / "units").glob(f"{CALIBRATION.name}-*.safetensors"):
        left.unlink(missing_ok=True)


def put_in_place(subject: Subject, codes: CodesFile, folder: Path) -> None:
    """Let the model's 4-bit weights be those of the file `codes` in `folder`.

    It is hashed while it is read. Raises ManifestError if it is not whole; some weights are in place then.
    """
    with ThreadPoolExecutor(1) as thread:
        hashed = thread.submit(checked, codes, folder)
        try:
            with open_codes(folder / codes.file) as file:
                for name in sorted(file.layers):
                    subject.dequantized.put(name, file.stored(name, subject.device_of(name)).packed())
        finally:
            hashed.result()  # a file that changed says so, whatever could not be read of it


def _calibrated(work: Work, shard: Shard) -> int:
    """How many units there are, all of which are finished by now, by this process or by others."""
    inputs = shared_inputs(work.subject, work.batches)
    parts = shares(work.subject, inputs, shard.world)
    count = len(inputs) + len(fused_experts(work.subject))
    for number in shard.rotated(range(shard.world)):
        with waiting(work.run.path, f"calibration-{number}"):
            if RunFolder(work.run.path).codes is None:  # else all are done, and joined
                left = set(unfinished(work.run, count))
                calibrate_units(work, inputs, [unit for unit in parts[number] if unit in left])
                own = range(len(inputs) + number, count, shard.world)
                _calibrate_experts(work, inputs, [unit for unit in own if unit in left])
    return count


def unfinished(run: RunFolder, count: int) -> list[int]:
    """The numbers of the units, of `count`, that are to be done."""
    missing = set(run.missing_units(CALIBRATION.name, count))
    return [unit for unit in range(count) if unit in missing or not codes_unit(run.path, unit).exists()]


def codes_unit(folder: Path, unit: int) -> Path:
    """The file with the weights of unit number `unit`."""
    return Path(folder) / "units" / f"{CALIBRATION.name}-{unit:05d}.safetensors"


def calibrate_units(work: Work, inputs: Sequence[SharedInput], units: Iterable[int]) -> None:
    """Finish the `units` of `inputs` (from `shared_inputs`, all of them), as many at once as fit."""
    numbers = {inputs[unit].leader: unit for unit in units}
    chosen = [inputs[unit] for unit in numbers.values()]
    if not chosen:
        return
    limit = _limit(work, inputs)
    turns = gathering_turns(work, chosen, inputs)
    step = _steps(work.progress, "calibrate", turns.runs + len(numbers))
    with in_background(UNWRITTEN if work.subject.limit is None else 0) as do:
        for gathering in turns.gathered(step):
            for group in rounded_together(work.subject, gathering.inputs, limit):
                grams = [gathering.grams.pop(one.leader) for one in group]
                with work.subject.running(
                    f"round {group[0].leader}"
                ):  # of its own: no weight stays meanwhile
                    found = rounded_layers(
                        work.subject, group, grams, gathering.apart, work.format, turns.outputs
                    )
                for one, gram, rounded in zip(group, grams, found, strict=True):
                    do(partial(_finish, work, rounded, gram.tokens, numbers[one.leader]))
                    step()
                del grams


def _calibrate_experts(work: Work, inputs: Sequence[SharedInput], units: Sequence[int]) -> None:
    """Finish the `units`, which follow those of `inputs`: a fused weight each."""
    names = fused_experts(work.subject)
    numbers = {names[unit - len(inputs)]: unit for unit in units}
    limit = _limit(work, inputs) // 2 if units else 0  # half is for rounding at once
    turns = rounded_in_turn(
        work.subject, list(numbers), lambda: work.widened, work.count, work.format, limit,
        partial(_steps, work.progress, "calibrate experts"),
    )  # fmt: skip
    for name, found in turns:
        _finish(work, {name: found.whole}, found.tokens, numbers[name], found.nearest)


@dataclass(frozen=True)
class Turns:
    """gathered: gives matrices in turn, and calls back `runs` times as it goes on.

    outputs: see `TokenWeights`; None where tokens are not weighed.
    """

    runs: int
    gathered: Callable[[Callable[[], None]], Iterator[Gathering]]
    outputs: Mapping[str, Tensor] | None


def gathering_turns(
    work: Work,
    chosen: Sequence[SharedInput],
    inputs: Sequence[SharedInput],
    two_sided: Container[str] | None = None,
) -> Turns:
    """The matrices of `chosen`; inputs: all there are, of which `chosen` are some.

    two_sided: as of `TokenWeighing`, where it was decided already that tokens are weighed.
    """
    subject, limit, count = work.subject, _limit(work, inputs), work.count
    weights = _weights(work, chosen, inputs, limit, two_sided)
    walk = Walk(subject, record_room(subject)) if can_walk(subject) else None
    plan = planned(walk, chosen, limit // 2, subject.reference.device)  # half is for rounding at once

    def turns(done: Callable[[], None]) -> Iterator[Gathering]:
        of = None if weights is None else weights.of
        return gathered_in_turn(subject, walk, plan, lambda: work.widened, count, of, done)

    return Turns(plan.runs * count, turns, None if weights is None else weights.outputs)


def _limit(work: Work, inputs: Sequence[SharedInput]) -> int:
    return gram_room(work.subject, inputs) if work.limit_bytes is None else work.limit_bytes


def _weights(
    work: Work,
    chosen: Sequence[SharedInput],
    inputs: Sequence[SharedInput],
    limit_bytes: int,
    two_sided: Container[str] | None,
) -> TokenWeights | None:
    """What tokens count in the matrices of `chosen`; None for once each, if that was decided.

    It is decided once, on `inputs`, which are all there are, and noted in the run. By then only samples for
    fitting were weighed: those kept back, on which it is decided, are weighed after that.
    """
    subject, notes = work.subject, work.run.notes
    notes.reread()
    noted: TokensCount | None = notes.get("tokens")
    if noted is not None and not noted.is_weighted:
        return None
    training, kept_back = work.split
    if noted is None and not kept_back:
        noted = TokensCount.undecided(sum(map(len, training)), FEWEST)
        notes.put("tokens", noted)
    is_open, count = noted is None, work.fitting
    weighing = TokenWeighing(subject, inputs if is_open else chosen, two_sided)
    step = _steps(work.progress, "weigh tokens", work.count)
    with walking(subject.path):
        weighing.add_all(islice(work.widened, count), step)
    if is_open:
        work.progress("decide", 0, 1)
        found = weighing.found
        noted = decided(
            subject, inputs, lambda: work.widened, count, found.of, work.format, limit_bytes,
            found.outputs, partial(tried_in_turn, work.run, work.shard),
        )  # fmt: skip
        notes.put("tokens", noted)
        work.progress("decide", 1, 1)
    if noted is None or not noted.is_weighted:
        return None
    with walking(subject.path):
        weighing.add_all(islice(work.widened, count, None), step)
    return weighing.found


def _tuned(work: Work, codes: CodesFile) -> CodesFile:
    """The file `codes`, whose weights are in place, with tuned scales.

    As it is where they are no better, or memory does not suffice: that is no reason to lose what was chosen.
    Leaves a sentence on what came of it in the run's notes.
    """
    if not work.split[1]:
        told = f"Scales are not tuned: that takes {FEWEST} calibration samples."
        work.run.notes.put("tuning", Remarks((told,)))
        return codes
    path = work.run.path / codes.file
    try:
        found, others = _tried(work, path)
    except Exception as error:
        if not isinstance(error, MachineError) and not is_out_of_memory(error):
            raise
        work.run.notes.put("tuning", Remarks((_no_room(error),)))
        if work.subject.limit is not None:
            work.subject.limit.give_up()
        return codes
    work.run.notes.put("tuning", Remarks((found.sentence,)))
    if not found.is_better:
        return codes
    try:
        write_codes(path, {**found.stored, **others})
        tuned = CodesFile(codes.file, sha256_of(path))
    except OSError as error:
        raise cannot_write(path, error) from error
    return tuned


def _tried(work: Work, path: Path) -> tuple[Tuned, dict[str, StoredNf4]]:
    """(what tuning gives, the weights whose scales stay: experts), of those in the file `path`."""
    subject = work.subject
    with open_codes(path) as file:
        stored = {name: file.stored(name, subject.device_of(name)) for name in sorted(file.layers)}
    experts = {name: one for name, one in stored.items() if subject.layers[name].experts}
    stored = {name: one for name, one in stored.items() if name not in experts}
    training, kept_back = ([subject.encode(x) for x in tuned_together(subject, part)] for part in work.split)
    drawn = [batch.to(subject.reference.device) for batch in work.drawn]
    step = _steps(work.progress, "tune", work.tune_steps)
    given = Given(training, kept_back, drawn)
    return tune(subject, stored, given, work.tune_steps, work.format, step), experts


def _no_room(error: Exception) -> str:
    """What a reader of the run is told where tuning ended with `error`, for want of memory."""
    said = "".join(str(error).strip().splitlines()[:1])  # a MemoryError may say nothing
    why = said if isinstance(error, MachineError) else shortened(said, 200)
    told = f"Scales are not tuned, for want of memory{f': {why}' if why else '.'}"
    return (
        f"{told}{'' if told.endswith('.') else '.'} This run stays so: to tune them, scan with another --out."
    )


def _steps(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """A function that reports one more step of `total` of `stage` whenever it is called."""
    done = iter(range(1, total + 1))
    return lambda: progress(stage, next(done), total)


def _finish(
    work: Work, found: Mapping[str, Rounded], tokens: float, unit: int, nearest: int | None = None
) -> None:
    """Write unit number `unit`: the weights of one shared input, by layer; nearest: see `RoundedExperts`."""
    stored = {name: result.stored for name, result in found.items() if result.stored is not None}
    try:
        write_codes(codes_unit(work.run.path, unit), stored)
    except OSError as error:
        raise cannot_write(codes_unit(work.run.path, unit), error) from error
    work.run.write_unit(CALIBRATION.name, unit, _rows(found, tokens, nearest))


def _rows(found: Mapping[str, Rounded], tokens: float, nearest: int | None) -> pd.DataFrame:
    """Columns of the unit stage "calibration"."""
    rows: list[tuple[Any, ...]] = [
        (name, round(tokens), _or_nan(one.error), _or_nan(one.damping), one.why, nearest)
        for name, one in found.items()
    ]
    columns = pd.Index(["layer", "tokens", "error", "damping", "why", "nearest"])
    return pd.DataFrame(rows, columns=columns).astype({"nearest": "Int64"})


def _or_nan(value: float | None) -> float:
    return nan if value is None else value


def _joined(folder: Path, units: int) -> CodesFile:
    """All units' weights in one file."""
    path = Path(folder) / FILE_NAME
    try:
        return join_codes(path, [codes_unit(folder, unit) for unit in range(units)])
    except OSError as error:
        raise cannot_write(path, error) from error


def calibration_notes(run: RunFolder) -> tuple[str, ...]:
    """A sentence on the layers that are rounded to nearest after all, by reason; none if there are none."""
    rows = run.units(CALIBRATION.name)
    never = {x.name for x in run.key.inventory.layers if not x.fixed} - set(rows["layer"])
    reasons: dict[str, list[str]] = {}
    for name, why in zip(rows["layer"].tolist(), rows["why"].tolist(), strict=True):
        if why:
            reasons.setdefault(why, []).append(name)
    if never:
        reasons["it never ran on these samples"] = sorted(never)
    return tuple(
        f"{len(names)} layer{'s are' if len(names) > 1 else ' is'} rounded to nearest only ({why}): "
        f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}."
        for why, names in reasons.items()
    )
