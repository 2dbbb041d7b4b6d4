"""Can this machine do the job: versions, devices, real 4-bit work on each of them, the hub, and advice.

Nothing here raises for what is wrong with a machine: it becomes a `Problem` with what to do about it.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import pairwise
from threading import Thread
from typing import Any

from qprobe.system.wording import shortened

# The 16 values of NF4, from Dettmers et al. 2023, "QLoRA", appendix E.
NF4_CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
HUB_SECONDS = 3.0
DECISIVE_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate")  # shown first
OPTIONAL_PACKAGES = {
    "peft": "adapters for fine-tuning",
    "trl": "the fine-tuning loop",
    "torchvision": "image processors; some models' processors need it",
    "num2words": "numbers as words; the processor of SmolVLM needs it",
}


@dataclass(frozen=True)
class Package:
    """An installed or missing package; `wanted` is the range that qprobe asks for, None if it is optional."""

    name: str
    version: str | None
    wanted: str | None
    satisfied: bool


@dataclass(frozen=True)
class FourBit:
    """A real round trip and product through bitsandbytes; each error beside the bound that it must keep.

    roundtrip_error: largest abs(W - W_hat) / absmax of its block; matmul_error: largest error of an
    output, as a share of what rounding to 16 bit allows. Both None if the work raised `error`.
    """

    ok: bool
    roundtrip_error: float | None
    roundtrip_bound: float
    matmul_error: float | None
    error: str | None


@dataclass(frozen=True)
class Device:
    """One place to compute; `dtype` is what to hand to --dtype there, None if 16-bit work fails."""

    name: str
    title: str
    total_bytes: int
    free_bytes: int
    dtype: str | None
    four_bit: FourBit


@dataclass(frozen=True)
class Hub:
    """Model hub: "reachable", "offline" (asked for by environment) or "unreachable", and why."""

    status: str
    detail: str
    logged_in: bool


@dataclass(frozen=True)
class Problem:
    """Something wrong, and what to do about it."""

    what: str
    advice: str


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found; `ok` says whether 4-bit work is right on at least one device."""

    qprobe: str
    python: str
    system: str
    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    hub: Hub
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return any(device.four_bit.ok for device in self.devices)

    def to_json(self) -> dict[str, Any]:
        """The object of `qprobe doctor --json`."""
        return {"ok": self.ok, **asdict(self)}


def doctor(probe_hub: Callable[[], Hub] | None = None) -> Diagnosis:
    """A diagnosis of this machine; takes a few seconds. probe_hub: how to look for the hub."""
    from qprobe import __version__

    packages = list_packages()
    devices = _list_devices()
    hub = (probe_hub or find_hub)()
    return Diagnosis(
        qprobe=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        packages=packages,
        devices=devices,
        hub=hub,
        problems=find_problems(packages, devices, hub),
    )


