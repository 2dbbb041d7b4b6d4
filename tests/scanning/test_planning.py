"""What a scan takes, told before it runs; and scans that do not fit, whose weights wait by themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qprobe
from qprobe.calibration.planned import limit as room
from qprobe.calibration.planned.memory import BatchShape, DeviceNeed
from qprobe.checkpoint.plan import planned_skeleton
from qprobe.errors import MachineError, QprobeError
from qprobe.loading.skeleton import Skeleton
from qprobe.measure import memory as measured_memory
from qprobe.measure.memory import MemoryLimit
from qprobe.options import ScanOptions, no_progress
from qprobe.records import FormatSpec
from qprobe.report.sizes import scan_text
from qprobe.runs.folder import RunFolder
from qprobe.scanning.asked.request import ScanRequest, parse_options
from qprobe.scanning.planning import limit
from qprobe.scanning.planning.limit import within_memory
from qprobe.scanning.planning.plan import Counts, Here, ScanPlan, plan_of
from qprobe.scanning.planning.seconds import EFFICIENCY, LAYER_S, Rates, flops_of, measured_rates
from qprobe.scanning.process import Process
from qprobe.system.devices import parse_device
from qprobe.system.processes import Shard
from tests.alone import run_alone
from tests.scanning.asked import Scanned, TinyFolder, options, scan

GIB = 2**30


# Seconds, held against what full-size scans took (reports/full-size, reports/calibration) -----------------

H100 = Rates(products=790e12 * 2.62 / 2.71, products32=67e12, copies=54.5e9)  # by its bare forward


@pytest.fixture(scope="module")
def flagship() -> Skeleton:
    return planned_skeleton("llama-3.2-11b-vision", None)


def planned(flagship: Skeleton, count: int, name: str = "nf4", **here: Any) -> ScanPlan:
    """The plan of a scan of so many images on an empty H100."""
    place = Here(**{"device": torch.device("cuda:0"), "free": 79 * GIB, "limit": None, "rates": H100, **here})
    shape = BatchShape(samples=4, tokens=320, answer_tokens=64, vision_rows=6404)
    return plan_of(flagship, FormatSpec(name), shape, Counts(count, 0), place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "measured"), [(4, 19.97), (8, 28.86), (16, 37.29), (32, 49.09), (64, 80.47)]
)
def test_seconds_after_loading_are_within_a_quarter_of_what_scans_took(
    flagship: Skeleton, images: int, measured: float
):
    found = planned(flagship, images)
    assert 0.75 < (found.total_seconds - found.seconds["load"]) / measured < 1.25
    assert found.samples == (images - images // 3, images // 3) and not found.is_streamed


def test_a_bare_forward_pass_takes_what_was_measured(flagship: Skeleton):
    # 25.9 TFLOP an image: the vision tower's 0.84 billion weights x 2 x 6,404 rows and its attention over all
    # tiles, the text's 8.7 billion x 2 x 320. 2.62 s for 32 images, at 0.4 of 790 TFLOP/s.
    shape = BatchShape(samples=32, tokens=320, answer_tokens=64, vision_rows=6404)
    flops = flops_of(flagship.model, flagship.inventory(FormatSpec()).layers, shape)
    assert flops / (EFFICIENCY * 790e12) == pytest.approx(2.62, rel=0.02)


@pytest.mark.slow
def test_a_limited_scan_and_a_calibrated_one_take_what_was_measured(flagship: Skeleton):
    limited = planned(flagship, 32, limit=22 * GIB)
    assert limited.is_streamed and limited.device_bytes == 22 * GIB
    assert limited.total_seconds - limited.seconds["load"] == pytest.approx(86.4, rel=0.15)
    h200 = planned(flagship, 32, "nf4-calibrated", rates=Rates(790e12, 67e12, 54.5e9))
    assert h200.tune == 0 and h200.seconds["calibrate"] == pytest.approx(80.9, rel=0.15)
    assert h200.total_seconds - h200.seconds["load"] == pytest.approx(126.9, rel=0.15)
    # Codes lie in the folder twice while they are joined: 5.3 GiB each.
    assert h200.disk_bytes > 2 * 5 * GIB > planned(flagship, 32).disk_bytes


def test_a_card_without_room_streams_and_says_what_all_weights_would_take(flagship: Skeleton):
    small = planned(flagship, 32, free=24 * GIB)
    assert small.is_streamed and small.device_bytes == int(0.9 * 24 * GIB)
    assert any("All weights on the device would take 35.8 GiB" in note for note in small.notes)
    host = small.host_bytes  # both forms of the weights, and libraries
    assert host is not None and host / GIB == pytest.approx(19.87 + 5.28 + 1, abs=0.1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"samples": 0}, "--samples 0 makes no scan. Pass 1 or more"),
        ({"batch_size": 0}, "--batch-size 0 makes no scan. Pass 1 or more"),
        ({"tiles": -1}, "--tiles -1 makes no scan. Pass 0 or more"),
        ({"tune": 5}, "--tune moves the scales that nf4-calibrated chose, and --format is nf4"),
        (
            {"drawn_texts": 5},
            "--drawn-texts is of texts that nf4-calibrated fits codes to, and --format is nf4",
        ),
        ({"drawn_texts": -1, "format": "nf4-calibrated"}, "--drawn-texts -1 makes no scan. Pass 0 or more"),
        ({"tune": -1, "format": "nf4-calibrated"}, "--tune -1 makes no scan. Pass 0 or more"),
    ],
)
def test_what_no_scan_can_be_made_of_is_refused(asked: dict[str, Any], said: str):
    with pytest.raises(QprobeError, match=said):
        qprobe.plan_scan("demo", device="cpu", **asked)


def test_drawing_texts_takes_time_that_is_told(flagship: Skeleton):
    # Four parts of 128 texts, 128 steps each that take at least as long as launching 522 linears.
    place = Here(torch.device("cuda:0"), 79 * GIB, None, H100)
    shape = BatchShape(samples=4, tokens=320, answer_tokens=64, vision_rows=6404)
    counts = [Counts(32, 0, texts) for texts in (0, 512)]
    plain, drawing = (plan_of(flagship, FormatSpec("nf4-calibrated"), shape, x, place) for x in counts)
    assert drawing.seconds["calibrate"] - plain.seconds["calibrate"] > 4 * 128 * 522 * LAYER_S
    assert any("Of drawing 512 texts there is no full-size figure" in note for note in drawing.notes)
    assert {**drawing.seconds, "calibrate": 0} == {**plain.seconds, "calibrate": 0}


@pytest.mark.slow
def test_a_checkpoint_in_4_bit_is_said_to_be_none_that_a_scan_reads(tiny_folder: TinyFolder, tmp_path: Path):
    folder = copytree(tiny_folder("llama"), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": dict(load_in_4bit=True)})
    )
    said = "packed is quantized already, and a scan reads 16-bit weights"
    assert any(said in note for note in qprobe.plan_scan(str(folder), device="cpu").notes)
    assert not any("quantized already" in x for x in qprobe.plan_scan(str(tiny_folder("llama"))).notes)


def test_on_a_cpu_the_process_is_a_part_of_what_all_weights_would_take(flagship: Skeleton):
    cpu = planned(flagship, 1, device=torch.device("cpu"), limit=2**20)
    (said,) = (note for note in cpu.notes if "All weights on the device" in note)
    assert any("within 21.6 GiB" in x for x in planned(flagship, 1, free=24 * GIB).notes)
    assert f"would take {cpu.needed_bytes / GIB:.1f} GiB" in said and "within 1 MiB" in said
    shown = scan_text(cpu.to_json() | {"seconds": {"load": 90.0, "tune": 19e6}, "total_seconds": 19e6}, 100)
    assert "A scan here: 1 sample (0 held out)" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["load", "90.0", "s"] in lines and ["all", *"219 days 22 h".split()] in lines


@pytest.mark.slow
def test_a_scan_on_a_cpu_holds_about_what_is_planned(tiny_folder: TinyFolder, tmp_path: Path):
    model = str(tiny_folder("llama"))
    plan = qprobe.plan_scan(model, samples=6, device="cpu", tokens=64, answer_tokens=5, tiles=0)
    scan = f"qprobe.scan({model!r}, device='cpu', samples=6, max_new_tokens=5, out={str(tmp_path / 'run')!r})"
    without_pictures = "import qprobe.scanning.finish as x, qprobe; x.write_report = lambda _: []"
    done = run_alone([sys.executable, "-c", f"{without_pictures}; {scan}"], 300)
    assert done.status == 0, done.err
    assert 0.4 < done.peak_bytes / plan.device_bytes < 1.2  # libraries, of which this one needs fewer
    lies = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*"))
    assert lies < plan.disk_bytes < 3 * 2**20 + 10 * lies  # pictures, and the rest


def test_products_are_timed_on_the_device_itself():
    found = measured_rates(torch.device("cpu"), torch.float32)
    assert 1e8 < found.products == found.products32 < 1e14 and found.copies is None


# Scans that do not fit -------------------------------------------------------------------------------------


class Asking:
    """What a scan knows before it loads; `limited(**asked)` is what the free memory makes of a request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free_gib: float, need_gib: float) -> None:
        monkeypatch.setattr(limit, "free_memory", lambda _: int(free_gib * GIB))
        monkeypatch.setattr(limit, "held_bytes", lambda _: 0)
        monkeypatch.setattr(room, "weight_bytes", lambda *_: int(need_gib * GIB) - GIB)
        monkeypatch.setattr(room, "device_need", lambda *_: DeviceNeed(int(need_gib * GIB) - GIB, GIB))
        monkeypatch.setattr(limit, "shape_of_batch", lambda *_: BatchShape(1, 1, 1))

    def limited(self, shard: Shard = Shard(), **asked: Any) -> ScanRequest:  # noqa: B008  frozen
        request = parse_options(ScanOptions("demo", **{"device": "cpu", **asked}))
        skeleton: Any = SimpleNamespace(
            is_buildable=True, model=None, config=None, inventory=lambda _: SimpleNamespace(layers=())
        )
        chosen: Any = SimpleNamespace(processed=None, samples=())
        process = Process(RunFolder(Path("nowhere")), shard, no_progress)
        return within_memory(skeleton, request, chosen, process)


