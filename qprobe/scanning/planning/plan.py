"""`qprobe plan --scan`: seconds and memory of a scan here, before anything of the model is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from qprobe.calibration.planned.limit import GIB, USED
from qprobe.calibration.planned.memory import BatchShape, device_need
from qprobe.calibration.tuning import default_steps
from qprobe.checkpoint.plan import planned_skeleton
from qprobe.data.sampling import SCAN_SAMPLES
from qprobe.errors import QprobeError
from qprobe.formats.protocol import format_from
from qprobe.inputs.drawing import refuse_undrawable
from qprobe.loading.device import pick_device
from qprobe.loading.skeleton import Skeleton
from qprobe.measure.attribution import path_dtype
from qprobe.measure.memory import LIBRARIES_BYTES, free_memory
from qprobe.options import PlanScanOptions, flag_of, takes
from qprobe.records import FormatSpec
from qprobe.scanning.asked.request import DRAWS, TUNES, check_calibrated
from qprobe.scanning.planning.seconds import Rates, Work, measured_rates, seconds_of
from qprobe.selection.budget import parse_size
from qprobe.system.devices import parse_device
from qprobe.system.wording import counted
from qprobe.training.memory import vision_tokens

PROCESS_BYTES = GIB  # of Python and its libraries; 0.9 to 1.1 GiB beside the weights (reports/full-size)
REPORT_BYTES, SAMPLE_BYTES, ROW_BYTES = 3 * 2**20, 6 * 2**10, 120  # pictures; thumbnail; layer and sample


@dataclass(frozen=True)
class ScanPlan:
    """What a scan takes on this machine, by `qprobe.scanning.planning`.

    samples: measured, and held out. seconds: by stage, those of the first scan of a machine are more.
    device_bytes: at the peak, within free_bytes where is_streamed. needed_bytes: with all weights there.
    host_bytes: of the process at its peak; None on a CPU, which is the device. disk_bytes: of the run folder.
    rates: measured here; floating point operations and bytes a second. notes: sentences a reader must see.
    """

    model: str
    device: str
    samples: tuple[int, int]
    batch: BatchShape
    format: str
    tune: int | None
    seconds: dict[str, float]
    device_bytes: int
    free_bytes: int
    needed_bytes: int
    is_streamed: bool
    host_bytes: int | None
    disk_bytes: int
    rates: Rates
    notes: tuple[str, ...]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """The object `scan` of `plan --json`."""
        return {**asdict(self), "total_seconds": self.total_seconds}


@takes(PlanScanOptions)
def plan_scan(options: PlanScanOptions) -> ScanPlan:
    """What a scan of `model` takes here, told from its config and a moment of products on the device.

    model, device, format, tune, drawn_texts, max_memory, samples, batch_size, experts, dtype,
    trust_remote_code: as of `qprobe.scan`. tokens: of a sample, its answer and the image tokens that stand
    among them included. answer_tokens: of them, at most all. tiles: image tiles of a sample, of the config's
    image size each.
    Raises ModelError for a model that cannot be had or built, MachineError for a device that is not here,
    BudgetError for a size that cannot be read, QprobeError for numbers that no scan can be made of.
    """
    _check(options)
    fmt = FormatSpec(options.format, compute_dtype=options.dtype or "bfloat16", experts=options.experts)
    skeleton = planned_skeleton(options.model, None, options.trust_remote_code).in_dtype(fmt.compute_dtype)
    place = pick_device(parse_device(options.device).one)
    rows = vision_tokens(skeleton.config, options.tiles)
    answers = min(options.answer_tokens, options.tokens)
    shape = BatchShape(options.batch_size, options.tokens, answers, rows)
    limit = None if options.max_memory is None else parse_size(str(options.max_memory))
    here = Here(place, free_memory(place), limit, measured_rates(place, path_dtype(skeleton.model)))
    count = SCAN_SAMPLES["given"] if options.samples is None else options.samples
    return plan_of(skeleton, fmt, shape, Counts(count, options.tune, options.drawn_texts), here)


def _check(options: PlanScanOptions) -> None:
    """Raises QprobeError for numbers that no scan can be made of, and for `tune` of another format."""
    least = dict.fromkeys(("samples", "batch_size", "tokens", "answer_tokens"), 1)
    least |= dict.fromkeys(("tiles", "tune", "drawn_texts"), 0)
    for name, smallest in least.items():
        given = getattr(options, name)
        if given is not None and given < smallest:
            raise QprobeError(f"{flag_of(name)} {given} makes no scan. Pass {smallest} or more.")
    if options.tune is not None:
        check_calibrated("--tune", TUNES, options.format)
    if options.drawn_texts:
        check_calibrated("--drawn-texts", DRAWS, options.format)


@dataclass(frozen=True)
class Counts:
    """Of samples, of steps of tuning (None for what suits), and of texts that the model draws."""

    samples: int
    tune: int | None = None
    drawn_texts: int = 0


@dataclass(frozen=True)
class Here:
    """Where a scan is to run. limit: of its memory, as it was asked for; None without."""

    device: torch.device
    free: int
    limit: int | None
    rates: Rates


def plan_of(skeleton: Skeleton, fmt: FormatSpec, shape: BatchShape, counts: Counts, here: Here) -> ScanPlan:
    """`plan_scan` of a scan in batches of `shape`."""
    if counts.drawn_texts and skeleton.is_buildable:
        refuse_undrawable(skeleton.model)
    layers = list(skeleton.inventory(fmt).layers)
    need, is_cuda = device_need(skeleton, fmt, shape), here.device.type == "cuda"
    needed = need.total + (0 if is_cuda else PROCESS_BYTES + LIBRARIES_BYTES)
    allowed = int(USED * here.free) if here.limit is None else here.limit
    is_streamed = here.limit is not None or needed > allowed
    count = counts.samples
    held_out, tune = count // 3, None
    if fmt.is_calibrated:
        suits = default_steps(here.device, path_dtype(skeleton.model))
        tune = suits if counts.tune is None else counts.tune
    stored = sum(p.numel() * p.itemsize for p in skeleton.model.parameters())
    four_bit = sum(format_from(fmt).held_bytes(x.stored_shape) for x in layers)
    work = Work(count - held_out, held_out, shape, tune, stored, four_bit, is_streamed, counts.drawn_texts)
    found = seconds_of(skeleton.model, layers, work, here.rates, is_cuda)
    on_host = stored + four_bit if is_streamed else stored
    return ScanPlan(
        model=skeleton.source.id,
        device=str(here.device),
        samples=(count - held_out, held_out),
        batch=shape,
        format=fmt.name,
        tune=tune,
        seconds={name: round(value, 1) for name, value in found.items()},
        device_bytes=min(needed, allowed) if is_streamed else needed,
        free_bytes=here.free,
        needed_bytes=needed,
        is_streamed=is_streamed,
        host_bytes=on_host + PROCESS_BYTES if is_cuda else None,
        disk_bytes=_disk_bytes(len(layers), count, four_bit if fmt.is_calibrated else 0),
        rates=here.rates,
        notes=(
            *_notes(needed, allowed, is_streamed, any(x.experts for x in layers)),
            *_untried(tune, counts.drawn_texts),
            *_quantized_note(skeleton),
        ),
    )


def _disk_bytes(layers: int, samples: int, codes: int) -> int:
    """Of a run folder; the files of calibrated weights lie there twice while they are joined."""
    return REPORT_BYTES + samples * SAMPLE_BYTES + layers * samples * ROW_BYTES + 2 * codes


def _notes(needed: int, allowed: int, streamed: bool, experts: bool) -> tuple[str, ...]:
    notes = [
        "Seconds were within a fifth of what full-size scans took, device memory within a twentieth "
        "(reports/full-size); the first scan of a machine reads its libraries from the disk, and generating "
        "answers for samples that bring none comes on top."
    ]
    if streamed:
        size = f"{allowed / GIB:.1f} GiB" if allowed >= GIB else f"{allowed / 2**20:,.0f} MiB"
        notes.append(
            f"All weights on the device would take {needed / GIB:.1f} GiB, so weights wait on the host "
            f"and are copied when a layer runs, within {size}; the least that will do is "
            "known once the model is loaded."
        )
    if experts:
        notes.append("Scans of fused experts take longer than this; one of 30B took 1.6 times as long.")
    return tuple(notes)


def _untried(tune: int | None, drawn_texts: int) -> tuple[str, ...]:
    """A sentence on what no full-size scan was measured with."""
    tuning = [f"tuning ({counted(tune, 'step')})"] if tune else []
    drawing = [f"drawing {counted(drawn_texts, 'text')}"] if drawn_texts else []
    what = " and ".join([*tuning, *drawing])
    return (f"Of {what} there is no full-size figure to compare with.",) if what else ()


def _quantized_note(skeleton: Skeleton) -> tuple[str, ...]:
    if not getattr(skeleton.config, "quantization_config", None):
        return ()
    return (
        f"{skeleton.source.id} is quantized already, and a scan reads 16-bit weights: it will take the "
        "checkpoint that this one was made from.",
    )
