"""Everything that decides an adapter, as the record of its run keeps it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qprobe.data.conversations import Conversations
from qprobe.errors import MachineError, SampleError
from qprobe.loading.device import pick_device
from qprobe.manifest.records import Manifest
from qprobe.options import FinetuneOptions, Optimizer
from qprobe.system.foreign import open_foreign


def asked_spec(options: FinetuneOptions, manifest: Manifest) -> dict[str, Any]:
    """Everything that decides the adapter, in JSON values; two runs with equal specs may share a folder."""
    device = pick_device(options.device)
    if (device.index or 0) > 0:
        raise MachineError(
            f"transformers' Trainer works on the first GPU it sees, not on {device}. Set "
            f"CUDA_VISIBLE_DEVICES={device.index} and leave --device out."
        )
    asked = {
        key: value
        for key, value in asdict(options).items()
        if key not in ("manifest", "data", "eval_data", "out", "model", "device", "save_every", "optimizer")
    }
    return {
        **asked,
        "optimizer": _optimizer(options.optimizer, device),
        "fingerprint": manifest.model.fingerprint,
        "format": asdict(manifest.format),
        "codes": None if manifest.codes is None else manifest.codes.sha256,
        "skip_modules": _digest("\n".join(manifest.skip_modules).encode()),
        "data": _file_digest(options.data),
        "eval_data": None if options.eval_data is None else _file_digest(options.eval_data),
    }


def images_digest(files: Sequence[Conversations]) -> str:
    """SHA-256 over the bytes of every image that a good line shows: the lines name files alone."""
    images = {x.image for one in files for x in one.good if isinstance(x.image, Path)}
    return _digest("\n".join(_file_digest(path) for path in sorted(images)).encode())


def _optimizer(wanted: Optimizer | None, device: torch.device) -> Optimizer:
    if wanted == "adamw_8bit" and device.type != "cuda":
        raise MachineError(
            f"The optimizer adamw_8bit needs a CUDA device, and this run is on {device}. Leave --optimizer "
            f"out: on a CPU it is adamw_torch."
        )
    return wanted or ("adamw_8bit" if device.type == "cuda" else "adamw_torch")


def _file_digest(path: Path) -> str:
    with open_foreign(path, SampleError, "Pass a .jsonl file.", None) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