def list_packages() -> tuple[Package, ...]:
    """What qprobe needs, with the range its own metadata asks for, then the optional packages."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in metadata.requires("qprobe") or ()]
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        asked = []
    needed = {r.name: str(r.specifier) for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})}
    order = sorted(needed, key=lambda name: (name not in DECISIVE_PACKAGES, name))
    found = [_package(name, needed[name]) for name in order]
    return (*found, *(_package(name, None) for name in OPTIONAL_PACKAGES if name not in needed))


def _package(name: str, wanted: str | None) -> Package:
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, None, wanted, satisfied=wanted is None)
    return Package(name, version, wanted, SpecifierSet(wanted or "").contains(version, prereleases=True))


def _list_devices() -> tuple[Device, ...]:
    try:
        import torch
    except (ImportError, OSError):  # OSError: a shared library of torch does not load
        return ()
    import psutil

    memory = psutil.virtual_memory()
    devices = [_device("cpu", platform.processor() or platform.machine(), memory.total, memory.available)]
    devices += [_cuda_device(index) for index in range(torch.cuda.device_count())]
    return tuple(devices)


def _cuda_device(index: int) -> Device:
    import torch

    name = f"cuda:{index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        return _device(name, torch.cuda.get_device_name(index), total, free)
    except RuntimeError as error:  # in exclusive use, out of memory, or a driver that does not fit
        reason = str(error).strip().splitlines()[0]
        return Device(
            name, "unusable", 0, 0, None, FourBit(False, None, roundtrip_bound("float16"), None, reason)
        )


def _device(name: str, title: str, total_bytes: int, free_bytes: int) -> Device:
    dtype = pick_dtype(name)
    return Device(name, title, total_bytes, free_bytes, dtype, try_four_bit(name, dtype or "float16"))


def pick_dtype(device: str) -> str | None:
    """ "bfloat16" where the device computes with it itself, else "float16", None if neither works.

    A card older than Ampere emulates bf16: slow, so float16 is the better choice there.
    """
    import torch

    if device.startswith("cuda"):
        major, _ = torch.cuda.get_device_capability(device)
        is_native = major >= 8 or torch.version.hip is not None
        candidates = ("bfloat16", "float16") if is_native else ("float16",)
    else:
        candidates = ("bfloat16", "float16")
    for dtype in candidates:
        try:
            x = torch.ones(2, 2, device=device, dtype=getattr(torch, dtype))
            if float((x @ x).sum()) == 8.0:
                return dtype
        except RuntimeError:
            continue
    return None


def roundtrip_bound(dtype: str) -> float:
    """Largest possible abs(w - w_hat) / absmax of NF4, when the scales themselves are not compressed.

    Rounding to the nearest code misses by at most half the widest gap between neighbours; reading the
    result back in `dtype` adds its unit roundoff (2^-8 for bf16, 2^-11 for fp16) of at most absmax.
    """
    widest = max(high - low for low, high in pairwise(NF4_CODES))
    return widest / 2 + _UNIT_ROUNDOFF[dtype]


_UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def try_four_bit(device: str, dtype: str) -> FourBit:
    """One round trip and one product of a 4-bit layer through bitsandbytes on `device`.

    The product must match W_hat x + b in float64 within 4 unit roundoffs of sum |W_hat| |x| (inputs,
    weights, sum and output are each rounded once; the sum itself runs in float32).
    """
    bound = roundtrip_bound(dtype)
    try:
        roundtrip, matmul = _four_bit_errors(device, dtype)
    except Exception as error:  # whatever goes wrong in a native library is the finding
        return FourBit(
            False, None, bound, None, f"{type(error).__name__}: {shortened(str(error).strip(), 300)}"
        )
    return FourBit(roundtrip <= bound and matmul <= 1.0, roundtrip, bound, matmul, None)


def _four_bit_errors(device: str, dtype: str) -> tuple[float, float]:
    import torch

    from qprobe.formats.library import import_bitsandbytes

    import_bitsandbytes()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit

    generator = torch.Generator().manual_seed(0)
    compute = getattr(torch, dtype)
    weight = torch.randn(128, 256, generator=generator).to(device, compute)
    x = torch.randn(8, 256, generator=generator).to(device, compute)

    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    weight_hat = dequantize_4bit(codes, state)
    absmax = weight.double().abs().reshape(-1, 64).amax(1, keepdim=True)
    roundtrip = ((weight_hat.double() - weight.double()).reshape(-1, 64).abs() / absmax).max()

    layer: Any = Linear4bit(256, 128, bias=False, compute_dtype=compute, quant_type="nf4").to(compute)
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer = layer.to(device)  # quantizes
    held = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    with torch.no_grad():
        y = layer(x).double()
    allowed = 4 * _UNIT_ROUNDOFF[dtype] * (x.double().abs() @ held.abs().T)
    return float(roundtrip), float(((y - x.double() @ held.T).abs() / allowed).max())


def find_hub(seconds: float = HUB_SECONDS) -> Hub:
    """Whether models can be downloaded; honours HF_HUB_OFFLINE and gives up after `seconds`."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return Hub("unreachable", "huggingface_hub is not installed", False)
    logged_in = get_token() is not None
    if constants.HF_HUB_OFFLINE:
        return Hub("offline", "HF_HUB_OFFLINE is set", logged_in)
    failure = _reach(constants.ENDPOINT, seconds)
    if failure is None:
        return Hub("reachable", constants.ENDPOINT, logged_in)
    return Hub("unreachable", f"{constants.ENDPOINT}: {failure}", logged_in)


def _reach(url: str, seconds: float) -> str | None:
    """Why `url` gave no answer within `seconds`, or None if it did.

    In a thread of its own, since a name look-up has no time-out that we could set.
    """
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    outcome = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=seconds):
                outcome[0] = ""
        except HTTPError:  # an answer all the same
            outcome[0] = ""
        except OSError as error:
            outcome[0] = str(getattr(error, "reason", error))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] or None


def find_problems(
    packages: tuple[Package, ...], devices: tuple[Device, ...], hub: Hub
) -> tuple[Problem, ...]:
    """What is wrong with the findings, the gravest first, each with what to do about it."""
    return (*_device_problems(devices), *_package_problems(packages), *_hub_problems(hub))


def _device_problems(devices: tuple[Device, ...]) -> list[Problem]:
    if not devices:
        return [
            Problem(
                "torch cannot be imported, so nothing can run.", 'Reinstall it: pip install "torch>=2.8".'
            )
        ]
    problems = []
    for device in devices:
        if not device.four_bit.ok:
            what = device.four_bit.error or "its results are outside their bounds"
            advice = (
                "Reinstall bitsandbytes for this system: pip install --force-reinstall --no-deps bitsandbytes"
            )
            if device.name != "cpu":
                advice += "; its CUDA build must match the driver (`python -m bitsandbytes` says more)"
            problems.append(Problem(f"4-bit work fails on {device.name}: {what}", f"{advice}."))
        if device.name != "cpu" and device.dtype == "float16":
            advice = "Pass --dtype fp16 whenever a model is loaded on it."
            problems.append(Problem(f"{device.name} ({device.title}) has no bf16 of its own.", advice))
    if len(devices) == 1 and shutil.which("nvidia-smi") and not _torch_has_gpu():
        advice = "Install the CUDA build of torch that fits the driver (`nvidia-smi` shows its version)."
        problems.append(Problem("There is an NVIDIA driver, but this torch sees no CUDA device.", advice))
    return problems


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _package_problems(packages: tuple[Package, ...]) -> list[Problem]:
    return [
        Problem(
            f"{p.name} is {'missing' if p.version is None else p.version}, but qprobe needs {p.wanted}.",
            f'Install it: pip install "{p.name}{p.wanted}".',
        )
        for p in packages
        if not p.satisfied
    ]


def _hub_problems(hub: Hub) -> list[Problem]:
    if hub.status == "reachable":
        return []
    advice = "Pass a local folder to --model, or use demo and demo-outliers, which need no network" + (
        "; unset HF_HUB_OFFLINE to download." if hub.status == "offline" else "."
    )
    return [Problem(f"Models cannot be downloaded ({hub.detail}).", advice)]
