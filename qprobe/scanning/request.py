"""The door of a scan: what a user typed becomes typed values, once; nothing below parses it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qprobe.calibration.correction import MOST_RANK
from qprobe.data.sampling import Wanted, wanted_by
from qprobe.errors import QprobeError
from qprobe.inputs.metrics import Metric, metric_of
from qprobe.loading.device import SPREAD, one_device, pick_device
from qprobe.loading.loaded import LoadedModel
from qprobe.loading.source import Source, resolve
from qprobe.measure.ablation import ALL, Ablated, parse_ablated
from qprobe.options import DEFAULT_BUDGET, Dtype, ScanOptions
from qprobe.records import FormatSpec
from qprobe.registry import measures as declared
from qprobe.selection.bound import Bound
from qprobe.selection.budget import parse_size
from qprobe.selection.request import ListRequest, parse_request

DEFAULT_DTYPE: Dtype = "bfloat16"
APPLIES_TO_WEIGHTS = frozenset(
    (
        "model",
        "budget",
        "out",
        "device",
        "dtype",
        "by",
        "for_tool",
        "experts",
        "measures",
        "check",
        "trust_remote_code",
    )
)
"""The fields of `ScanOptions` that bear on weights alone; any other is refused, new ones as well."""
_DEFAULTS = {x.name: x.default for x in fields(ScanOptions)}


@dataclass(frozen=True)
class Batching:
    """How samples run. size: at most so many at once; max_new_tokens: of an answer that is generated."""

    size: int
    max_new_tokens: int


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
    format: its compute_dtype is the reference's dtype. device: as `pick_device` and `device_of` take it.
    max_memory_bytes: None for no limit. tune: steps, None for the default of the device;
    calibration_samples: for the codes, None likewise. keep_correction: its rank, None to keep none.
    ablate: None for no ablation. metric: of answers, beside KL. is_check: of the run that is there, see
    `qprobe.scanning.repeat`. command: what a reader of the results types.
    """

    source: Source
    loaded: LoadedModel | None
    folder: Path
    format: FormatSpec
    device: str | None
    max_memory_bytes: int | None
    tune: int | None
    calibration_samples: int | None
    keep_correction: int | None
    samples: Wanted
    batching: Batching
    measures: AskedMeasures
    ablate: Ablated | None
    skiplist: ListRequest
    metric: Metric | None
    is_check: bool
    command: str

    @property
    def after_units(self) -> str:
        """What of it bears on what a scan does once all units are there, as text."""
        metric = () if self.metric is None else ("--metric", self.metric.name)
        return shlex.join([*self.skiplist.words, "--ablate", str(self.ablate), *metric])


def parse_options(options: ScanOptions, loaded: LoadedModel | None = None) -> ScanRequest:
    """What `options` ask for.

    loaded: takes the place of their model. Raises QprobeError for what no model can be asked: wrong words,
    and options that exclude each other.
    """
    if loaded is not None:
        _check_loaded(options)
    measures = AskedMeasures(options.measures, options.nodes)
    _check_measures(measures)
    _check_score(options.by, measures)
    skiplist = parse_request(options.budget, options.max_kl, options.by, options.for_tool)
    _check_bound(skiplist, measures)
    limit = None if options.max_memory is None else parse_size(options.max_memory)
    if limit is not None and options.device == SPREAD:
        raise QprobeError(
            f"--max-memory keeps a scan to one GPU, and --device {SPREAD} takes all. Leave out one of them."
        )
    if options.tune is not None and not FormatSpec(options.format).is_calibrated:
        raise QprobeError(
            f"--tune moves the scales that nf4-calibrated chose, and --format is {options.format}. Leave out "
            "--tune, or pass --format nf4-calibrated."
        )
    if options.calibration_samples is not None and not FormatSpec(options.format).is_calibrated:
        raise QprobeError(
            f"--calibration-samples says what nf4-calibrated fits codes to, and --format is "
            f"{options.format}. Leave it out, or pass --format nf4-calibrated."
        )
    _check_correction(options)
    if options.check is not None and options.out is not None:
        raise QprobeError(
            "--check measures a run again and writes nothing, so --out does not apply. Leave it out."
        )
    ablate = None if options.ablate is None else parse_ablated(options.ablate)
    _check_ablate(ablate, measures)
    pick_device(one_device(options.device))
    if measures.is_weight_alone:
        _check_weight_alone(options)
        skiplist = ListRequest(skiplist.limit, options.by or declared.WEIGHT.score, options.for_tool)
    source = resolve(options.model, options.trust_remote_code) if loaded is None else loaded.source
    dtype = options.dtype or (DEFAULT_DTYPE if loaded is None else loaded.dtype)
    return ScanRequest(
        source=source,
        loaded=loaded,
        folder=options.check or options.out or Path("runs") / source.id.replace("/", "--"),
        format=FormatSpec(options.format, compute_dtype=dtype, experts=options.experts),
        device=options.device,
        max_memory_bytes=limit,
        tune=options.tune,
        calibration_samples=options.calibration_samples,
        keep_correction=options.keep_correction,
        samples=wanted_by(options),
        batching=Batching(options.batch_size, options.max_new_tokens),
        measures=measures,
        ablate=ablate,
        skiplist=skiplist,
        metric=None if options.metric is None else metric_of(options.metric),
        is_check=options.check is not None,
        command=_command(replace(options, dtype=dtype), source, loaded),
    )


