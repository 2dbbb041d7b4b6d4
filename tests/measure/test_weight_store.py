"""Weights that wait on the host: what is copied when, and that it changes no number."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qprobe.errors import MachineError, RunError
from qprobe.loading.mapped import Mapped
from qprobe.loading.reference import load_reference
from qprobe.measure import memory as limits
from qprobe.measure.memory import LIBRARIES_BYTES, SPARE, MemoryLimit
from qprobe.measure.subject import Subject, limited_subject, subject_of
from qprobe.measure.weight_store import Key, PinnedMemory, WeightStore, chosen_keys
from qprobe.records import FormatSpec
from tests import tiny

CPU = torch.device("cpu")
LARGE = 2**40


class CountingHost(PinnedMemory):
    """Memory of the CPU that plays the host of a device, and notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__(CPU, Mapped(Path()))
        self.loads: list[str] = []

    def load(self, key: Key) -> tuple[Tensor, ...]:
        self.loads.append(key.name)
        return super().load(key)


def store_of(sizes: dict[str, int], window_bytes: int) -> tuple[WeightStore, CountingHost]:
    host = CountingHost()
    store = WeightStore(host, window_bytes)
    for name, size in sizes.items():
        store.keep(Key("own", name), (torch.full((size,), 7, dtype=torch.uint8),))
    return store, host


def asked(store: WeightStore, names: str) -> None:
    for name in names:
        store.get(Key("own", name))


def test_the_window_keeps_what_was_asked_for_last_up_to_its_bytes():
    store, host = store_of({"a": 4, "b": 4, "c": 2}, window_bytes=6)
    asked(store, "aab")  # 4 + 4 are too many: a leaves
    asked(store, "cb")  # 4 + 2 fit, and c is now the older one
    assert host.loads == ["a", "b", "c"]
    asked(store, "a")  # 2 + 4 + 4: c leaves, and so must b
    assert host.loads == ["a", "b", "c", "a"]
    asked(store, "cab")  # c fits beside a; b pushes out c and, since 4 + 4 are too many, a
    assert host.loads == ["a", "b", "c", "a", "c", "b"]
    assert store.fetched_bytes == 4 + 4 + 2 + 4 + 2 + 4


def test_a_weight_larger_than_the_window_is_still_given_out():
    store, host = store_of({"a": 9, "b": 1}, window_bytes=4)
    assert store.get(Key("own", "a"))[0].tolist() == [7] * 9
    asked(store, "ab")
    assert host.loads == ["a", "b"]


def test_allowed_weights_stay_until_less_is_allowed():
    store, host = store_of({"a": 4, "b": 4, "c": 4}, window_bytes=4)
    store.allow(8)
    assert store.resident_bytes == 0  # copied when they are asked for, not before
    asked(store, "abcabcabc")
    assert store.resident_bytes == 8 and len(host.loads) == 3  # two stay, the third is the window
    store.allow(0)
    assert store.resident_bytes == 0
    asked(store, "ab")
    assert len(host.loads) == 5


def test_a_weight_that_is_kept_anew_replaces_the_old_one_on_the_device():
    store, _ = store_of({"a": 4}, window_bytes=4)
    for allowed in (0, 4):
        store.allow(allowed)
        asked(store, "a")
        store.keep(Key("own", "a"), (torch.full((2,), allowed, dtype=torch.uint8),))
        assert store.get(Key("own", "a"))[0].tolist() == [allowed] * 2
    assert store.kept_bytes == 2


def test_4_bit_forms_stay_first_and_16_bit_ones_lie_evenly():
    sizes = {Key(form, f"{i}"): 10 if form == "own" else 3 for i in range(8) for form in ("own", "packed")}
    few = chosen_keys(sizes, 8 * 3 + 4 * 10 + 9)
    assert {key for key in few if key.form == "packed"} == {key for key in sizes if key.form == "packed"}
    stay = sorted(int(key.name) for key in few if key.form == "own")
    # Four of eight: never three neighbours that stay, nor three that are copied.
    assert len(stay) == 4 and all(0 < len({i, i + 1, i + 2} & set(stay)) < 3 for i in range(6))


def test_what_inference_mode_fetches_serves_a_backward_pass_later():
    store, _ = store_of({"a": 4}, window_bytes=4)
    with torch.inference_mode():
        asked(store, "a")
    assert not store.get(Key("own", "a"))[0].is_inference()


# The limit ----------------------------------------------------------------------------------------------