def test_a_scan_without_room_gets_a_limit_of_nine_tenths_of_what_is_free_and_says_so(monkeypatch):
    found = Asking(monkeypatch, free_gib=20, need_gib=35.8).limited()
    assert found.max_memory_bytes == 18 * GIB
    assert found.why_limited == (
        "cpu has 20.0 GiB free, and with all weights on it this scan would take about 35.8 GiB, so they wait "
        "on the host, as with --max-memory 18432MiB."
    )


@pytest.mark.parametrize(("free", "limited"), [(39.0, True), (40.5, False), (80.0, False)])
def test_a_scan_is_limited_only_where_it_would_take_more_than_nine_tenths(
    monkeypatch, free: float, limited: bool
):
    found = Asking(monkeypatch, free_gib=free, need_gib=36).limited()  # 36 of 40 are nine tenths
    assert (found.max_memory_bytes is not None) == limited == (found.why_limited is not None)


def test_a_limit_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch):
    found = Asking(monkeypatch, free_gib=1, need_gib=36).limited(max_memory="30GiB")
    assert found.max_memory_bytes == 30 * GIB and found.why_limited is None


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    here = Asking(monkeypatch, free_gib=60, need_gib=36)
    assert here.limited(Shard(1, 4, 1, 1)).max_memory_bytes is None
    assert here.limited(Shard(1, 4, 1, 2)).max_memory_bytes == 27 * GIB