def _check_correction(options: ScanOptions) -> None:
    rank = options.keep_correction
    if rank is None:
        return
    if not FormatSpec(options.format).is_calibrated:
        raise QprobeError(
            f"--keep-correction is of what nf4-calibrated leaves, and --format is {options.format}. Leave it "
            "out, or pass --format nf4-calibrated."
        )
    if not 1 <= rank <= MOST_RANK:
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
            option = f"--{asked.name.replace('_', '-')}"
            raise QprobeError(
                "--measures weight reads the files tensor by tensor and runs no samples, so "
                f"{option} does not apply. Leave out one of them."
            )
    if options.by is not None and declared.measure_of(options.by) is not declared.WEIGHT:
        raise QprobeError(f"--by {options.by} is not measured by --measures weight. Leave out one of them.")


def _command(asked: ScanOptions, source: Source, loaded: LoadedModel | None) -> str:
    """What a reader of the results types: a command, or a line of Python for what lies in memory."""
    has_name = loaded is None or source.revision is not None
    if has_name and (asked.data is None or isinstance(asked.data, Path)):
        return scan_command(asked, source.id)
    return scan_call(asked, source.id if has_name else None, "" if has_name else source.id)


def scan_call(asked: ScanOptions, model_id: str | None, kind: str) -> str:
    """The line of Python that scans what lies in memory, for people to read: with its options, and no folder.

    model_id: None for a loaded model without one, of the class `kind`.
    """
    model = "model, processor=processor" if model_id is None else repr(model_id)
    budget = (asked.budget or DEFAULT_BUDGET) if asked.max_kl is None else None
    images = None if asked.images is None else asked.images.resolve().name
    options = {**vars(asked), "images": images, "budget": budget}
    if asked.dtype == DEFAULT_DTYPE:
        del options["dtype"]
    words = [
        f"{name}={_in_python(value)}"
        for name, value in options.items()
        if value != _DEFAULTS.get(name) and name not in ("model", "out", "check", "device", "max_memory")
    ]
    return f"qprobe.scan({', '.join([model, *words])})" + (f"  # model: a loaded {kind}" if kind else "")


def _in_python(value: Any) -> str:
    """A value as Python writes it: a file by its name, a function by its own, rows in memory as `rows`."""
    if isinstance(value, Path):
        return repr(_data_name(value))
    if callable(value):
        return getattr(value, "__name__", type(value).__name__).strip("<>")
    return repr(value) if isinstance(value, str | int | float | tuple) else "rows"


def _data_name(data: Path | None) -> str | None:
    """A file's name, or the id of a data set of the hub."""
    if data is None:
        return None
    return data.name if data.exists() or data.suffix else str(data)


def _check_loaded(options: ScanOptions) -> None:
    """Raises QprobeError for what a model that is loaded already cannot be asked."""
    why = {
        "measures": ({*(options.measures or ())} == {"weight"}, "reads the files of a checkpoint"),
        "max_memory": (options.max_memory is not None, "lets weights wait in files while others are loaded"),
        "device": (options.device == SPREAD, "spreads a model over GPUs while it is loaded"),
    }
    for name, (is_asked, what) in why.items():
        if is_asked:
            raise QprobeError(
                f"{name}={getattr(options, name)!r} {what}, and this model is loaded already. Leave "
                f"{name} out, or pass the model's folder or id."
            )


def scan_command(asked: ScanOptions, model_id: str) -> str:
    """What a reader of the results types: every option that changes them, and no path of a folder here.

    The model has its id, the user's samples the name of their folder or file.
    """
    given: list[tuple[str, object, object]] = [  # option, value, default
        ("--images", None if asked.images is None else asked.images.resolve().name, None),
        ("--data", _data_name(asked.data), None),
        ("--prompt", asked.prompt, None),
        ("--turns", asked.turns, _DEFAULTS["turns"]),
        ("--split", asked.split, None),
        ("--bad-data", asked.bad_data, _DEFAULTS["bad_data"]),
        ("--samples", asked.samples, None),
        ("--seed", asked.seed, _DEFAULTS["seed"]),
        ("--batch-size", asked.batch_size, _DEFAULTS["batch_size"]),
        ("--max-new-tokens", asked.max_new_tokens, _DEFAULTS["max_new_tokens"]),
        ("--dtype", "fp16" if asked.dtype == "float16" else "bf16", "bf16"),
        ("--format", asked.format, _DEFAULTS["format"]),
        ("--budget", (asked.budget or DEFAULT_BUDGET) if asked.max_kl is None else None, None),
        ("--max-kl", asked.max_kl, None),
        ("--by", asked.by, None),
        ("--for", asked.for_tool, None),
        ("--measures", ",".join(asked.measures) if asked.measures else None, None),
        ("--nodes", asked.nodes, _DEFAULTS["nodes"]),
        ("--tune", asked.tune, None),
        ("--calibration-samples", asked.calibration_samples, None),
        ("--keep-correction", asked.keep_correction, None),
        ("--experts", asked.experts, _DEFAULTS["experts"]),
        ("--ablate", asked.ablate, None),
        ("--metric", asked.metric if isinstance(asked.metric, str) else None, None),
    ]
    words = [word for name, value, default in given if value != default for word in (name, str(value))]
    words += ["--allow-downloads"] if asked.allow_downloads else []
    words += ["--trust-remote-code"] if asked.trust_remote_code else []
    return shlex.join(["qprobe", "scan", "--model", model_id, *words])