class Meter:
    """A device whose peak a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        monkeypatch.setattr(limits, "peak_bytes", lambda _device, since_restart: self.peak)
        monkeypatch.setattr(limits, "restart_peak", lambda _device: None)


def test_a_limit_gives_weights_what_the_first_batch_left(monkeypatch: pytest.MonkeyPatch):
    meter = Meter(monkeypatch)
    names = "abcdefgh"
    store, _ = store_of(dict.fromkeys(names, 1000), window_bytes=0)
    limit = MemoryLimit(10_000, torch.device("cuda"), store, base_bytes=1_000)
    with limit.running("forward", size=2):
        asked(store, names)
        assert store.resident_bytes == 0
        meter.peak = 4_500  # 3,500 beside what is always held; the limit, less what is spared, leaves 5,200
    with limit.running("forward", size=2):
        asked(store, names)
        assert store.resident_bytes == 5_000 <= 10_000 * (1 - SPARE) - 4_500
        meter.peak = 9_500
    with limit.running("forward", size=3):  # half as large again: 5,250 beside
        assert store.resident_bytes == 3_000
        meter.peak = 9_000
    with limit.running("backward", size=2):  # nothing is known of other work
        assert store.resident_bytes == 0
        meter.peak = 2_000
    with limit.running("forward", size=1):  # 5,000 were taken beside 3,000 and 1,000
        asked(store, names)
        assert store.resident_bytes == 3_000


def test_a_first_batch_beyond_the_limit_is_refused_with_what_would_do(monkeypatch: pytest.MonkeyPatch):
    meter = Meter(monkeypatch)
    limit = MemoryLimit(2**30, torch.device("cuda"), store_of({}, 0)[0])
    with pytest.raises(MachineError, match=r"took 1,100,000,000 B .* Pass --max-memory 1081MiB or more"):
        with limit.running("forward", 1):
            meter.peak = 1_100_000_000


def test_on_a_cpu_room_is_left_for_what_the_process_loads_later(monkeypatch: pytest.MonkeyPatch):
    meter = Meter(monkeypatch)
    limit = MemoryLimit(1000 * 2**20, CPU, store_of({}, 0)[0], base_bytes=300 * 2**20)
    assert limit.left_bytes == 1000 * 2**20 * (1 - SPARE) - 300 * 2**20 - LIBRARIES_BYTES
    fits = 1000 * 2**20 - LIBRARIES_BYTES
    meter.peak = fits
    with limit.running("fits", 1):
        pass
    meter.peak = fits + 1
    with limit.running("fits", 1):  # finished batches are never thrown away for a later one
        pass
    with pytest.raises(MachineError, match=r"took 981,467,137 B .* Pass --max-memory 1029MiB or more"):
        with limit.running("does not", 1):
            pass


def test_a_limit_that_was_exceeded_is_noted_with_both_figures():
    limit = MemoryLimit(1_000, CPU, store_of({}, 0)[0])
    assert limit.note(1_000) == ()
    assert limit.note(1_001) == ("--max-memory 1,000 B was exceeded: the scan held up to 1,001 B.",)


def test_what_is_page_locked_is_not_held_in_its_file_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    let_go: list[int] = []

    class Watched(Mapped):
        def forget(self, tensor: Tensor) -> None:
            let_go.append(tensor.data_ptr())
            super().forget(tensor)

    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(Tensor, "to", lambda self, *_, **__: self)
    mapped = Watched(tmp_path)
    weight = mapped.keep(torch.arange(2**16))
    host, key = PinnedMemory(torch.device("cuda"), mapped), Key("own", "a")
    host.keep(key, (weight,))
    for _ in range(2):
        (found,) = host.load(key)
        assert torch.equal(found, torch.arange(2**16)) and found.data_ptr() != weight.data_ptr()
    assert let_go == [weight.data_ptr()]


def test_where_no_more_memory_is_locked_weights_are_copied_as_they_lie(monkeypatch, tmp_path: Path):
    locked: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        if locked:
            raise RuntimeError("CUDA error: out of memory")
        locked.append(1)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", lambda self, *_, **__: self)
    host = PinnedMemory(torch.device("cuda"), Mapped(tmp_path))
    for number, name in enumerate("abc"):
        host.keep(Key("own", name), (torch.full((4,), number),))
    for _ in range(2):
        assert [int(host.load(Key("own", name))[0][0]) for name in "abc"] == [0, 1, 2]


# Whole models -------------------------------------------------------------------------------------------


def limited(folder: Path, files: Path, limit_bytes: int = LARGE) -> Subject:
    return limited_subject(load_reference(str(folder), "cpu", on_host=True), FormatSpec(), limit_bytes, files)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_streamed_weights_are_those_of_the_model_in_both_forms(name: str, tiny_folder, tmp_path: Path):
    plain = subject_of(load_reference(str(tiny_folder(name)), "cpu"), FormatSpec())
    streamed = limited(tiny_folder(name), tmp_path)
    blocks = [n for n, x in plain.layers.items() if ".layers." in n or ".blocks." in n or ".layer." in n]
    assert streamed.dequantized.streamed == {n for n in blocks if not plain.layers[n].fixed} != set()
    for layer in plain.modules:
        assert torch.equal(plain.dequantized.own(layer), streamed.dequantized.own(layer))
        assert torch.equal(plain.dequantized.weight(layer), streamed.dequantized.weight(layer))
    assert list(tmp_path.iterdir()) == []  # no file stays


@pytest.mark.slow
def test_the_model_runs_on_fetched_weights_only_while_streaming(tiny_folder, tmp_path: Path):
    subject = limited(tiny_folder("mllama"), tmp_path)
    batch = subject.encode(tuple(tiny.questions("mllama", 2)))
    before = {name: dict(module.__dict__) for name, module in subject.model.named_modules()}
    with torch.inference_mode():
        wanted = subject.model(**batch.inputs).logits
        fetched = subject.streamed_bytes
        with pytest.raises(ZeroDivisionError):
            with subject.streaming():
                assert torch.equal(subject.model(**batch.inputs).logits, wanted)
                raise ZeroDivisionError
    assert subject.streamed_bytes == fetched + sum(
        subject.modules[n].weight.nbytes for n in subject.dequantized.streamed
    )
    after = {name: dict(module.__dict__) for name, module in subject.model.named_modules()}
    assert {n: list(x) for n, x in before.items()} == {n: list(x) for n, x in after.items()}


def test_a_limit_below_what_is_never_streamed_names_the_least(tiny_folder, tmp_path: Path):
    with pytest.raises(
        MachineError,
        match=r"too little: what is never streamed.* but no batch yet,.* Pass --max-memory \d+MiB",
    ):
        limited(tiny_folder("llama"), tmp_path, limit_bytes=2**20)


# Mapped files -------------------------------------------------------------------------------------------


def test_memory_of_no_file_is_never_let_go(tmp_path: Path):
    mapped = Mapped(tmp_path)
    own = torch.ones(2**20)
    mapped.forget(own)
    assert bool((own == 1).all())
    for tensor in (own, torch.arange(2**16, dtype=torch.int64).to(torch.bfloat16), torch.empty(0)):
        kept = mapped.keep(tensor)
        mapped.forget(kept)
        assert torch.equal(kept, tensor) and kept.dtype == tensor.dtype
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_weights_never_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen: list[list[Path]] = []
    read = torch.from_file

    def watched(*arguments: Any, **more: Any) -> Tensor:
        seen.append(list(tmp_path.iterdir()))
        return read(*arguments, **more)

    monkeypatch.setattr(torch, "from_file", watched)
    Mapped(tmp_path).keep(torch.ones(8))
    assert seen == [[]]  # so that nothing can be left behind by a kill


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qprobe.loading.mapped.tempfile.TemporaryFile", full)
    with pytest.raises(RunError, match=r"cannot take the weights .*: No space left on device\. Make room"):
        Mapped(tmp_path).keep(torch.ones(8))


@pytest.mark.skipif(sys.platform != "linux", reason="mapped files are known on Linux only")
@pytest.mark.parametrize("kept", ["folder", "hub cache"])
def test_a_model_loaded_on_the_host_takes_no_memory_of_its_own(tiny_folder, tmp_path: Path, kept: str):
    folder = tiny_folder("llama")
    if kept == "hub cache":
        folder = tiny.as_in_the_hub_cache(folder, tmp_path / "cache")
    reference = load_reference(str(folder), "cpu", on_host=True)
    mapped = Mapped(tmp_path)
    linears = [m.weight for m in reference.model.modules() if isinstance(m, nn.Linear)]
    assert all(mapped.keep(w.data) is w.data or mapped.keep(w).data_ptr() == w.data_ptr() for w in linears)


@pytest.mark.skipif(sys.platform != "linux", reason="mapped files are known on Linux only")
def test_weights_that_loading_converted_come_to_lie_in_files(tiny_folder, tmp_path: Path):
    reference = load_reference(str(tiny_folder("llama")), "cpu", "float16", on_host=True)
    plain = subject_of(load_reference(str(tiny_folder("llama")), "cpu", "float16"), FormatSpec())
    fmt = FormatSpec(compute_dtype="float16")
    subject = limited_subject(reference, fmt, LARGE, tmp_path)
    mapped = subject.limit.store.host._mapped  # type: ignore[union-attr]
    assert subject.dequantized.streamed
    for name in subject.dequantized.streamed:
        weight = subject.modules[name].weight
        assert mapped._is_mapped(weight.data) and torch.equal(weight, plain.modules[name].weight)
