"""The real command line at full size: what each stage costs in seconds, memory, and bare forward passes.

    python -m tests.benchmarks.full_size [--parts ...] [--images 4 8 16 32 64] [--layers 0.25 0.5 1]

Writes a checkpoint of the exact geometry of Llama-3.2-11B-Vision with seeded random weights (21.3 GB), 32
images of 4 tiles with prompts of 256 tokens and answers of 64, and runs `python -m qprobe` on them, each
command in a process of its own. The bare forward of the same samples runs warm and for `--bare-seconds`, so
that both see the same clocks. Prints Markdown, a row as soon as it is known, so that a killed run leaves a
table. Parts: write, bare, activation (weight + activation error only), scan, select, load4, quantize, and,
on request, calibrated (the scan with calibrated weights), streamed (the default scan within --max-memory,
its table beside that of the part scan, and its copies), spread and shards (the default scan with the model
over all GPUs, and by --processes of torchrun, with their tables beside that of the part scan),
calibrated-shards, and weight (the weight-only scan on the CPU beside the bare read of the files and the
quantizer's own speed). With fewer processes than half of the GPUs each spreads the model over its own.
--geometry 90b takes the 90B model; with --generated no disk holds its 177 GB (`tests.benchmarks.generated`):
then the parts are write, scan, calibrated, spread, shards and calibrated-shards.
With --images or --layers it prints how scan time grows instead. `--tiny` checks all of it on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.benchmarks.checkpoints import GEOMETRIES
from tests.benchmarks.full_size_parts import CALIBRATED, CHILDREN, Bench, Ran
from tests.benchmarks.full_size_streamed import column_differences, largest_difference

PARTS = ("write", "bare", "activation", "scan", "select", "load4", "quantize")
ON_REQUEST = ("calibrated", "streamed", "spread", "shards", "calibrated-shards", "weight")
GIB = 2**30


# Tables -------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)


def row(name: str, seconds: float, ratio: float | None, device: float | None, host: float | None) -> None:
    """One line of the table; device and host in bytes."""
    cells = [name, f"{seconds:.2f}", "" if ratio is None else f"{ratio:.2f}"]
    say(f"| {' | '.join([*cells, *('' if b is None else f'{b / GIB:.1f}' for b in (device, host))])} |")


def head(title: str, columns: str) -> None:
    say(f"\n{title}\n\n| {columns} |\n|{'---|' * (columns.count('|') + 1)}")


def machine(options: argparse.Namespace) -> str:
    import torch

    from qprobe.system.versions import library_versions

    card = (
        torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    )
    libraries = ", ".join(f"{name} {v}" for name, v in library_versions().items())
    return f"{card}, {os.cpu_count()} CPU cores, {libraries}."


def stages(bench: Bench) -> None:
    """The table of seconds and peak memory of each part."""
    head(
        f"{machine(bench.options)} Batch size {bench.options.batch_size}.",
        "stage | seconds | bare forwards of the same samples | device peak GiB | host peak GiB",
    )
    parts, bare = bench.options.parts, None
    if "write" in parts:
        ran = bench.write()
        named(ran, f"write the checkpoint ({(ran.found or {}).get('bytes', 0):,} bytes)")
    if "bare" in parts:
        ran = bench.bare(bench.most_images)
        bare = ran.found
        named(ran, "bare forward: the whole process")
        if bare:
            host, all_of_it = ran.host_bytes, bare["calibration"] + bare["held_out"]
            row("load the 16-bit model", bare["load"], None, bare["peak_bytes"], host)
            row("decode and process the images twice", bare["encode"], None, None, None)
            texts = f"{bare['text_tokens']} text tokens, {bare['answer_tokens']} of the answer"
            samples = bare["samples"]
            row(
                f"bare forward, all {sum(samples)} samples ({texts})",
                all_of_it,
                1.0,
                bare["peak_bytes"],
                host,
            )
            row(f"bare forward, {samples[0]} calibration samples", bare["calibration"], 1.0, None, None)
            row(f"bare forward, {samples[1]} held-out samples", bare["held_out"], 1.0, None, None)
    if "activation" in parts:
        scanned(
            bench.scan(bench.most_images, "activation", "--measures", "activation"),
            "weight + activation",
            bare,
        )
        steady(bench, "activation", bare)
    if "scan" in parts:
        scanned(bench.scan(bench.most_images, "scan"), "default scan", bare)
        steady(bench, "scan", bare)
    if "calibrated" in parts:
        scanned(bench.calibrated(), "calibrated scan without tuning", bare)
        steady(bench, "calibrated", bare)
    if "streamed" in parts:
        streamed(bench, bare)
    if "spread" in parts:
        scanned(bench.spread(), "scan with the model over all GPUs", bare)
        compared(bench, "spread")
    of = f"by {bench.options.processes} processes of torchrun, the one that chose"
    if "shards" in parts:
        scanned(bench.shards("shards"), f"scan {of}", bare)
        compared(bench, "shards")
        efficiency(bench, "scan", "shards")
    if "calibrated-shards" in parts:
        scanned(bench.shards("calibrated-shards", *CALIBRATED), f"calibrated scan {of}", bare)
        efficiency(bench, "calibrated", "calibrated-shards")
    if "select" in parts:
        named(bench.select(), "select again, another budget: the whole process")
    if "load4" in parts:
        loaded(bench.load4(), "load the dynamic 4-bit model from the 16-bit checkpoint")
    if "quantize" in parts:
        named(bench.quantize(), "quantize into a checkpoint: the whole process")
        loaded(bench.load_plain(), "load that checkpoint with transformers alone")
    if "weight" in parts:
        weights(bench)


def named(ran: Ran, name: str) -> None:
    """The row of a whole process, and what went wrong where something did."""
    failed = "" if ran.found is not None else " (failed)"
    row(f"{name}{failed}", ran.seconds, None, (ran.found or {}).get("peak_bytes"), ran.host_bytes)
    if ran.why:
        say(f"\n```\n{ran.why}\n```\n")


def steady(bench: Bench, name: str, bare: dict[str, Any] | None) -> None:
    """Rows of a full batch after the first, which pays for what is done once a process."""
    shared, alone = unit_times(bench, name, "outputs"), unit_times(bench, name, "isolated")
    gaps = sorted(b - a for a, b in pairwise(shared[:-1]))  # the last batch may be a smaller one
    if not (gaps and bare):
        return
    each = bare["calibration"] / bare["samples"][0] * bench.options.batch_size
    seconds = gaps[len(gaps) // 2]
    row(f"{name}: one batch, the first left out, median", seconds, seconds / each, None, None)
    if len(alone) > 1:
        own = sorted(b - a for a, b in pairwise([shared[-1], *alone[:-1]]))
        half = own[len(own) // 2]
        row(f"{name}: isolated KL of one batch, median", half, half / each, None, None)
        whole = seconds + half / 2  # isolated KL is measured on half of the samples
        row(f"{name}: one batch with its share of isolated KL", whole, whole / each, None, None)


def unit_times(bench: Bench, name: str, stage: str) -> list[float]:
    """When the units of a stage were finished, in order."""
    found = (bench.run_folder(name) / "units").glob(f"{stage}-*.parquet")
    return sorted(x.stat().st_mtime for x in found)


def loaded(ran: Ran, name: str) -> None:
    """The row of a loaded model, with the peak over its final size."""
    if ran.found is None:
        named(ran, name)
        return
    ratio = ran.found["peak_bytes"] / ran.found["final_bytes"]
    name = f"{name} (peak {ratio:.2f} times the {ran.found['final_bytes'] / GIB:.2f} GiB that stay)"
    row(name, ran.found["seconds"], None, ran.found["peak_bytes"], ran.host_bytes)


def scanned(ran: Ran, name: str, bare: dict[str, Any] | None) -> None:
    """Rows of the stages of one `qprobe scan`. measure is held against the calibration samples, choose
    against the held-out ones, and everything after loading against all of them."""
    named(ran, f"{name}: the whole process")
    if ran.found is None:
        return
    parts = {"measure": "calibration", "choose": "held_out"}
    found = ran.found["seconds"]
    for stage, seconds in found.items():
        against = bare[parts[stage]] if bare and stage in parts else None
        ratio = seconds / against if against else None
        row(f"{name}: {stage}", seconds, ratio, None, None)
    after = sum(found.values()) - found["load"]
    once = bare["calibration"] + bare["held_out"] if bare else None
    ratio = after / once if once else None
    row(f"{name}: everything after loading", after, ratio, ran.found["peak_bytes"], ran.host_bytes)


def streamed(bench: Bench, bare: dict[str, Any] | None) -> None:
    """The scan within a memory limit: its rows, its table beside that without, and what copies alone take."""
    limit = bench.options.max_memory
    ran, copy = bench.streamed(), bench.copy()
    scanned(ran, f"scan within {limit}", bare)
    if not (ran.found and copy.found):
        named_failure(copy)
        return
    copied, speed = ran.found["streamed_bytes"], copy.found["speed"]
    say(
        f"\nWithin {limit}: {copied / 1e9:.1f} GB of weights copied. At {speed / 1e9:.1f} GB/s, "
        f"the speed of copies alone, {copied / speed:.2f} s."
    )
    compared(bench, "streamed")


def compared(bench: Bench, name: str) -> None:
    """How far the table of another scan is from that of the scan, by column."""
    tables = [bench.run_folder(x) / "layers.csv" for x in ("scan", name)]
    if not all(path.exists() for path in tables):
        return
    found = largest_difference(*tables)
    where = f" ({found['column']} of {found['layer']})" if found["difference"] else ""
    say(f"\nLargest relative difference from the table of the scan: {found['difference']:.2e}{where}.")
    if found["difference"]:
        head("Columns that differ", "column | of the sum | of a layer, median | of the largest layer")
        for line in column_differences(*tables):
            say("| {column} | {total:.1e} | {median:.1e} | {largest:.1e} |".format(**line))


def efficiency(bench: Bench, alone: str, together: str) -> None:
    """What share of the ideal speed several processes reach after loading, if one did the same here."""
    after = [after_loading(bench.run_folder(name)) for name in (alone, together)]
    if after[0] is not None and after[1] is not None:
        count = bench.options.processes
        share = after[0] / (count * after[1])
        say(f"\n{after[0]:.1f} s by one process, {after[1]:.1f} s by {count}: {share:.2f} of the ideal.")


def after_loading(run: Path) -> float | None:
    """Seconds of the process that finished the scan in `run`; None if there is no such scan."""
    path = run / "notes" / "end.json"
    if not path.exists():
        return None
    seconds = json.loads(path.read_text())["seconds"]
    return sum(seconds.values()) - seconds["load"]


def weights(bench: Bench) -> None:
    """The weight-only scan beside the floor that reading and quantizing set."""
    speeds = bench.speeds()
    ran = bench.weight()
    named(ran, "weight-only scan on the CPU: the whole process")
    if not (speeds.found and ran.found):
        say(f"\n{speeds.why or ran.why}\n")
        return
    seconds, found = ran.found["seconds"]["weights"], speeds.found
    with open(bench.run_folder("weight") / "layers.csv", newline="") as file:
        measured = sum(int(x["in_features"]) * int(x["out_features"]) for x in csv.DictReader(file))
    rate, reading = measured / seconds, found["bytes"] / found["read"]
    say(
        f"\nWeight-only: {found['bytes'] / 1e9:.2f} GB in {seconds:.1f} s, {rate / 1e6:.1f} M weights/s; the "
        f"quantizer alone {found['quantizer'] / 1e6:.1f} M weights/s; the bare read of the files "
        f"{found['read'] / 1e9:.2f} GB/s ({reading:.1f} s)."
    )


def growth(options: argparse.Namespace) -> None:
    """Tables of scan time by images and by layers."""
    columns = "bare forward s | weights s | measure s | choose s | all after loading s"
    if options.images:
        bench = Bench(options)
        named_failure(bench.write())
        head(machine(options), f"images | {columns} | all but weights, s an image")
        for count in options.images:
            line = grown(bench, count)
            say(f"| {count} | {line[0]} | {line[1] / count:.3f} |" if line else f"| {count} | failed |")
        shutil.rmtree(bench.folder)
    if options.layers:
        head(
            machine(options), f"share of the layers | {columns} | all after loading, s a whole model's layers"
        )
        for share in options.layers:
            bench = Bench(options, share)
            named_failure(bench.write())
            line = grown(bench, 32)
            say(f"| {share} | {line[0]} | {line[2] / share:.2f} |" if line else f"| {share} | failed |")
            shutil.rmtree(bench.folder)


def named_failure(ran: Ran) -> None:
    if ran.why:
        say(f"\n```\n{ran.why}\n```\n")


def grown(bench: Bench, images: int) -> tuple[str, float, float] | None:
    """(cells, seconds but for the weights, seconds after loading) of one scan; None if it failed."""
    bare, ran = bench.bare(images), bench.scan(images, f"grown-{images}")
    named_failure(bare)
    named_failure(ran)
    if bare.found is None or ran.found is None:
        return None
    found = ran.found["seconds"]
    after = sum(found.values()) - found["load"]
    once = bare.found["calibration"] + bare.found["held_out"]
    cells = [once, found["weights"], found["measure"], found["choose"], after]
    return " | ".join(f"{x:.2f}" for x in cells), after - found["weights"], after


def parsed() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the same architecture at a size for a CPU")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="11b", help="of Llama-3.2-Vision")
    parser.add_argument("--generated", action="store_true", help="draw weights where they lie, on no disk")
    parser.add_argument("--processes", type=int, default=2, help="of the parts shards and calibrated-shards")
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument("--images", type=int, nargs="+", help="scan time by number of images")
    parser.add_argument("--layers", type=float, nargs="+", help="scan time by share of the layers")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--bare-seconds", type=float, default=15.0, help="how long the bare forward runs")
    parser.add_argument("--max-memory", default="22GiB", help="of the part streamed")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which a part is killed")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="size of a checkpoint file")
    parser.add_argument("--folder", type=Path, help="where to work; kept if passed")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=1.0, help="of the layers, for the parts")
    options = parser.parse_args()
    options.parts = parts_of(options.parts, PARTS + ON_REQUEST, parser)
    return options


def parts_of(text: str, known: tuple[str, ...], parser: argparse.ArgumentParser) -> list[str]:
    """The parts in `text`, with commas between them; the parser ends the program for one not `known`."""
    parts = text.split(",")
    if unknown := set(parts) - {*known}:
        parser.error(f"no part is called {sorted(unknown)[0]}; there are {', '.join(known)}")
    return parts


def main() -> None:
    options = parsed()
    if options.child:
        print(json.dumps(CHILDREN[options.child](Bench(options, options.share))))
        return
    say(f"    python -m tests.benchmarks.full_size {' '.join(sys.argv[1:])}")
    with tempfile.TemporaryDirectory(prefix="qprobe-full-size-") as temporary:
        options.folder = options.folder or Path(temporary)
        if options.images or options.layers:
            growth(options)
        else:
            stages(Bench(options, options.share))


if __name__ == "__main__":
    main()
