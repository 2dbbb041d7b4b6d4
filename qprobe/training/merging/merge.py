"""`qprobe merge`: an adapter added to weights, as a checkpoint that serves, with what the adding cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from qprobe.checkpoint.adapters.effect import HALF, Arrived
from qprobe.checkpoint.adapters.lora import Adapter, read_adapter, refuse_without_effect
from qprobe.checkpoint.codes import keep_codes_as_stored
from qprobe.checkpoint.comparing.course import AskedCourse, asked_course, run_course, set_course, staged
from qprobe.checkpoint.comparing.rows import compared
from qprobe.checkpoint.new_folder import alone_at, refuse_to_overwrite, scratch_folder
from qprobe.checkpoint.plain import load_plainly
from qprobe.checkpoint.quantize import refuse_rewritten
from qprobe.checkpoint.starts.attached import peft_library
from qprobe.errors import QprobeError
from qprobe.exports.export import config_entries
from qprobe.inputs.metrics import metric_of
from qprobe.loading.device import pick_device
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import Skeleton
from qprobe.measure.kl import ANSWERS, readout_of
from qprobe.options import Form, MergeOptions, Progress, path_if_given, path_of, takes
from qprobe.records import Sample
from qprobe.system.devices import AskedDevice, parse_device
from qprobe.training.merging.calibrated import fitted_codes
from qprobe.training.merging.forms import CALIBRATED, WRITERS, Candidate, Job, Writer, write_4bit
from qprobe.training.merging.merged import Merged, card, chosen
from qprobe.training.origin import as_merged, origin_of, refuse_experts

REFERENCE = "base + adapter"


@takes(MergeOptions)
@quiet_models()
def merge(options: MergeOptions) -> Merged:
    """The checkpoint in the new folder `out` that holds the adapter's base with `adapter` in its weights.

    Two are made: the 16-bit weights with what the adapter learned added (and not the correction of 4-bit
    weights that one of `finetune` may hold), and the base's own weights (dequantized where they are in 4-bit)
    with the adapter added, in 4-bit: what it changes rounded to nearest, and where the manifest's format is
    calibrated with calibrated codes as well. An adapter learned to work beside the base's weights, so either
    is another model. Each is loaded plainly and held against base + adapter on samples that the adapter was
    not trained on; the one with the lower KL is kept, and 4-bit, the smaller, where they cannot be told
    apart. No code is fitted to these samples: see `fitted_codes`.

    adapter: folder of `finetune`, or of peft. as_: the form to make, without a choice.
    manifest, base: of an adapter that `finetune` did not make; what it was trained on, see `load_base`.
    model: where the 16-bit weights are; None for those that the adapter was trained on.
    for_tool: of the form in 4-bit, as of `quantize`.
    metric: as of `compare`; None for exact answers, where samples bring some. Others as of `compare`.
    `out` has its name only once it is complete, audited and measured.
    Raises RunError for an adapter that is none, takes no effect or is of another base; ModelError if `out`
    is there already, cannot be written, or another process writes it; otherwise as `compare` and
    `load_dynamic_4bit` do.
    """
    target = path_of(options.out)
    refuse_to_overwrite(target)
    peft_library()
    found = read_adapter(path_of(options.adapter))
    with alone_at(target):
        job, forms = _checked(options, found, target)
        return _merged(job, forms, asked_course(options), options.progress)


def _checked(options: MergeOptions, found: Adapter, target: Path) -> tuple[Job, tuple[Form, ...]]:
    """(what is merged, the forms to make), after all that can be refused before weights are loaded."""
    told = path_if_given(options.manifest)
    origin = origin_of(found, told, options.base, options.model, options.dtype)
    device = parse_device(options.device)
    skeleton = origin.skeleton(options.trust_remote_code)
    if readout_of(skeleton.model) != ANSWERS:
        raise QprobeError(
            f"{origin.manifest.model.id} has no language head, so there are no answers by which to tell what "
            "a merge loses. Merge it with peft (merge_and_unload)."
        )
    fits = found.fits(skeleton.model)
    refuse_without_effect(found, fits, origin.manifest.model.id)
    origin.refuse_other_weights()
    forms = tuple(WRITERS) if options.as_ is None else (options.as_,)
    if "4-bit" in forms:
        manifest = as_merged(origin, skeleton)
        refuse_experts(manifest)
        refuse_rewritten(skeleton.model)
        config_entries(manifest, options.for_tool)
        origin.codes()
    return Job(found, origin, skeleton, target, device, options.trust_remote_code, options.for_tool), forms


def _merged(job: Job, forms: tuple[Form, ...], asked: AskedCourse, progress: Progress) -> Merged:
    """Writes each of `forms`, measures it on the course that is `asked`, and keeps the better one."""
    course, reference, notes = set_course(
        job.origin.manifest.model.id,
        job.skeleton,
        lambda _: job.adapted(),
        asked,
        staged(progress, REFERENCE),
        metric_of("exact"),
    )
    results, written = {REFERENCE: reference}, {}
    with ExitStack() as stack:
        place = stack.enter_context(scratch_folder(job.target))
        writers, told = _writers(job, forms, asked, course.given, place, progress)
        for name, write in writers.items():
            progress(f"write {name}", 0, 1)
            folder = stack.enter_context(scratch_folder(job.target))
            written[name] = one = write(job, folder)
            load = partial(_plainly, one.skeleton, job.device)
            results[name] = run_course(load, course, staged(progress, name))
        kept, why = chosen({x: results[x] for x in writers})
        one = written[kept]
        made = Merged(
            out=job.target,
            kept=kept,
            why=why,
            base=job.origin.base,
            layers=len(one.arrived),
            unchanged=tuple(name for name, x in one.arrived.items() if not x.energy),
            rounded_away=tuple(name for name, x in one.arrived.items() if x.energy and x.share < HALF),
            arrived=sum(one.arrived.values(), Arrived()).share,
            comparison=compared(results, course, (*notes, *told)),
        )
        (one.folder / "README.md").write_text(card(made, job.origin.manifest, job.skeleton), "utf-8")
        files = {x.name: x.stat().st_size for x in sorted(one.folder.iterdir())}
        os.replace(one.folder, job.target)
    return made.with_files(files)


def _writers(
    job: Job,
    forms: tuple[Form, ...],
    asked: AskedCourse,
    judges: Sequence[Sample],
    place: Path,
    progress: Progress,
) -> tuple[dict[Candidate, Writer], tuple[str, ...]]:
    """(what writes each candidate of `forms`, notes on them); place: for the codes of the calibrated one."""
    writers: dict[Candidate, Writer] = {form: WRITERS[form] for form in forms}
    if "4-bit" not in forms or not job.origin.manifest.format.is_calibrated:
        return writers, ()
    codes, notes = fitted_codes(job, asked, judges, place, progress)
    if codes is not None:
        writers[CALIBRATED] = partial(write_4bit, codes=codes)
    return writers, notes


def _plainly(skeleton: Skeleton, device: AskedDevice) -> tuple[Any, Any]:
    """(model, processor) of a written checkpoint, as a user loads it."""
    model, _ = load_plainly(skeleton, pick_device(device))
    keep_codes_as_stored(model)
    return model.eval().requires_grad_(False), load_processor(skeleton.source)
