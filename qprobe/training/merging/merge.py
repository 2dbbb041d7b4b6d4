"""`qprobe merge`: an adapter added to weights, as a checkpoint that serves, with what the adding cost."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from qprobe.checkpoint.adapters.lora import read_adapter, refuse_without_effect
from qprobe.checkpoint.auditing.loaded import load_plainly
from qprobe.checkpoint.comparing.compare import compared, run_course, set_course, staged
from qprobe.checkpoint.load import check_model, keep_codes_as_stored
from qprobe.checkpoint.quantize import (
    refuse_to_overwrite,
    scratch_folder,
)
from qprobe.errors import QprobeError
from qprobe.loading.device import pick_device
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import Skeleton
from qprobe.measure.kl import ANSWERS, readout_of
from qprobe.options import (
    AskedMetric,
    BadData,
    Base,
    CompareOptions,
    Dtype,
    Progress,
    Turns,
    data_of,
    no_progress,
    path_if_given,
    path_of,
)
from qprobe.training.bases import peft_library
from qprobe.training.merging.forms import WRITERS, Arrived, Job
from qprobe.training.merging.merged import Form, Merged, card, chosen_form
from qprobe.training.origin import origin_of

REFERENCE = "base + adapter"


@quiet_models()
def merge(
    adapter: str | Path,
    *,
    out: str | Path,
    as_: Form | None = None,
    manifest: str | Path | None = None,
    base: Base | None = None,
    model: str | None = None,
    images: str | Path | None = None,
    data: Any = None,
    prompt: str | None = None,
    samples: int | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    seed: int = 0,
    batch_size: int = 4,
    max_new_tokens: int = 64,
    turns: Turns = "each",
    split: str | None = None,
    bad_data: BadData = "refuse",
    allow_downloads: bool = False,
    metric: AskedMetric | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> Merged:
    """The checkpoint in the new folder `out` that holds the adapter's base with `adapter` in its weights.

    Two are made: the 16-bit weights with the adapter added, and the base's own weights (dequantized where
    they are in 4-bit) with the adapter added, back in 4-bit. An adapter learned to work beside the base's
    weights, so either is another model. Each is loaded plainly and held against base + adapter on samples
    that the adapter was not trained on; the one with the lower KL is kept, and 4-bit, the smaller, where they
    cannot be told apart.

    adapter: folder of `finetune`, or of peft. as_: the form to make, without a choice.
    manifest, base: of an adapter that `finetune` did not make; what it was trained on, see `load_base`.
    model: where the 16-bit weights are; None for those that the adapter was trained on.
    metric: as of `compare`; None for exact answers, where samples bring some. Others as of `compare`.
    `out` has its name only once it is complete, audited and measured.
    Raises RunError for an adapter that is none, takes no effect or is of another base; ModelError if `out`
    is there already; otherwise as `compare` and `load_dynamic_4bit` do.
    """
    if as_ is not None and as_ not in WRITERS:
        raise QprobeError(f"--as {as_!r} is no form. Pass {' or '.join(WRITERS)}, or neither.")
    target = path_of(out)
    refuse_to_overwrite(target)
    peft_library()
    found = read_adapter(path_of(adapter))
    origin = origin_of(found, path_if_given(manifest), base, model, dtype)
    options = CompareOptions(
        manifest=origin.path,
        model=origin.model,
        images=path_if_given(images),
        data=data_of(data),
        prompt=prompt,
        samples=samples,
        device=device,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        turns=turns,
        split=split,
        bad_data=bad_data,
        allow_downloads=allow_downloads,
        metric=metric,
        trust_remote_code=trust_remote_code,
    )
    skeleton = check_model(origin.manifest, origin.model, trust_remote_code)
    if readout_of(skeleton.model) != ANSWERS:
        raise QprobeError(
            f"{origin.manifest.model.id} has no language head, so there are no answers by which to tell what "
            "a merge loses. Merge it with peft (merge_and_unload)."
        )
    fits = found.fits(skeleton.model)
    refuse_without_effect(found, fits, origin.manifest.model.id)
    origin.refuse_other_weights()
    forms = tuple(WRITERS) if as_ is None else (as_,)
    origin.refuse_experts(forms)
    return _merged(Job(found, origin, skeleton, options, target), forms, progress)


def _merged(job: Job, forms: tuple[Form, ...], progress: Progress) -> Merged:
    """Writes and measures each of `forms`, and keeps the better one."""
    course, reference, notes = set_course(
        job.origin.manifest.model.id,
        job.skeleton,
        lambda _: job.adapted(),
        job.options,
        staged(progress, REFERENCE),
        "exact",
    )
    results, written = {REFERENCE: reference}, {}
    with ExitStack() as stack:
        for form in forms:
            progress(f"write {form}", 0, 1)
            folder = stack.enter_context(scratch_folder(job.target))
            written[form] = one = WRITERS[form](job, folder)
            load = partial(_plainly, one.skeleton, job.options.device)
            results[form] = run_course(load, course, job.options, staged(progress, form))
        form, why = chosen_form({x: results[x] for x in forms})
        one = written[form]
        made = Merged(
            out=job.target,
            form=form,
            why=why,
            base=job.origin.base,
            layers=len(one.arrived),
            unchanged=tuple(name for name, x in one.arrived.items() if not x.energy),
            arrived=sum(one.arrived.values(), Arrived()).share,
            comparison=compared(results, course, notes),
        )
        (one.folder / "README.md").write_text(card(made, job.origin.manifest, job.skeleton), "utf-8")
        files = {x.name: x.stat().st_size for x in sorted(one.folder.iterdir())}
        os.replace(one.folder, job.target)
    return made.with_files(files)


def _plainly(skeleton: Skeleton, device: str | None) -> tuple[Any, Any]:
    """(model, processor) of a written checkpoint, as a user loads it."""
    model, _ = load_plainly(skeleton, pick_device(device))
    keep_codes_as_stored(model)
    return model.eval().requires_grad_(False), load_processor(skeleton.source)
