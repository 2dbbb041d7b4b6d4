"""`qprobe finetune`: QLoRA on one of three bases by transformers' Trainer, resumable and recorded."""

from __future__ import annotations

import gc
import os
import random
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from qprobe.checkpoint.adapters.record import Distilled, Record, write_record
from qprobe.checkpoint.load import check_model, source_of, with_dtype
from qprobe.checkpoint.quantize import save_processor
from qprobe.checkpoint.ready import kept_whole, ready_for_training
from qprobe.checkpoint.starts.attached import save_adapter, with_adapter
from qprobe.checkpoint.starts.held import held, hold, learned_numbers
from qprobe.data.reading import check_left_out, share_left_out, warn_left_out
from qprobe.errors import ModelError
from qprobe.inputs.decoder import layout_of
from qprobe.inputs.encoding import encode_conversations
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.processor import load_processor
from qprobe.loading.skeleton import Skeleton
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import moved
from qprobe.manifest.write import write_manifest
from qprobe.options import FinetuneOptions, data_of, no_progress, path_of, takes
from qprobe.system.devices import parse_device
from qprobe.system.files import write_atomic
from qprobe.system.log_filters import Remark
from qprobe.training.alone import CHECKPOINTS, alone_in, check_out, goes_on, last_checkpoint, start_record
from qprobe.training.asked import Training
from qprobe.training.bases import (
    BASE_WEIGHTS,
    MANIFEST_FILE,
    base_digest,
    model_folder,
    open_base,
)
from qprobe.training.collate import Collate, fewer_workers, working_ahead
from qprobe.training.distilled import FEWEST, Lesson, distil, lessons_of
from qprobe.training.faults import disk_explained, in_smaller_batches, loss_explained
from qprobe.training.refused import asked_adapter, check_options, refuse_without_answers, with_start
from qprobe.training.result import Finetuned, card
from qprobe.training.rows import Lines, check_batches, encodable, learnable, split
from qprobe.training.spec import asked_spec, images_digest, texts_digest
from qprobe.training.together import together
from qprobe.training.trainer import (
    Watch,
    check_adapter,
    has_last_loss,
    losses_of,
    make_trainer,
    with_its_steps,
)

# Of tokenizers whose files name a length; lines that --max-length refuses are named one by one.
TOO_LONG = Remark(
    "transformers.tokenization_utils_base",
    "will result in indexing errors",
    "length is checked against --max-length, and a longer line is named",
)


@takes(FinetuneOptions)
@quiet_models(TOO_LONG)
def finetune(options: FinetuneOptions) -> Finetuned:
    """The run that trained an adapter; `out` has the adapter with manifest, processor and record.

    Run again with the same arguments after an interruption, it goes on from the last checkpoint.

    manifest: the skiplist.json of a scan. data: as in `qprobe.scan`. out: folder of the adapter.
    base: what the adapter is put on: the manifest's model in 16-bit, in standard 4-bit, or dynamic.
    model: where the 16-bit weights are; None for the id that the manifest names.
    dtype: of everything in 16-bit; None for the manifest's compute_dtype.
    held_out: share of the lines that is never trained on, only evaluated; eval_data: other data instead.
    turns, split, bad_data, allow_downloads: as in `qprobe.scan`; answers that do not count are not learned.
    steps: optimizer steps; None for `epochs` passes over the data. rank: of what is trained in each layer.
    learning_rate: the highest one. batch_size: conversations that run at once; accumulation: batches per
    step. max_length: tokens of a line. optimizer: None for adamw_8bit on CUDA, and adamw_torch on a CPU, for
    which there is no 8-bit one. adapt, for_tool: where adapters go, as of `qprobe.lora_targets`.
    start: where the adapter begins, "zero" or at the correction of calibrated weights that `scan
    --keep-correction` left, "corrected"; None for that where there is one. The adapter holds the correction,
    unchanged, beside what is trained, so that its rank, and its alpha, is the sum of both ranks.
    distill: steps, before the first one, in which the correction, or an adapter that begins at zero, learns
    to answer the lines as the 16-bit model does; that is loaded for it, before the base.
    workers: processes that read images and make batches ahead of the steps, the same batches, one per core at
    most; None for two where lines have images, a GPU trains, and cores and shared memory suffice, else 0.
    save_every: steps between checkpoints and evaluations. seed: of the adapters, the order of the lines and
    the held-out ones. trust_remote_code: as of `qprobe.load_dynamic_4bit`.
    progress: called as work moves on, see `qprobe.options.Progress`.
    Raises QprobeError for options that make no run and for a loss that is no number, SampleError for data
    that cannot be trained on, RunError if `out` holds something else or a finished adapter or another process
    trains into it, MachineError without peft, or for an optimizer or a device that is not there.

    Under torchrun each process trains on its share of every step, of `accumulation` batches each, with a
    model on its own GPU; the first one reads the data and writes. An interrupted run goes on with another
    number of processes in steps of the same lines. Where the batches of a pass over the data do not divide
    among the processes, its first lines are seen once more.
    """
    path, out = path_of(options.manifest), path_of(options.out)
    manifest = read_manifest(path)
    options = with_start(options, manifest, path.parent)
    check_options(options, manifest, path.parent)
    data, eval_data = data_of(options.data), data_of(options.eval_data)
    with together(os.environ, parse_device(options.device)) as group, ExitStack() as stack:
        progress = options.progress if group.is_first else no_progress
        asked = Training(options, manifest, path.parent, data, eval_data, out, group, progress)
        skeleton = check_model(manifest, options.model, options.trust_remote_code)
        refuse_without_answers(skeleton.model)
        lines = group.from_first(lambda: _checked(asked, skeleton, stack))
        return _finetune(asked, skeleton, lines)


