"""The doctor does real work, names what is wrong, and never raises for a sick machine."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata

import pytest
import torch

from qprobe.loading import doctor as doctor_module
from qprobe.loading.doctor import (
    NF4_CODES,
    Device,
    FourBit,
    Hub,
    Package,
    doctor,
    find_hub,
    find_problems,
    list_packages,
    pick_dtype,
    roundtrip_bound,
    try_four_bit,
)

HUB = Hub("reachable", "here", True)
WORKS = FourBit(True, 0.1, 0.156, 0.1, None)
FAILS = FourBit(False, None, 0.156, None, "RuntimeError: no kernel image is available")


def device(name: str, four_bit: FourBit, dtype: str = "bfloat16") -> Device:
    return Device(name, "a device", 2**34, 2**33, dtype, four_bit)


def test_our_codes_are_those_of_bitsandbytes():
    from bitsandbytes.functional import get_4bit_type

    assert get_4bit_type("nf4", device="cpu").tolist() == pytest.approx(list(NF4_CODES), abs=1e-7)


@pytest.mark.parametrize(("dtype", "roundoff"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_bound_is_half_the_widest_gap_and_the_roundoff(dtype: str, roundoff: float):
    # the widest gap lies between -1 and -0.6962: half of it is 0.1519
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    nearest = (grid[:, None] - torch.tensor(NF4_CODES, dtype=torch.float64)).abs().amin(1)
    assert roundtrip_bound(dtype) == pytest.approx(float(nearest.max()) + roundoff, abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_four_bit_works_on_this_cpu(dtype: str):
    found = try_four_bit("cpu", dtype)
    assert found.ok and found.error is None
    assert found.roundtrip_error is not None and found.roundtrip_error > 0.1  # real 4-bit, no copy
    assert found.matmul_error is not None and found.matmul_error <= 1


def test_wrong_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch):
    import bitsandbytes.functional

    right = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *a, **k: -right(*a, **k))
    found = try_four_bit("cpu", "bfloat16")
    assert not found.ok and found.error is None
    assert found.roundtrip_error is not None and found.roundtrip_error > found.roundtrip_bound


def test_a_library_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def broken(*_args: object, **_settings: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    found = try_four_bit("cpu", "bfloat16")
    assert not found.ok and found.error == "RuntimeError: no kernel image is available"


def test_this_cpu_takes_bf16():
    assert pick_dtype("cpu") == "bfloat16"


def test_a_card_before_ampere_gets_fp16(monkeypatch: pytest.MonkeyPatch):
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 0))
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: ones(*size, dtype=dtype))
    assert pick_dtype("cuda:0") == "float16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    assert pick_dtype("cuda:0") == "bfloat16"


def test_a_card_that_cannot_be_used_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def busy(_index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: all devices are busy\nand more")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    found = doctor(lambda: HUB)
    assert found.ok and not found.devices[1].four_bit.ok
    assert "cuda:0: CUDA error: all devices are busy" in found.problems[0].what


def test_packages_are_held_against_the_ranges_of_our_own_metadata(monkeypatch: pytest.MonkeyPatch):
    installed = {"torch": "2.1.0", "transformers": None}
    real = metadata.version

    def version(name: str) -> str:
        found = installed.get(name, "") or (None if name in installed else real(name))
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    packages = {p.name: p for p in list_packages()}
    assert not packages["torch"].satisfied and packages["torch"].wanted == "<3,>=2.8"
    assert not packages["transformers"].satisfied and packages["transformers"].version is None
    assert packages["bitsandbytes"].satisfied
    (old, missing) = find_problems(
        tuple(p for p in packages.values() if not p.satisfied), (device("cpu", WORKS),), HUB
    )
    assert old.what.startswith("torch is 2.1.0") and "pip install" in old.advice
    assert missing.what.startswith("transformers is missing")


def test_optional_packages_are_no_problem():
    assert find_problems((Package("trl", None, None, True),), (device("cpu", WORKS),), HUB) == ()


def test_a_machine_is_well_if_one_device_works():
    found = doctor(lambda: HUB)
    assert found.ok and found.devices[0].name == "cpu" and found.hub == HUB
    assert found.to_json()["ok"] is True


def test_a_machine_without_working_device_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_module, "_list_devices", lambda: (device("cpu", FAILS),))
    found = doctor(lambda: HUB)
    assert not found.ok
    assert "no kernel image" in found.problems[0].what and "bitsandbytes" in found.problems[0].advice


def test_each_wrong_thing_gets_an_advice():
    problems = find_problems(
        (Package("torch", "2.1.0", ">=2.8", False),),
        (device("cpu", WORKS), device("cuda:0", FAILS, "float16")),
        Hub("offline", "HF_HUB_OFFLINE is set", False),
    )
    said = [p.what for p in problems]
    assert len(said) == 4 and all(p.advice for p in problems)
    assert (
        "cuda:0" in said[0] and "no bf16" in said[1] and "torch is 2.1.0" in said[2] and "HF_HUB" in said[3]
    )


def test_offline_by_choice_is_not_asked_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_hub().status == "offline"


def serve(monkeypatch: pytest.MonkeyPatch, answer: threading.Event) -> HTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            answer.wait(5)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return server


@pytest.mark.slow
def test_any_answer_of_the_hub_counts(monkeypatch: pytest.MonkeyPatch):
    answer = threading.Event()
    answer.set()
    server = serve(monkeypatch, answer)
    assert find_hub().status == "reachable"
    server.shutdown()
    server.server_close()


def test_a_hub_that_hangs_does_not_hang_us(monkeypatch: pytest.MonkeyPatch):
    answer = threading.Event()
    server = serve(monkeypatch, answer)
    found = find_hub(seconds=0.2)
    answer.set()
    assert found.status == "unreachable"
    assert any(reason in found.detail for reason in ("no answer within 0.2 s", "timed out"))
    server.shutdown()
    server.server_close()


def test_a_hub_that_refuses_is_unreachable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert find_hub().status == "unreachable"
