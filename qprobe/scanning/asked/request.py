"""The door of a scan: what a user typed becomes typed values, once; nothing below parses it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path

from qprobe.calibration.correction import MOST_RANK
from qprobe.data.sampling import Wanted, check_wanted, wanted_by
from qprobe.errors import QprobeError
from qprobe.inputs.answers import Batching
from qprobe.inputs.metrics import Metric, metric_of
from qprobe.loading.device import pick_device
from qprobe.loading.loaded import LoadedModel
from qprobe.loading.source import Source, resolve
from qprobe.measure.ablation import ALL, Ablated, parse_ablated
from qprobe.options import DEFAULT_DTYPE, ScanOptions, data_of, flag_of, names_of, path_if_given
from qprobe.records import FormatSpec
from qprobe.registry import measures as declared
from qprobe.scanning.asked.given import given_model, images_or_rows
from qprobe.scanning.asked.recorded import data_name, recorded
from qprobe.selection.bound import Bound
from qprobe.selection.budget import parse_size
from qprobe.selection.request import ListRequest, parse_request
from qprobe.system.devices import SPREAD, AskedDevice, parse_device

APPLIES_TO_WEIGHTS = frozenset(
    (
        "model", "processor", "budget", "out", "device", "dtype", "by", "for_tool", "measures",
        "experts", "check", "trust_remote_code", "progress",
    )
)  # fmt: skip
"""The fields of `ScanOptions` that bear on weights alone; any other is refused, new ones as well."""


TUNES = "moves the scales that nf4-calibrated chose"
"""What --tune does, a clause behind its name."""

DRAWS = "is of texts that nf4-calibrated fits codes to"
"""What --drawn-texts does, likewise."""


@dataclass(frozen=True)
class AskedMeasures:
    """names: what to measure, None for all that apply; nodes: of the path attribution."""

    names: tuple[str, ...] | None
    nodes: int

    @property
    def is_weight_alone(self) -> bool:
        """True if the model need not be loaded."""
        return self.names is not None and {*self.names} == {declared.WEIGHT.name}


@dataclass(frozen=True)
class ScanRequest:
    """What a scan is asked, in typed values.

    source: of the model. loaded: the model itself, where its user has loaded it. folder: of the run.
    format: its compute_dtype is the reference's dtype. max_memory_bytes: None for no limit; why_limited: says
    so where it was found and not asked for, see `qprobe.scanning.planning.limit`. tune: steps, None
    for the default of the device; calibration_samples: for the codes, None likewise. drawn_texts: of the
    model's own, for them as well. keep_correction: its
    rank, None to keep none.
    ablate: None for no ablation. metric: of answers, beside KL. others: samples of another kind, on which the
    damage is said as well; None for none. is_check: of the run that is there, see
    `qprobe.scanning.repeat`. command: what a reader of the results types.
    """

    source: Source
    loaded: LoadedModel | None
    folder: Path
    format: FormatSpec
    device: AskedDevice
    max_memory_bytes: int | None
    tune: int | None
    calibration_samples: int | None
    drawn_texts: int
    keep_correction: int | None
    samples: Wanted
    batching: Batching
    measures: AskedMeasures
    ablate: Ablated | None
    skiplist: ListRequest
    metric: Metric | None
    others: Wanted | None
    is_check: bool
    command: str
    why_limited: str | None = None

    @property
    def after_units(self) -> str:
        """What of it bears on what a scan does once all units are there, as text."""
        metric = () if self.metric is None else ("--metric", self.metric.name)
        if self.others is not None:
            metric += ("--check-data", data_name(self.others.data))
        return shlex.join([*self.skiplist.words, "--ablate", str(self.ablate), *metric])


def parse_options(options: ScanOptions) -> ScanRequest:
    """What `options` ask for.

    Raises QprobeError for what no model can be asked: wrong words, and options that exclude each other.
    """
    loaded = given_model(options.model, options.processor)
    asked = _as_given(options, loaded)
    measures = AskedMeasures(names_of(options.measures), options.nodes)
    limit = None if options.max_memory is None else parse_size(str(options.max_memory))
    ablate = None if options.ablate is None else parse_ablated(str(options.ablate))
    skiplist = parse_request(options.budget, options.max_kl, options.by, options.for_tool)
    device = parse_device(options.device)
    if loaded is not None:
        _check_loaded(options, measures, device)
    _check_measures(measures)
    _check_score(options.by, measures)
    _check_bound(skiplist, measures)
    _check_excluding(options, device)
    _check_calibration(options)
    _check_ablate(ablate, measures)
    pick_device(device.one)
    if measures.is_weight_alone:
        _check_weight_alone(options)
        skiplist = replace(skiplist, by=options.by or declared.WEIGHT.score)
    source = resolve(asked.model, options.trust_remote_code) if loaded is None else loaded.source
    dtype = options.dtype or (DEFAULT_DTYPE if loaded is None else loaded.dtype)
    return ScanRequest(
        source=source,
        loaded=loaded,
        folder=path_if_given(options.check or options.out) or Path("runs") / source.id.replace("/", "--"),
        format=FormatSpec(options.format, compute_dtype=dtype, experts=options.experts),
        device=device,
        max_memory_bytes=limit,
        tune=options.tune,
        calibration_samples=options.calibration_samples,
        drawn_texts=options.drawn_texts,
        keep_correction=options.keep_correction,
        samples=wanted_by(asked),
        batching=Batching(options.batch_size, options.max_new_tokens),
        measures=measures,
        ablate=ablate,
        skiplist=skiplist,
        metric=None if options.metric is None else metric_of(options.metric),
        others=_others(options),
        is_check=options.check is not None,
        command=recorded(replace(asked, dtype=dtype), source, loaded),
    )


def _as_given(options: ScanOptions, loaded: LoadedModel | None) -> ScanOptions:
    """`options` with the name of the model, a folder of images or rows, and names one by one."""
    images, rows = images_or_rows(options.images, options.data)
    return replace(
        options,
        model=str(options.model) if loaded is None else loaded.source.id,
        images=images,
        data=data_of(rows),
        check_data=data_of(options.check_data),
        measures=names_of(options.measures),
    )


def _others(options: ScanOptions) -> Wanted | None:
    """The samples of another kind, None for none; raises SampleError if there is no such file."""
    data = data_of(options.check_data)
    if data is None:
        return None
    found = replace(wanted_by(options), images=None, data=data)
    check_wanted("", found)
    return found


def _check_excluding(options: ScanOptions, device: AskedDevice) -> None:
    """Raises QprobeError for two options of which each leaves the other nothing to do."""
    if options.max_memory is not None and device.kind == SPREAD:
        raise QprobeError(
            f"--max-memory keeps a scan to one GPU, and --device {SPREAD} takes all. Leave out one of them."
        )
    if options.check is not None and options.out is not None:
        raise QprobeError(
            "--check measures a run again and writes nothing, so --out does not apply. Leave it out."
        )


def check_calibrated(flag: str, why: str, form: str) -> None:
    """Raises QprobeError where an option of nf4-calibrated, `flag`, is passed with another format."""
    if not FormatSpec(form).is_calibrated:
        raise QprobeError(
            f"{flag} {why}, and --format is {form}. Leave it out, or pass --format nf4-calibrated."
        )


def _check_calibration(options: ScanOptions) -> None:
    """Raises QprobeError for options of nf4-calibrated with another format."""
    why = {
        "tune": TUNES,
        "calibration_samples": "says what nf4-calibrated fits codes to",
        "drawn_texts": DRAWS,
        "keep_correction": "is of what nf4-calibrated leaves",
    }
    for name in why:
        if getattr(options, name) != ScanOptions.__dataclass_fields__[name].default:
            check_calibrated(flag_of(name), why[name], options.format)
    if options.drawn_texts < 0:
        raise QprobeError(f"--drawn-texts {options.drawn_texts} is no number of texts. Pass 0 or more.")
    rank = options.keep_correction
    if rank is not None and not 1 <= rank <= MOST_RANK:
        raise QprobeError(f"--keep-correction {rank} is no rank of factors. Pass 1 to {MOST_RANK}.")


def _check_measures(measures: AskedMeasures) -> None:
    if measures.names is None:
        return
    unknown = [name for name in measures.names if name not in declared.names()]
    if unknown or not measures.names:
        what = f"names {unknown[0]!r}, which is no measure" if unknown else "names none"
        raise QprobeError(f"--measures {what}. Name one or more of {', '.join(declared.names())}.")


def _check_bound(skiplist: ListRequest, measures: AskedMeasures) -> None:
    if isinstance(skiplist.limit, Bound) and not _takes(declared.SENSITIVITY_KL.name, measures):
        raise QprobeError(
            f"--max-kl chooses by sensitivity, which --measures {_typed(measures)} leaves out. Add it."
        )


def _check_score(by: str | None, measures: AskedMeasures) -> None:
    """Raises QprobeError if --by is no score, cannot choose, or is not going to be measured."""
    if by is None:
        return
    adding_up = [x.name for x in declared.columns() if x.adds_up]
    measure = declared.measure_of(by)
    if measure is None:
        raise QprobeError(f"{by!r} is no measure. Choose by one of {', '.join(adding_up)}.")
    declared.check_adds_up(by)
    needed = measure.follows or measure.name
    if not measure.is_always and not _takes(needed, measures):
        raise QprobeError(
            f"--by {by} needs {needed}, which --measures {_typed(measures)} leaves out. Add it."
        )
    if "two nodes" in measure.needs and measures.nodes < 2:
        raise QprobeError(f"--by {by} is measured at the first of two or more nodes. Pass --nodes 2.")


def _check_ablate(ablate: Ablated | None, measures: AskedMeasures) -> None:
    if isinstance(ablate, int) and not _takes(declared.SENSITIVITY_KL.name, measures):
        raise QprobeError(
            f"--ablate {ablate} takes the most sensitive layers, and --measures {_typed(measures)} leaves "
            f"sensitivity out. Add it, or name the layers, or pass {ALL}."
        )


def _takes(name: str, measures: AskedMeasures) -> bool:
    return measures.names is None or name in measures.names


def _typed(measures: AskedMeasures) -> str:
    return ",".join(measures.names or ())


def _check_weight_alone(options: ScanOptions) -> None:
    """Raises QprobeError for what the weights alone cannot be asked."""
    for asked in fields(ScanOptions):
        if asked.name not in APPLIES_TO_WEIGHTS and getattr(options, asked.name) != asked.default:
            raise QprobeError(
                "--measures weight reads the files tensor by tensor and runs no samples, so "
                f"{flag_of(asked.name)} does not apply. Leave out one of them."
            )
    if options.by is not None and declared.measure_of(options.by) is not declared.WEIGHT:
        raise QprobeError(f"--by {options.by} is not measured by --measures weight. Leave out one of them.")


def _check_loaded(options: ScanOptions, measures: AskedMeasures, device: AskedDevice) -> None:
    """Raises QprobeError for what a model that is loaded already cannot be asked."""
    why = {
        "measures": (measures.is_weight_alone, "reads the files of a checkpoint"),
        "max_memory": (options.max_memory is not None, "lets weights wait in files while others are loaded"),
        "device": (device.kind == SPREAD, "spreads a model over GPUs while it is loaded"),
    }
    for name, (is_asked, what) in why.items():
        if is_asked:
            raise QprobeError(
                f"{name}={getattr(options, name)!r} {what}, and this model is loaded already. Leave "
                f"{name} out, or pass the model's folder or id."
            )