def _checked(asked: Training, skeleton: Skeleton, stack: ExitStack) -> Lines:
    """What is trained on, before weights are loaded; until `stack` ends the folder is ours."""
    options, manifest, progress = asked.options, asked.manifest, asked.progress
    spec = asked_spec(options, asked.device, manifest, asked.folder)
    check_out(asked.out, spec)
    found = [learnable(x, options, progress) for x in (asked.data, asked.eval_data) if x is not None]
    spec |= {"data": texts_digest(found[0]), "images": images_digest(found)}
    if len(found) > 1:
        spec["eval_data"] = texts_digest(found[1])
    stack.enter_context(alone_in(asked.out))
    check_out(asked.out, spec)
    processor = load_processor(source_of(manifest, options.model, options.trust_remote_code))
    if processor is None:
        raise ModelError(f"{manifest.model.id} has no tokenizer, so no text can be learned. Add its files.")
    dtype = getattr(torch, with_dtype(manifest.format, options.dtype).compute_dtype)
    layout = layout_of(skeleton.model)
    checked = [encodable(x, processor, dtype, options.max_length, progress, layout) for x in found]
    for one in checked:
        check_left_out(one, options.bad_data, "train on")
        warn_left_out(share_left_out(one), one.sentences(), "skipped")
    train, held_out = split([x.good for x in checked], options)
    check_batches(train, options.batch_size, processor, dtype)
    # The fingerprint knows names and shapes alone; another checkpoint of the architecture has it too.
    spec[BASE_WEIGHTS] = base_digest(manifest, options.model)
    check_out(asked.out, spec)
    skipped = tuple(sentence for one in checked for sentence in one.sentences())
    notes = dict.fromkeys(note for one in checked for note in one.notes)
    ours = (kept_whole(skeleton.model), fewer_workers(options, asked.group.size))
    return Lines(spec, train, held_out, skipped, (*notes, *(x for x in ours if x is not None)))


def _finetune(asked: Training, skeleton: Skeleton, lines: Lines) -> Finetuned:
    """The run on `lines`, in a folder that no other run trains into."""
    manifest, group = asked.manifest, asked.group
    is_new = not group.from_first(lambda: goes_on(asked.out, lines.spec))
    lessons = _lessons(asked, skeleton, lines) if asked.options.distill and is_new else []
    tuned, processor, left_out = _with_adapters(asked, skeleton)
    distilled = _distilled(asked, tuned, lessons)
    if asked.options.start == "corrected":
        hold(tuned, slice(asked.options.rank, None))
    begun = Record(
        "running",
        manifest.model.fingerprint,
        lines.spec,
        model=model_folder(manifest, asked.options.model),
        processes=group.size,
        distilled=distilled,
    )
    record = group.from_first(lambda: start_record(asked.out, begun))
    result, other_batches = _trained(asked, tuned, processor, lines, record.processes)
    done = Finetuned(
        out=asked.out,
        base=asked.options.base,
        start=asked_adapter(asked.options).start,
        fingerprint=manifest.model.fingerprint,
        skipped=lines.skipped,
        notes=lines.notes,
        left_out=left_out,
        other_batches=other_batches,
        processes=group.size,
        distilled=record.distilled,
        **result,
    )
    group.from_first(lambda: _finish(asked, tuned, processor, record, done))  # the others wait for it
    return done