# The last one's weights have room on one card, and a batch beside them has not.
@pytest.mark.parametrize(("each", "limited"), [(30, False), (15, True), (52, False)])
def test_several_gpus_with_room_together_take_the_model_whole(monkeypatch, each: int, limited: bool):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(limit, "pick_device", lambda _: torch.device("cuda:0"))
    monkeypatch.setattr(limit, "needed_bytes", lambda _: 40 * GIB)
    monkeypatch.setattr(limit, "free_bytes", lambda cards: dict.fromkeys(cards, each * GIB))
    here = Asking(monkeypatch, free_gib=each, need_gib=48)
    found = here.limited(device=None)
    assert (found.max_memory_bytes is not None) == limited
    assert found.device.kind == (None if limited else "auto")
    named = here.limited(device="cuda:0")
    assert named.max_memory_bytes is not None and named.device == parse_device("cuda:0")


@pytest.mark.slow
def test_a_scan_that_limits_itself_gives_the_same_table_and_notes_why(
    scanned: Scanned, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = scanned("llama")
    monkeypatch.setattr(limit, "free_memory", lambda _: 8 * GIB)
    monkeypatch.setattr(room, "device_need", lambda *_: DeviceNeed(7 * GIB, GIB))
    found = scan(**options(tiny_folder("llama"), tmp_path / "run"))
    assert found.streamed_bytes and plain.streamed_bytes is None
    assert (found.run / "layers.csv").read_text() == (plain.run / "layers.csv").read_text()
    (told,) = set(found.notes) - set(plain.notes)
    assert told.startswith("cpu has 8.0 GiB free, and with all weights on it this scan would take about 8.0")


def test_a_limit_that_was_found_is_refused_with_what_would_help():
    store: Any = None
    found = MemoryLimit(2**20, torch.device("cpu"), store, is_found=True)
    with pytest.raises(MachineError, match=r"B \(what cpu has free\) is too little: work takes .* Free some"):
        found.check(2**30, "work")


def test_free_memory_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in {
        "memory.max": "1000000\n",
        "memory.current": "700000\n",
        "memory.stat": "anon 500000\ninactive_file 150000\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(measured_memory, "_CGROUP", tmp_path)
    assert measured_memory.free_memory(torch.device("cpu")) == 450_000
    (tmp_path / "memory.max").write_text("max\n")
    assert measured_memory.free_memory(torch.device("cpu")) > 10**8
