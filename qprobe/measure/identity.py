"""What decides every number of a run: the specification in `scan.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from qprobe.measure.runner import Measures
from qprobe.models.reference import Reference
from qprobe.records import FormatSpec, Sample
from qprobe.samples.inputs import Batch

LIBRARIES = ("qprobe", "torch", "transformers", "bitsandbytes")
_SAMPLED = 4096  # elements of each weight that enter the digest: enough to tell checkpoints apart, at no cost


def run_spec(
    reference: Reference,
    fmt: FormatSpec,
    measures: Measures,
    batches: Mapping[str, Sequence[Sequence[Sample]]],
    first: Batch,
    seed: int,
    release: Callable[[Tensor], None] = lambda _: None,
) -> dict[str, Any]:
    """The specification of a run: two runs with equal specifications give the same units.

    batches: of samples, by what is measured on them. first: one of them. release: see `weights_digest`.
    """
    return {
        "model": asdict(reference.identity),
        "weights": weights_digest(reference.model, release),
        "format": asdict(fmt),
        "device": reference.device.type,
        "measures": asdict(measures),
        "processor": inputs_digest(first),
        **{what: [[_named(s) for s in group] for group in groups] for what, groups in batches.items()},
        "seed": seed,
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """The versions that can change a number, by distribution name.

    A library that is on the path without having been installed (a checkout) says its version itself.
    """
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = import_module(name).__version__
    return found


def _named(sample: Sample) -> dict[str, str]:
    return {"id": sample.id, "digest": sample.digest}


def weights_digest(model: Any, release: Callable[[Tensor], None] = lambda _: None) -> str:
    """SHA-256 over up to 4,096 evenly spaced elements of every parameter.

    release: called with each parameter once it was read.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        sha.update(name.encode())
        sha.update(flat[::step][:_SAMPLED].contiguous().cpu().view(torch.uint8).numpy().tobytes())
        release(parameter)
    return sha.hexdigest()


def inputs_digest(batch: Batch) -> str:
    """SHA-256 over the tensors that the processor made of a batch: changes when the processor does."""
    sha = hashlib.sha256()
    for key, value in sorted(batch.inputs.items()):
        sha.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        sha.update(value.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