def _with_adapters(asked: Training, skeleton: Skeleton) -> tuple[Any, Any, tuple[str, ...]]:
    """(peft model at its start, processor, a sentence per reason for which layers have no adapter)."""
    options, manifest, folder = asked.options, asked.manifest, asked.folder
    loaded, processor = open_base(manifest, folder, options.base, skeleton, asked.device, options.dtype)
    model = ready_for_training(loaded)
    torch.manual_seed(options.seed)
    tuned, targets = with_adapter(model, asked_adapter(options), manifest, folder)
    return tuned, processor, targets.notes()


def _lessons(asked: Training, skeleton: Skeleton, lines: Lines) -> list[Lesson]:
    """What the 16-bit model, which is gone again afterwards, answers on as many lines as distilling takes."""
    options = asked.options
    model, processor = open_base(asked.manifest, None, "16-bit", skeleton, asked.device, options.dtype)
    most = max(FEWEST, options.distill * options.accumulation * options.batch_size)
    shuffled = random.Random(options.seed).sample(lines.train, min(most, len(lines.train)))
    size = options.batch_size
    batches = (shuffled[i : i + size] for i in range(0, len(shuffled), size))
    decoder = layout_of(model).decoder
    lessons = lessons_of(model, (encode_conversations(processor, x, model.dtype, decoder) for x in batches))
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return lessons


def _distilled(asked: Training, tuned: Any, lessons: list[Lesson]) -> Distilled | None:
    """What the adapter of `tuned` learned from the 16-bit model's answers; None without `lessons`."""
    if not lessons:
        return None
    options = asked.options
    # What repairs the base is one part, where there is a correction, and what the lines teach the other.
    untrained = slice(options.rank if options.start == "corrected" else 0)
    with held(tuned, untrained):
        return distil(tuned, lessons, options.distill, options.accumulation, options.seed, asked.progress)


def _trained(
    asked: Training, tuned: Any, processor: Any, lines: Lines, began_with: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(fields of `Finetuned` that training decides, a sentence per reason for other batches than asked for).

    began_with: how many processes the run had when it began.
    """
    options, said = with_its_steps(asked.options, began_with, asked.group.size)

    def train(now: FinetuneOptions) -> dict[str, Any]:
        return _train(replace(asked, options=now), tuned, processor, lines)

    with disk_explained(asked.out), loss_explained(asked.out):
        # Where memory runs out in one of several processes, the others wait for its gradients in vain.
        if asked.group.size > 1:
            return train(options), said
        result, smaller = in_smaller_batches(options, tuned, train)
        return result, (*said, *smaller)


def _train(asked: Training, tuned: Any, processor: Any, lines: Lines) -> dict[str, Any]:
    """Runs the Trainer; the fields of `Finetuned` that it decides."""
    group, device = asked.group, next(tuned.parameters()).device
    dtype, decoder = tuned.get_base_model().dtype, layout_of(tuned.get_base_model()).decoder
    checkpoints, watch = asked.out / CHECKPOINTS, Watch(asked.progress)
    trainer = make_trainer(
        tuned,
        asked.options,
        lines,
        checkpoints,
        Collate(processor, dtype, decoder),
        # Every process comes to the same losses; the first one says what is wrong with them.
        [watch] if group.is_first else [],
        group.size,
    )
    resume = group.from_first(lambda: last_checkpoint(checkpoints))
    if resume is not None:
        trainer.args.eval_on_start = False  # the loss at its step is in the state already
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with working_ahead(trainer.args.dataloader_num_workers):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        if lines.held_out and not has_last_loss(trainer):
            trainer.evaluate()
    if group.is_first:
        check_adapter(tuned, watch)
    return {
        **losses_of(trainer),
        "resumed_from": None if resume is None else int(resume.name.rpartition("-")[2]),
        "trained_lines": len(lines.train),
        "held_out_lines": len(lines.held_out),
        "trainable_parameters": learned_numbers(tuned, asked.options.rank),
        "optimizer": lines.spec["optimizer"],
        "seconds": time.perf_counter() - start,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _finish(asked: Training, tuned: Any, processor: Any, record: Record, done: Finetuned) -> None:
    """The adapter and what belongs to it; the record that calls it finished is written last."""
    out, manifest = asked.out, asked.manifest
    with disk_explained(out):
        save_adapter(tuned, out, record.model or manifest.model.id)
        write_atomic(out / "README.md", card(manifest, done).encode())
        save_processor(processor, out)
        write_manifest(out / MANIFEST_FILE, moved(manifest, asked.folder, out))
        result = {key: value for key, value in done.to_json().items() if key != "out"}
        write_record(out, replace(record, status="finished", result=result))
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
