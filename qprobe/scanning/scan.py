"""The whole road of one scan: check, open, measure, choose, report."""

from __future__ import annotations

import os
from contextlib import nullcontext

from qprobe.loading.log_filters import quiet_models
from qprobe.measure.subject import Subject
from qprobe.options import ScanOptions, takes
from qprobe.runs.folder import RunFolder
from qprobe.runs.shards import entered, finishing, left_to_others, measuring
from qprobe.scanning.asked.request import ScanRequest, parse_options
from qprobe.scanning.check import check_model
from qprobe.scanning.finish import finish, unfinished
from qprobe.scanning.measure import calibrate, measure_units
from qprobe.scanning.opening import open_model, open_units
from qprobe.scanning.planning.limit import within_memory
from qprobe.scanning.process import Process
from qprobe.scanning.repeat import repeat_units
from qprobe.scanning.run import Run, ScanResult
from qprobe.scanning.samples import Chosen, ScanSamples, prepare_samples, read_samples
from qprobe.scanning.show import show_samples
from qprobe.scanning.together import measure_together
from qprobe.scanning.weights import scan_weights
from qprobe.system.bars import progress_bars
from qprobe.system.processes import shard_from


@takes(ScanOptions)
@quiet_models()
def scan(options: ScanOptions) -> Run:
    """The run of a scan, which measures every linear, chooses a skip-list, and leaves a run folder.

    A folder of the same specification is resumed: finished units are not measured again. Under torchrun, or
    wherever RANK and WORLD_SIZE are set, this process measures its share of the units (see
    `qprobe.runs.shards`), and whichever finds all of them finished goes on to choose.

    model: catalogue alias, hub id, local folder, or a loaded transformers model, with its `processor`. The
        loaded one is only read: its weights are shared where they are in `dtype`, else copied.
    images: a folder, or a list of Pillow's images, of arrays or of paths; data: a file, a data set's id or
        rows in memory, see `qprobe.data.reading`; at most one of them, neither for the built-in ones.
    prompt: asked of every image that brings no question. samples: how many; None for a sensible number.
    format: "nf4", or "nf4-calibrated" for codes that are chosen on the samples, at the same bytes.
    budget: what the skip-list may cost in bytes: "+10%" of standard 4-bit, "+690MiB", or a total "7.3GiB";
        None for "+10%". max_kl: ask the other way round, for the fewest bytes with a KL of at most this; at
        most one of the two.
    out: the run folder; None for runs/MODEL.
    device: "cpu", "cuda", "cuda:1", "auto" for all GPUs; None for the best one there is, or all GPUs where
        the model is too large for one; a loaded model stays where it is. dtype: of the 16-bit reference, None
        for bfloat16, or for float16 where a loaded model is in it.
    by: the score column that chooses; None for the best one measured.
    for_tool: one of `qprobe.options.FOR`, whose fused groups every list keeps whole; None for no tool.
    measures: which of `qprobe.registry.measures.names()` to take; None for all that apply. ["weight"] alone
        reads the checkpoint tensor by tensor and never loads the model. nodes: of the path attribution.
    ablate: measure the KL of single layers as well, two forward passes each: "all", the number of layers to
        take from the head of the sensitivity ranking, or names with commas between them.
    max_memory: the most that the scan may hold on its device, on a CPU in its process, in bytes or as
        "22GiB"; weights that do not fit wait on the host, for the same results. None for what is free.
    turns: which answers of a conversation count, "first", "last" or "each". split: of a data set that has
        several. bad_data: "refuse" where more than a tenth of the rows, and at least ten, are left out, or
        "skip" them. allow_downloads: fetch images that rows name by an address.
    tune: steps in which "nf4-calibrated" tunes block scales on the answers, 0 for none; None for what suits
        the device and the model.
    calibration_samples: how many "nf4-calibrated" fits codes to: the measured ones, and more of the same
        source up to so many; None for what suits the device and the model.
    drawn_texts: how many texts of 128 tokens the model draws itself, to which "nf4-calibrated" fits codes and
        tunes scales as well; all of them together count as much as the samples.
    keep_correction: rank, 64 at most, of the factors of what "nf4-calibrated" leaves of each weight, which
        are kept in the run folder then.
    check_data: samples of another kind than those that are measured, as `data` takes them: the verdict and
        the manifest say what 4-bit costs on them as well.
    experts: "16-bit" keeps fused weights of experts so, for a checkpoint that plain transformers loads; in
        4-bit only `qprobe.load_dynamic_4bit` reads them.
    metric: of greedy answers to the held-out samples, beside KL, for the verdict: one of
        `qprobe.registry.metrics.names()`, or any function of (sample, answer) to a number; the answer of the
        sample is None where none was given. Costs the answers of 16-bit, standard 4-bit and the chosen list.
    check: the folder of this same scan, in the place of `out`: a few of its units are measured again and
        compared, to the bit on a CPU; nothing in it changes. RunError where they are not what it holds.
    trust_remote_code: run Python code that the checkpoint brings, for models that exist only as such code; it
        can do on this machine whatever you can.
    progress: called as work moves on, see `qprobe.options.Progress`; None for bars, see `qprobe.system.bars`.
    Raises TypeError for an option that it does not have, QprobeError for anything a user can fix (see
    `qprobe.errors`).
    """
    asked = parse_options(options)
    with progress_bars() if options.progress is None else nullcontext(options.progress) as show:
        process = Process(RunFolder(asked.folder), shard_from(os.environ), show)
        steps = scan_weights if asked.measures.is_weight_alone else scan_model
        if asked.is_check:
            steps = repeat_units
        return Run(process.run, steps(asked, process))


def scan_model(asked: ScanRequest, process: Process) -> ScanResult:
    """The result of a scan that loads the model."""
    run, shard, clock = process.run, process.shard, process.clock
    with clock.stage("load"):
        skeleton = check_model(asked, process)  # whatever can be refused without weights
        chosen = read_samples(skeleton, asked, process)
        asked = within_memory(skeleton, asked, chosen, process)
    subject = open_model(skeleton, asked, process, chosen.processed)
    with subject.streaming(), entered(run.path, shard):
        with measuring(run.path, shard):
            work = measure_layers(subject, chosen, asked, process)
        measure_together(subject, work, asked, process)
        with finishing(run.path, shard, run.units_left, asked.after_units) as turn:
            if turn == "ours":
                return finish(subject, work, asked, process)
            return unfinished(subject, work, process, left_to_others(shard, turn, run))


def measure_layers(subject: Subject, chosen: Chosen, asked: ScanRequest, process: Process) -> ScanSamples:
    """The samples of the scan, after this process has measured its share of the units of the layer table."""
    run, clock = process.run, process.clock
    with clock.stage("answers"):
        work = prepare_samples(subject, chosen, asked, process)
    with clock.stage("prepare"):
        with subject.running("start"):
            measures = open_units(subject, work, asked, run)
        show_samples(subject, work.calibration, run)
    if asked.format.is_calibrated:
        with clock.stage("calibrate"):
            calibrate(subject, work, asked, process)
    with clock.stage("measure"):
        measure_units(subject, work, measures, process)
    return work
