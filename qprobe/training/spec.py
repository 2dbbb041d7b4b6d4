"""Everything that decides an adapter, as the record of its run keeps it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from qprobe.checkpoint.starts.corrected import kept_correction
from qprobe.data.conversation import Conversations
from qprobe.data.images import file_bytes
from qprobe.errors import MachineError
from qprobe.loading.device import pick_device
from qprobe.manifest.records import Manifest
from qprobe.options import FinetuneOptions, Optimizer
from qprobe.records import Video
from qprobe.system.devices import AskedDevice

_NOT_ASKED = (  # what decides nothing, or is told by digests of what was read
    "manifest", "data", "eval_data", "out", "model", "device", "save_every", "optimizer", "allow_downloads",
    "trust_remote_code", "progress", "workers",
)  # fmt: skip


def asked_spec(options: FinetuneOptions, on: AskedDevice, manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Everything that decides the adapter, in JSON values; two runs with equal specs may share a folder.

    folder: where `manifest` lies.
    """
    device = pick_device(on)
    if (device.index or 0) > 0:
        raise MachineError(
            f"transformers' Trainer works on the first GPU it sees, not on {device}. Set "
            f"CUDA_VISIBLE_DEVICES={device.index} and leave --device out."
        )
    asked = {x.name: getattr(options, x.name) for x in fields(options) if x.name not in _NOT_ASKED}
    return {
        **asked,
        "optimizer": _optimizer(options.optimizer, device),
        "fingerprint": manifest.model.fingerprint,
        "format": asdict(manifest.format),
        "codes": None if manifest.codes is None else manifest.codes.sha256,
        "correction": kept_correction(manifest, folder) if options.start == "corrected" else None,
        "skip_modules": _digest("\n".join(manifest.skip_modules).encode()),
    }


def images_digest(files: Sequence[Conversations]) -> str:
    """SHA-256 over the bytes of every image and video that a good row shows: the rows name files alone."""
    seen = {x for one in files for row in one.good for x in row.seen}
    return _digest("\n".join(sorted(set(map(_seen_digest, seen)))).encode())


def _seen_digest(seen: bytes | Path | Video) -> str:
    if isinstance(seen, Video):
        return _digest("\n".join(["video", *map(_seen_digest, seen.frames)]).encode())
    return _digest(seen if isinstance(seen, bytes) else file_bytes(seen))


def texts_digest(found: Conversations) -> str:
    """SHA-256 over what is said in the good rows, and which answers are learned."""
    rows = [[(x.role, x.learned, x.text, len(x.seen)) for x in row.turns] for row in found.good]
    return _digest(json.dumps(rows).encode())


def _optimizer(wanted: Optimizer | None, device: torch.device) -> Optimizer:
    if wanted == "adamw_8bit" and device.type != "cuda":
        raise MachineError(
            f"The optimizer adamw_8bit needs a CUDA device, and this run is on {device}. Leave --optimizer "
            f"out: on a CPU it is adamw_torch."
        )
    return wanted or ("adamw_8bit" if device.type == "cuda" else "adamw_torch")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
