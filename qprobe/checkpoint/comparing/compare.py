"""16-bit, standard 4-bit and dynamic 4-bit side by side on the same held-out samples.

The three models are loaded one after another; the 16-bit one sets the course (`course.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from qprobe.checkpoint.comparing.course import asked_course, run_course, set_course, staged
from qprobe.checkpoint.comparing.rows import Comparison, compared
from qprobe.checkpoint.hub import manifest_in
from qprobe.checkpoint.load import check_model, codes_of, dynamic_4bit, standard_4bit, with_dtype
from qprobe.errors import QprobeError, RunError
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.processor import load_processor
from qprobe.loading.reference import reference_of
from qprobe.loading.skeleton import Skeleton
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import Manifest
from qprobe.measure.kl import ANSWERS, readout_of, refuse_unread
from qprobe.options import CompareOptions, path_of, takes
from qprobe.records import Sample
from qprobe.runs.folder import RunFolder
from qprobe.system.devices import AskedDevice, parse_device
from qprobe.system.wording import counted

REFERENCE = "16-bit"


@takes(CompareOptions)
@quiet_models()
def compare(options: CompareOptions) -> Comparison:
    """The models on held-out samples, see `Row`: three, or five where the manifest has calibrated weights.

    Where the manifest lies in a run folder, the result is left there as compare.json, for the report.

    manifest: the skiplist.json of a scan, or a folder or hub id that holds one.
    model: where the 16-bit weights are; None for the id that the manifest names.
    images, data, prompt, samples, seed: as in `qprobe.scan`; built-in samples are other ones than a scan's.
    device: as in `qprobe.scan`. dtype: of everything in 16-bit; None for the manifest's compute_dtype.
    batch_size: samples that run at once. max_new_tokens: longest answer, where a sample brings none.
    turns, split, bad_data, allow_downloads: as in `qprobe.scan`; also for the files of `manifest`.
    metric: of the greedy answers, beside KL: one of `qprobe.registry.metrics.names()`, or any function of
        (sample, answer) to a number; the sample's answer is None where none was given.
    trust_remote_code: as of `qprobe.load_dynamic_4bit`.
    progress: called as work moves on, see `qprobe.options.Progress`.
    Raises ManifestError if the manifest is broken or for another model, SampleError if no sample is
    usable, QprobeError for a model without a language head, or for a sample that `metric` fails on.
    """
    path = manifest_in(path_of(options.manifest), options.allow_downloads)
    device, asked = parse_device(options.device), asked_course(options)
    manifest = read_manifest(path)
    checked = check_model(manifest, options.model, options.trust_remote_code)
    _refuse_without_answers(manifest, checked)
    wanted = replace(manifest, format=with_dtype(manifest.format, options.dtype))
    skeleton = checked.in_dtype(wanted.format.compute_dtype)
    course, reference, notes = set_course(
        manifest.model.id,
        skeleton,
        lambda processor: reference_of(skeleton, device, processor=processor).model,
        asked,
        staged(options.progress, REFERENCE),
    )
    results = {REFERENCE: reference}
    for name, load in _loaders(wanted, skeleton, device.one, path.parent).items():
        results[name] = run_course(load, course, staged(options.progress, name))
    comparison = compared(results, course, (*notes, *seen_note(course.samples, path.parent)))
    return replace(comparison, notes=(*comparison.notes, *keep(comparison, manifest, path.parent)))


def _refuse_without_answers(manifest: Manifest, skeleton: Skeleton) -> None:
    """Raises QprobeError for a model whose answers cannot be compared, as it gives none."""
    refuse_unread(skeleton.model)
    if readout_of(skeleton.model) != ANSWERS:
        raise QprobeError(
            f"{manifest.model.id} ({manifest.model.architecture}) has no language head, so there are no "
            f"answers to compare. The layer table of its scan shows weight and activation error."
        )


def seen_note(samples: Sequence[Sample], folder: Path) -> tuple[str, ...]:
    """A note on those of `samples` that took part in the scan whose run folder `folder` is, if any did."""
    run = RunFolder(folder)
    if not run.is_there:
        return ()
    try:
        spec = run.key.spec
    except RunError:
        return ()  # of a scan that nobody can read; the list itself can be compared
    groups = chain(spec.calibration, spec.codes, spec.isolated, spec.held_out)
    digests = {x.digest for group in groups for x in group}
    count = sum(x.digest in digests for x in samples)
    if not count:
        return ()
    return (
        f"{count:,} of {counted(len(samples), 'sample')} took part in the scan that chose the list, which "
        "flatters it. Pass others.",
    )


def keep(comparison: Comparison, manifest: Manifest, folder: Path) -> tuple[str, ...]:
    """Leave `comparison` as FOLDER/compare.json if `folder` is a run folder, see `qprobe.report.comparison`.

    A note if the disk refuses: what was measured is worth more than an error.
    """
    run = RunFolder(folder)
    if not run.is_there:
        return ()
    kept = {"skip_modules": list(manifest.skip_modules), **comparison.to_json()}
    data = (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode()
    try:
        run.files.write({"compare.json": (data, len(comparison.rows))})
    except RunError as error:
        return (f"The report lacks this comparison: {error}",)
    return ()


def _loaders(
    manifest: Manifest, skeleton: Skeleton, device: AskedDevice, folder: Path
) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """What loads the 4-bit models, by row name: each is a function to (model, processor).

    device: one, as the 4-bit models are a quarter as large. folder: where the manifest lies.
    Of a manifest of calibrated weights also those weights with nothing kept, and, as "dynamic-NAME" of the
    precision that they are stored as, its list with weights that are rounded to nearest.
    """
    spec, codes = manifest.format, codes_of(manifest, folder)
    nearest = spec.four_bit_name
    found = {
        nearest: partial(standard_4bit, skeleton, spec, device, None),
        "dynamic": partial(dynamic_4bit, manifest, skeleton, device, codes),
    }
    if codes is not None:
        plain = replace(manifest, format=replace(spec, name=nearest), codes=None)
        found |= {
            spec.name: partial(standard_4bit, skeleton, spec, device, codes),
            f"dynamic-{nearest}": partial(dynamic_4bit, plain, skeleton, device, None),
        }
    order = (nearest, spec.name, f"dynamic-{nearest}", "dynamic")
    return {name: partial(_with_processor, found[name], skeleton) for name in order if name in found}


def _with_processor(load: Callable[[], Any], skeleton: Skeleton) -> tuple[Any, Any]:
    """(model, processor): each model reads with a processor of its own, as a user's would."""
    return load(), load_processor(skeleton.source)
